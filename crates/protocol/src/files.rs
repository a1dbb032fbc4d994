//! Files of tenants, which orchestrators store: method names, and the messages they carry.

use std::fmt;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use inference::text_id;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::clock::UnixMillis;
use crate::id::TenantId;

/// Orchestrator: begins an upload. [`NewFile`] → [`crate::control::Empty`].
pub const FILE_CREATE: &str = "file.create";
/// Orchestrator: adds a piece to a file that is being uploaded. [`FileWrite`] → [`crate::control::Empty`].
pub const FILE_WRITE: &str = "file.write";
/// Orchestrator: ends an upload. [`FileFinish`] → [`StoredFile`].
pub const FILE_FINISH: &str = "file.finish";
/// Orchestrator: shows a file. [`FileRef`] → [`StoredFile`].
pub const FILE_SHOW: &str = "file.show";
/// Orchestrator: lists files. [`FileQuery`] → [`FileList`].
pub const FILE_LIST: &str = "file.list";
/// Orchestrator: reads the next pieces of a file. [`FileRead`] → [`FilePieces`].
pub const FILE_READ: &str = "file.read";
/// Orchestrator: deletes a file. [`FileRef`] → [`FileRemoved`].
pub const FILE_REMOVE: &str = "file.remove";

/// The most bytes of a piece of an uploaded file.
pub const PIECE_BYTES_MAX: usize = 256 * 1024;
/// The most files of a page. A list may have one more, which shows whether a page follows.
pub const FILES_PAGE_MAX: u32 = 10_000;
/// The longest name of a file, in bytes.
pub const FILE_NAME_BYTES_MAX: usize = 512;

/// Returns whether the rest of an id is that of a UUID without hyphens.
pub(crate) fn is_hex_uuid(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

text_id! {
    /// Id of a file. Ids increase with time.
    FileId, "file", "`file-` and 32 lower-case hex digits", "^file-[0-9a-f]{32}$",
    |text| text.strip_prefix("file-").is_some_and(is_hex_uuid)
}

impl FileId {
    /// Makes an id of a UUID of version 7.
    pub fn new(uuid: uuid::Uuid) -> Self {
        format!("file-{}", uuid.as_simple()).parse().expect("a UUID has 32 hex digits")
    }
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilePurpose {
    /// The requests of a batch.
    Batch,
    /// The results of a batch.
    BatchOutput,
}

impl FilePurpose {
    /// Returns its name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::BatchOutput => "batch_output",
        }
    }
}

/// A file to upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NewFile {
    /// Tenant whose file it is.
    pub tenant_id: TenantId,
    /// Id of the file.
    pub id: FileId,
    /// Name that the client gave it.
    pub name: String,
}

/// An upload that ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileFinish {
    /// Tenant and id of the file.
    #[serde(flatten)]
    pub file: FileRef,
    /// Seconds after which it is deleted; the configured time if omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_after_secs: Option<u64>,
}

/// A piece of a file that is being uploaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileWrite {
    /// Tenant and id of the file.
    #[serde(flatten)]
    pub file: FileRef,
    /// Position of the piece, from 0. A piece that is sent again changes nothing.
    pub piece: u32,
    /// At most [`PIECE_BYTES_MAX`].
    pub bytes: Base64Bytes,
}

/// Names a file of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileRef {
    /// Tenant whose file it is.
    pub tenant_id: TenantId,
    /// Id of the file.
    pub id: FileId,
}

/// A file, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredFile {
    /// Id of the file.
    pub id: FileId,
    /// Name that the client gave it.
    pub name: String,
    /// What it is for.
    pub purpose: FilePurpose,
    /// Length of the file.
    pub bytes: u64,
    /// When the upload began, or when the batch ended whose results it has.
    pub created_at: UnixMillis,
    /// When it is deleted.
    pub expires_at: UnixMillis,
}

/// Which files to list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileQuery {
    /// Tenant whose files they are.
    pub tenant_id: TenantId,
    /// Only files for this purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub purpose: Option<FilePurpose>,
    /// Only files that follow this one in the order of the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<FileId>,
    /// Whether the oldest come first.
    #[serde(default)]
    pub ascending: bool,
    /// The most files to return; at most one more than [`FILES_PAGE_MAX`].
    pub limit: u32,
}

/// Files of a tenant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileList {
    /// The files, in the requested order.
    pub files: Vec<StoredFile>,
}

/// Which pieces of a file to read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileRead {
    /// Tenant and id of the file.
    #[serde(flatten)]
    pub file: FileRef,
    /// The last piece that the caller has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<u32>,
}

/// The next bytes of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FilePieces {
    /// The bytes; empty at the end of the file.
    pub bytes: Base64Bytes,
    /// The last of the pieces; absent at the end of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<u32>,
}

/// Whether a file was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileRemoved {
    /// Whether it was there.
    pub found: bool,
}

/// Bytes that are written as base64.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Base64Bytes(pub Vec<u8>);

impl fmt::Debug for Base64Bytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // They are texts of clients.
        write!(formatter, "{} bytes", self.0.len())
    }
}

impl Serialize for Base64Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text.as_bytes()).map(Self).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_files_increase_with_time_and_others_are_refused() {
        let of = |number| FileId::new(uuid::Uuid::from_u128(number));
        assert!(of(1) < of(2) && of(9) < of(1 << 80));
        assert_eq!(of(1).as_str().parse(), Ok(of(1)));
        for bad in ["", "file-", "file-../../etc", "batch_00000000000000000000000000000000", "file-ABC"] {
            bad.parse::<FileId>().expect_err(bad);
        }
    }

    #[test]
    fn bytes_travel_as_base64_and_are_not_printed() {
        let bytes = Base64Bytes(b"secret".to_vec());
        let written = serde_json::to_string(&bytes).expect("text");
        assert_eq!(written, "\"c2VjcmV0\"");
        assert_eq!(serde_json::from_str::<Base64Bytes>(&written).expect("base64"), bytes);
        assert!(serde_json::from_str::<Base64Bytes>("\"?\"").is_err());
        assert_eq!(format!("{bytes:?}"), "6 bytes");
    }
}
