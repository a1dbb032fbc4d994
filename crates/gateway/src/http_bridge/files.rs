//! `/v1/files`: uploads for batches, and the results of batches.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::{Request, State};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{HeaderMap, HeaderName, HeaderValue, Response, header};
use multer::{Field, Multipart};
use parking_lot::Mutex;
use protocol::files::{FILES_PAGE_MAX, FileQuery, FileRef, StoredFile};
use protocol::{ErrorCode, TenantId, WireError};
use tokio::{task, time};
use utoipa::ToSchema;

use super::errors::{self, ApiError};
use super::extract::{Bridge, Query, Segment};
use super::request_body;
use super::tenant_request::TenantRequest;
use crate::config::seconds;
use crate::files::{FileReader, Upload};
use crate::json_body::{invalid, missing};
use crate::openai::batch::{ExpiresAfter, FileDeleted, FileObject, Page, parse_purpose};

/// The most bytes of a form's field that is not the file.
const FIELD_BYTES_MAX: usize = 1024;
/// The most bytes of a form in memory: what arrives at once, and the heads of fields.
const UNREAD_MAX: usize = 2 * 1024 * 1024;
/// The most fields of a form.
const FIELDS_MAX: usize = 16;
/// The time limit for a whole upload, however steadily it arrives. The orchestrator deletes one that takes longer.
const UPLOAD_WITHIN: Duration = Duration::from_hours(1);

/// A file to upload.
#[derive(ToSchema)]
#[schema(as = CreateFileRequest)]
#[expect(dead_code, reason = "only its description is used")]
struct UploadForm {
    /// The file: one JSON object in each line.
    #[schema(format = Binary, content_media_type = "application/octet-stream")]
    file: String,
    /// Always `batch`.
    purpose: String,
    /// Always `created_at`, if the file is to be deleted earlier than usual.
    #[schema(rename = "expires_after[anchor]")]
    expires_after_anchor: Option<String>,
    /// Seconds after which the file is deleted; 3600 to 2592000.
    #[schema(rename = "expires_after[seconds]")]
    expires_after_seconds: Option<u64>,
}

/// Uploads a file with the requests of a batch. It is stored encrypted.
#[utoipa::path(
    post, path = "/v1/files", tag = "openai", operation_id = "createFile", security(("bearer" = [])),
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses((status = 200, description = "The file", body = FileObject), ApiError),
)]
pub(super) async fn upload(State(bridge): State<Bridge>, request: TenantRequest, body: Request) -> Response<Body> {
    let (parts, body) = body.into_parts();
    let body = Arc::new(Mutex::new(body.into_data_stream()));
    let uploaded = match form(&bridge, &parts.headers, body.clone()) {
        Ok(form) => receive(&bridge, request.tenant_id(), form).await,
        Err(error) => Err(error),
    };
    if uploaded.is_err() {
        request_body::discard(take(&body), &HeaderMap::new()).await;
    }
    request.answer(uploaded.map(|file| errors::json(&FileObject::from(file))))
}

/// A body that a form reads, and of which the rest can be taken from it.
type SharedBody = Arc<Mutex<BodyDataStream>>;

/// Takes what nobody has read of a body.
fn take(body: &SharedBody) -> Body {
    Body::new(std::mem::replace(&mut *body.lock(), Body::empty().into_data_stream()))
}

/// A form whose fields are read one by one.
struct Form {
    parts: Multipart<'static>,
    /// Bytes that have arrived and of which no field was read yet.
    unread: Arc<AtomicUsize>,
}

impl Form {
    async fn next(&mut self) -> Result<Option<Field<'static>>, WireError> {
        self.parts.next_field().await.map_err(|error| malformed(&error))
    }

    /// Returns the next bytes of a field.
    async fn chunk(&self, field: &mut Field<'static>) -> Result<Option<Bytes>, WireError> {
        let bytes = field.chunk().await.map_err(|error| malformed(&error))?;
        let read = bytes.as_ref().map_or(0, Bytes::len);
        let less = |unread: usize| Some(unread.saturating_sub(read));
        let _ = self.unread.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        Ok(bytes)
    }
}

/// Reads the head of a form.
fn form(bridge: &Bridge, headers: &HeaderMap, body: SharedBody) -> Result<Form, WireError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    match multer::parse_boundary(kind) {
        Ok(boundary) => {
            let unread = Arc::new(AtomicUsize::new(0));
            let parts = Multipart::new(steady(bridge, body, unread.clone()), boundary);
            Ok(Form { parts, unread })
        }
        Err(_) => {
            let message = "the body must be a form with a file: send the header `Content-Type: multipart/form-data` \
                           with its boundary";
            Err(WireError::new(ErrorCode::UnsupportedMediaType, message))
        }
    }
}

/// Returns the bytes of a body whose sender never pauses for long. They come frame by frame, and no more than are read
/// in time, so that the form holds a few of them in memory.
fn steady(
    bridge: &Bridge,
    body: SharedBody,
    unread: Arc<AtomicUsize>,
) -> impl Stream<Item = Result<Bytes, TooSlow>> + Send + 'static {
    let idle = seconds(bridge.gateway.config().body_idle_secs);
    let body = stream::poll_fn(move |context| body.lock().poll_next_unpin(context));
    stream::unfold(Some(body), move |body| {
        let unread = unread.clone();
        async move {
            let mut body = body?;
            // The form takes what is there at once, and is to pass it on before it takes more.
            task::yield_now().await;
            match time::timeout(idle, body.next()).await {
                Ok(Some(Ok(bytes))) if unread.fetch_add(bytes.len(), Ordering::Relaxed) < UNREAD_MAX => {
                    Some((Ok(bytes), Some(body)))
                }
                Ok(None) => None,
                Ok(Some(_)) | Err(_) => Some((Err(TooSlow), None)),
            }
        }
    })
}

/// A body came too slowly, or broke off.
#[derive(Debug, thiserror::Error)]
#[error("the body came too slowly or broke off")]
struct TooSlow;

/// Receives the fields of a form in any order.
async fn receive(bridge: &Bridge, tenant_id: TenantId, mut form: Form) -> Result<StoredFile, WireError> {
    let mut upload = None;
    let fields = Box::pin(receive_fields(bridge, tenant_id, &mut form, &mut upload));
    let received = time::timeout(UPLOAD_WITHIN, fields).await.unwrap_or_else(|_| Err(too_slow()));
    match (received, upload) {
        (Ok(expires), Some(upload)) => upload.finish(expires).await,
        (Ok(_), None) => Err(missing("file")),
        (Err(error), Some(upload)) => {
            upload.abandon().await;
            Err(error)
        }
        (Err(error), None) => Err(error),
    }
}

/// Returns after how many seconds the file is to be deleted.
async fn receive_fields(
    bridge: &Bridge,
    tenant_id: TenantId,
    form: &mut Form,
    upload: &mut Option<Upload>,
) -> Result<Option<u64>, WireError> {
    let (mut purpose, mut anchor, mut secs) = (None, None, None);
    for _ in 0..FIELDS_MAX {
        let Some(field) = form.next().await? else { break };
        match field.name().unwrap_or_default() {
            "file" if upload.is_some() => return Err(invalid("file", "is given more than once")),
            "file" => {
                let name = field.file_name().unwrap_or("upload.jsonl").to_owned();
                let upload = upload.insert(bridge.gateway.create_file(tenant_id.clone(), name).await?);
                copy(form, field, upload).await?;
            }
            "purpose" => purpose = Some(text(form, field).await?),
            "expires_after[anchor]" => anchor = Some(text(form, field).await?),
            "expires_after[seconds]" => secs = Some(text(form, field).await?),
            _ => drop(text(form, field).await?),
        }
    }
    if purpose.ok_or_else(|| missing("purpose"))? != "batch" {
        return Err(invalid("purpose", "must be batch: files have no other use here"));
    }
    match (anchor, secs) {
        (None, None) => Ok(None),
        (anchor, secs) => {
            let seconds = secs.and_then(|secs| secs.parse().ok());
            let seconds = seconds.ok_or_else(|| invalid("expires_after.seconds", "must be a whole number"))?;
            ExpiresAfter { anchor: anchor.unwrap_or_default(), seconds }.check("expires_after").map(Some)
        }
    }
}

async fn copy(form: &Form, mut field: Field<'static>, upload: &mut Upload) -> Result<(), WireError> {
    while let Some(bytes) = form.chunk(&mut field).await? {
        upload.write(&bytes).await?;
    }
    Ok(())
}

async fn text(form: &Form, mut field: Field<'static>) -> Result<String, WireError> {
    let mut text = vec![];
    while let Some(bytes) = form.chunk(&mut field).await? {
        text.extend_from_slice(&bytes);
        if text.len() > FIELD_BYTES_MAX {
            return Err(WireError::new(ErrorCode::InvalidValue, "a field of the form is too long"));
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn too_slow() -> WireError {
    WireError::new(ErrorCode::RequestTimeout, TooSlow.to_string())
}

fn malformed(error: &multer::Error) -> WireError {
    match error {
        multer::Error::StreamReadFailed(_) => too_slow(),
        _ => WireError::new(ErrorCode::InvalidValue, "the body is not a well-formed multipart form"),
    }
}

/// Lists the files of the tenant.
#[utoipa::path(
    get, path = "/v1/files", tag = "openai", operation_id = "listFiles", security(("bearer" = [])),
    params(
        ("purpose" = Option<String>, Query, description = "Only files for this purpose: `batch` or `batch_output`"),
        ("limit" = Option<u32>, Query, description = "The most files to return, 1 to 10000, which is the default"),
        ("order" = Option<String>, Query, description = "`desc` for the newest first, which is the default, or `asc`"),
        ("after" = Option<String>, Query, description = "Id of the last file of the page before"),
    ),
    responses((status = 200, description = "A page of files", body = Page<FileObject>), ApiError),
)]
pub(super) async fn list(State(bridge): State<Bridge>, query: Query, request: TenantRequest) -> Response<Body> {
    let page = page(&bridge, &query, request.tenant_id()).await;
    request.answer(page.map(|page| errors::json(&page)))
}

async fn page(bridge: &Bridge, query: &Query, tenant_id: TenantId) -> Result<Page<FileObject>, WireError> {
    let limit = limit(query, FILES_PAGE_MAX, FILES_PAGE_MAX)?;
    let ascending = match query.get::<String>("order")?.as_deref() {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => return Err(invalid("order", "must be asc or desc")),
    };
    let purpose = query.get::<String>("purpose")?.map(|purpose| parse_purpose(&purpose)).transpose()?;
    // One more shows whether a page follows.
    let wanted = FileQuery { tenant_id, purpose, after: query.get("after")?, ascending, limit: limit + 1 };
    let files = bridge.gateway.list_files(&wanted).await?;
    Ok(Page::new(files.into_iter().map(FileObject::from).collect(), limit, |file| &file.id))
}

/// Returns the number of objects on a page.
pub(super) fn limit(query: &Query, usual: u32, most: u32) -> Result<u32, WireError> {
    let limit = query.get::<u32>("limit")?.unwrap_or(usual);
    if !(1..=most).contains(&limit) {
        return Err(invalid("limit", &format!("must be between 1 and {most}")));
    }
    Ok(limit)
}

/// Returns the name, size, purpose and expiry of a file, without its content.
#[utoipa::path(
    get, path = "/v1/files/{id}", tag = "openai", operation_id = "retrieveFile", security(("bearer" = [])),
    params(("id" = String, Path, description = "Id of the file")),
    responses((status = 200, description = "The file", body = FileObject), ApiError),
)]
pub(super) async fn get(State(bridge): State<Bridge>, Segment(id): Segment, request: TenantRequest) -> Response<Body> {
    let found = match named(&request, &id) {
        Ok(file) => bridge.gateway.file(&file).await.map_err(|error| missing_as(error, &id)),
        Err(error) => Err(error),
    };
    request.answer(found.map(|(_, file)| errors::json(&FileObject::from(file))))
}

/// Returns the bytes of a file.
#[utoipa::path(
    get, path = "/v1/files/{id}/content", tag = "openai", operation_id = "downloadFile", security(("bearer" = [])),
    params(("id" = String, Path, description = "Id of the file")),
    responses(
        (status = 200, description = "The file", body = String, content_type = "application/octet-stream"),
        ApiError,
    ),
)]
pub(super) async fn content(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    request: TenantRequest,
) -> Response<Body> {
    let opened = async {
        let file = named(&request, &id)?;
        let (keeper, described) = bridge.gateway.file(&file).await.map_err(|error| missing_as(error, &id))?;
        Ok((bridge.gateway.read_file(keeper, file), described.bytes))
    };
    let opened = opened.await;
    request.answer(opened.map(|(reader, bytes)| download(reader, bytes)))
}

fn download(reader: FileReader, bytes: u64) -> Response<Body> {
    // An error ends the connection before the promised length, so that no client takes a part for the whole.
    let pieces = stream::try_unfold(reader, |mut reader| async move {
        let next = reader.next().await.map_err(|error| std::io::Error::other(error.message))?;
        Ok::<_, std::io::Error>(next.map(|bytes| (bytes, reader)))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(bytes));
    // A browser is never to take it for a page.
    headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}

/// Deletes a file, unless a batch that has not ended reads it.
#[utoipa::path(
    delete, path = "/v1/files/{id}", tag = "openai", operation_id = "deleteFile", security(("bearer" = [])),
    params(("id" = String, Path, description = "Id of the file")),
    responses((status = 200, description = "The file was deleted", body = FileDeleted), ApiError),
)]
pub(super) async fn delete(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    request: TenantRequest,
) -> Response<Body> {
    let removed = match named(&request, &id) {
        Ok(file) => bridge.gateway.remove_file(&file).await,
        Err(error) => Err(error),
    };
    let deleted = match removed {
        Ok(true) => Ok(errors::json(&FileDeleted { id, object: "file", deleted: true })),
        Ok(false) => Err(no_file(&id)),
        Err(error) => Err(error),
    };
    request.answer(deleted)
}

fn named(request: &TenantRequest, id: &str) -> Result<FileRef, WireError> {
    Ok(FileRef { tenant_id: request.tenant_id(), id: id.parse().map_err(|_| no_file(id))? })
}

fn missing_as(error: WireError, id: &str) -> WireError {
    if error.code == ErrorCode::NotFound { no_file(id) } else { error }
}

fn no_file(id: &str) -> WireError {
    let shown: String = id.chars().take(64).collect();
    WireError::new(ErrorCode::NotFound, format!("there is no file {shown:?}, or no longer")).with_param("id")
}
