//! The transcript of an introduction: what both nodes say about their versions and their pool, bound to their
//! connection.
//!
//! Each node proves its words with a MAC. The key is a secret that only the two ends of the connection know, so the
//! words cannot be changed, and cannot be said again on another connection. The two nodes speak the newest version that
//! both know. A callee that chooses an older one is refused.

use std::fmt;

use blake2::Blake2bMac;
use blake2::digest::consts::U32;
use blake2::digest::{FixedOutput as _, Mac, Update};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::id::{PublicKey, TranscriptProof};

/// The versions of the protocol between nodes that this program speaks. Version 1 has no transcripts.
pub const VERSIONS: Versions = Versions { oldest: 1, newest: 2 };

/// The first version whose introductions have a transcript.
const TRANSCRIPTS_SINCE: u32 = 2;
/// Separates these MACs from those of other uses of the secret.
const DOMAIN: &[u8] = b"tether/hello/2";

/// The versions of the protocol that a node speaks, the oldest and the newest included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Versions {
    /// Oldest version that the node speaks.
    pub oldest: u32,
    /// Newest version that the node speaks.
    pub newest: u32,
}

/// What a node says besides showing its certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Transcript {
    /// Versions of the protocol that the node speaks.
    pub versions: Versions,
    /// In a response, the newest version that both nodes speak; absent if they have no version in common.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreed: Option<u32>,
    /// MAC of the transcript so far.
    pub proof: TranscriptProof,
}

/// The two ends of a connection, and what binds words to it.
#[derive(Clone, Copy)]
pub struct Ends<'a> {
    /// A secret that only the two ends know.
    pub secret: &'a [u8; 32],
    /// Public key of the pool's root.
    pub pool: PublicKey,
    /// The node that opened the connection.
    pub caller: PublicKey,
    /// The node that accepted the connection.
    pub callee: PublicKey,
}

/// The nodes speak no version in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VersionMismatch {
    /// What the node speaks that opened the connection.
    pub caller: Versions,
    /// What the other node speaks.
    pub callee: Versions,
}

/// Why a transcript is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TranscriptError {
    /// The proof does not verify.
    #[error("the introduction was changed, or was made for another connection or pool")]
    Proof,
    /// The callee chose an older version than both nodes speak.
    #[error("the called node does not choose version {expected} of the protocol, which both nodes speak")]
    Downgrade {
        /// The newest version that both speak.
        expected: u32,
    },
}

impl Versions {
    /// The versions of a node whose introduction has no transcript.
    const WITHOUT_TRANSCRIPT: Self = Self { oldest: 1, newest: TRANSCRIPTS_SINCE - 1 };

    /// Returns the newest version that both speak.
    pub fn common(self, other: Self) -> Option<u32> {
        let newest = self.newest.min(other.newest);
        (newest >= self.oldest.max(other.oldest)).then_some(newest)
    }

    fn have_transcripts(self) -> bool {
        self.newest >= TRANSCRIPTS_SINCE
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { oldest, newest } = self;
        if oldest == newest { write!(formatter, "{newest}") } else { write!(formatter, "{oldest} to {newest}") }
    }
}

impl fmt::Display for VersionMismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { caller, callee } = self;
        let older = if caller.newest < callee.oldest { "calling" } else { "called" };
        write!(
            formatter,
            "the calling node speaks version {caller} of the protocol and the called node {callee}: \
             update tether on the {older} node"
        )
    }
}

impl VersionMismatch {
    fn check(caller: Versions, callee: Versions) -> Result<u32, Self> {
        caller.common(callee).ok_or(Self { caller, callee })
    }
}

impl Transcript {
    /// Makes the transcript of a caller's introduction. A version without transcripts has none.
    pub fn of_caller(ends: Ends<'_>, versions: Versions) -> Option<Self> {
        let proof = TranscriptProof(ends.mac(versions, None, None));
        versions.have_transcripts().then_some(Self { versions, agreed: None, proof })
    }

    /// Checks the transcript of a caller's introduction. Returns the version that both speak, and the transcript of the
    /// response.
    pub fn meet_caller(
        ends: Ends<'_>,
        versions: Versions,
        heard: Option<&Self>,
    ) -> Result<(Result<u32, VersionMismatch>, Option<Self>), TranscriptError> {
        let caller = match heard.filter(|_| versions.have_transcripts()) {
            Some(heard) => {
                ends.verify(heard.versions, None, None, heard.proof)?;
                heard.versions
            }
            None => Versions::WITHOUT_TRANSCRIPT,
        };
        let common = VersionMismatch::check(caller, versions);
        let agreed = common.ok();
        let proof = TranscriptProof(ends.mac(versions, Some(caller), agreed));
        let answer = Self { versions, agreed, proof };
        Ok((common, versions.have_transcripts().then_some(answer)))
    }

    /// Checks the transcript of a callee's response. Returns the version that both speak.
    pub fn meet_callee(
        ends: Ends<'_>,
        versions: Versions,
        heard: Option<&Self>,
    ) -> Result<Result<u32, VersionMismatch>, TranscriptError> {
        let Some(heard) = heard.filter(|_| versions.have_transcripts()) else {
            return Ok(VersionMismatch::check(versions, Versions::WITHOUT_TRANSCRIPT));
        };
        ends.verify(heard.versions, Some(versions), heard.agreed, heard.proof)?;
        let common = VersionMismatch::check(versions, heard.versions);
        match common.ok().filter(|expected| heard.agreed != Some(*expected)) {
            Some(expected) => Err(TranscriptError::Downgrade { expected }),
            None => Ok(common),
        }
    }
}

impl Ends<'_> {
    /// Returns the MAC of what one end says. `heard` is what the callee heard from the caller.
    fn mac(&self, versions: Versions, heard: Option<Versions>, agreed: Option<u32>) -> [u8; 32] {
        self.state(versions, heard, agreed).finalize_fixed().into()
    }

    fn verify(
        &self,
        versions: Versions,
        heard: Option<Versions>,
        agreed: Option<u32>,
        proof: TranscriptProof,
    ) -> Result<(), TranscriptError> {
        self.state(versions, heard, agreed).verify_slice(&proof.0).map_err(|_| TranscriptError::Proof)
    }

    fn state(&self, versions: Versions, heard: Option<Versions>, agreed: Option<u32>) -> Blake2bMac<U32> {
        let mut state = <Blake2bMac<U32> as Mac>::new_from_slice(self.secret).expect("a key of 32 bytes");
        for part in [DOMAIN, &self.pool.0, &self.caller.0, &self.callee.0] {
            Update::update(&mut state, part);
        }
        // Of fixed length, so that no two transcripts have the same bytes. Versions begin at 1.
        let [heard_oldest, heard_newest] = heard.map_or([0, 0], |heard| [heard.oldest, heard.newest]);
        let numbers = [versions.oldest, versions.newest, heard_oldest, heard_newest, agreed.unwrap_or(0)];
        Update::update(&mut state, &[u8::from(heard.is_some())]);
        for number in numbers {
            Update::update(&mut state, &number.to_le_bytes());
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDS: Ends<'_> =
        Ends { secret: &[7; 32], pool: PublicKey([1; 32]), caller: PublicKey([2; 32]), callee: PublicKey([3; 32]) };

    fn versions(oldest: u32, newest: u32) -> Versions {
        Versions { oldest, newest }
    }

    /// Returns what the callee and the caller find, in this order.
    fn meet(caller: Versions, callee: Versions) -> [Result<u32, VersionMismatch>; 2] {
        let said = Transcript::of_caller(ENDS, caller);
        let (found, answer) = Transcript::meet_caller(ENDS, callee, said.as_ref()).expect("honest");
        [found, Transcript::meet_callee(ENDS, caller, answer.as_ref()).expect("honest")]
    }

    #[test]
    fn neighbouring_versions_speak_the_newest_that_both_know() {
        for (caller, callee, common) in [
            ((1, 2), (1, 2), 2),
            ((1, 1), (1, 2), 1),
            ((1, 2), (1, 1), 1),
            ((1, 2), (2, 3), 2),
            ((2, 3), (1, 2), 2),
            ((2, 3), (2, 3), 3),
        ] {
            let found = meet(versions(caller.0, caller.1), versions(callee.0, callee.1));
            assert_eq!(found, [Ok(common); 2], "{caller:?} calls {callee:?}");
        }
    }

    #[test]
    fn versions_further_apart_are_refused_by_both_sides_and_the_older_one_is_named() {
        for (caller, callee, older) in [
            ((1, 1), (2, 3), "calling"),
            ((2, 3), (1, 1), "called"),
            ((1, 2), (3, 4), "calling"),
            ((3, 4), (1, 2), "called"),
        ] {
            let met = meet(versions(caller.0, caller.1), versions(callee.0, callee.1));
            for (met, own) in met.into_iter().zip([callee, caller]) {
                // A node of version 1 does not notice.
                if own == (1, 1) {
                    continue;
                }
                let text = met.expect_err("too far apart").to_string();
                assert!(text.ends_with(&format!("update tether on the {older} node")), "{text}");
            }
        }
    }

    #[test]
    fn words_that_were_changed_or_belong_to_another_connection_are_refused() {
        let own = versions(1, 2);
        let said = Transcript::of_caller(ENDS, own).expect("a transcript");
        let older = Transcript { versions: versions(1, 1), ..said.clone() };
        let elsewhere = [
            Ends { secret: &[8; 32], ..ENDS },
            Ends { pool: PublicKey([9; 32]), ..ENDS },
            Ends { caller: PublicKey([9; 32]), ..ENDS },
            Ends { callee: PublicKey([9; 32]), ..ENDS },
        ];
        assert_eq!(Transcript::meet_caller(ENDS, own, Some(&older)).err(), Some(TranscriptError::Proof));
        for ends in elsewhere {
            assert_eq!(Transcript::meet_caller(ends, own, Some(&said)).err(), Some(TranscriptError::Proof));
        }
        // A caller's own words, sent back, are not a response.
        assert_eq!(Transcript::meet_callee(ENDS, own, Some(&said)), Err(TranscriptError::Proof));
        let (_, answer) = Transcript::meet_caller(ENDS, own, Some(&said)).expect("honest");
        let answer = answer.expect("a transcript");
        for changed in [
            Transcript { agreed: Some(1), ..answer.clone() },
            Transcript { versions: versions(1, 1), ..answer.clone() },
        ] {
            assert_eq!(Transcript::meet_callee(ENDS, own, Some(&changed)), Err(TranscriptError::Proof));
        }
        assert_eq!(
            Transcript::meet_callee(ENDS, versions(1, 3), Some(&answer)),
            Err(TranscriptError::Proof),
            "the callee heard other versions"
        );
    }

    #[test]
    fn a_callee_that_chooses_an_older_version_is_refused() {
        let own = versions(1, 2);
        let proof = TranscriptProof(ENDS.mac(own, Some(own), Some(1)));
        let downgrade = Transcript { versions: own, agreed: Some(1), proof };
        let expected = Err(TranscriptError::Downgrade { expected: 2 });
        assert_eq!(Transcript::meet_callee(ENDS, own, Some(&downgrade)), expected);
    }
}
