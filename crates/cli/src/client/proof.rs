//! Has a gateway prove that it runs on a data folder, before it is shown the folder's key.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use gateway::folder_proof::{FolderSecret, PROOF_BYTES, PROOF_PATH};
use serde_json::Value;

use crate::data_folder::DataFolder;

/// What a gateway must prove.
#[derive(Debug, Clone)]
pub(super) struct FolderProof {
    folder: PathBuf,
    /// `None` if no gateway ever ran on the folder, so that none can prove it.
    secret: Option<FolderSecret>,
}

/// A nonce that only a gateway of the folder can answer.
pub(super) struct Challenge<'a> {
    proof: &'a FolderProof,
    nonce: [u8; PROOF_BYTES],
}

impl FolderProof {
    pub(super) fn of(data: &DataFolder) -> anyhow::Result<Self> {
        Ok(Self { folder: data.path().to_owned(), secret: data.gateway_secret()? })
    }

    pub(super) fn challenge(&self) -> anyhow::Result<Challenge<'_>> {
        let mut nonce = [0; PROOF_BYTES];
        getrandom::fill(&mut nonce).context("could not draw random bytes")?;
        Ok(Challenge { proof: self, nonce })
    }

    /// Returns the error for a gateway that does not prove that it runs on the folder.
    pub(super) fn refusal(&self, url: &str) -> anyhow::Error {
        let folder = self.folder.display();
        anyhow!(
            "the program at {url} is not the gateway of {folder}, so it is not shown the API key of that folder; if the \
             folder's network has stopped, start it on another port with `tether up --bind HOST:PORT`; for another \
             network, name its folder with --data-dir, or give --url and --api-key-file"
        )
    }
}

impl Challenge<'_> {
    pub(super) fn path(&self) -> String {
        format!("{PROOF_PATH}{}", hex::encode(self.nonce))
    }

    /// Checks the answer of the gateway at an address.
    pub(super) fn is_met(&self, address: SocketAddr, answer: &Value) -> bool {
        let proof = answer["proof"].as_str().and_then(|proof| hex::decode(proof).ok());
        proof.is_some_and(|proof| {
            self.proof.secret.as_ref().is_some_and(|secret| secret.verify(&self.nonce, address, &proof))
        })
    }
}
