//! Decides what went wrong with a request, from what its client saw and what the store has of it.

use protocol::jobs::{JobInfo, JobStatus};

use super::cell::Tolerance;
use super::client::{End, Seen};
use super::requests::{Request, RightAnswer};

/// Tokens that a gateway may have acknowledged when it died, and its client has not received: the buffers of a
/// connection.
const IN_BUFFERS: u32 = 64;

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Fault {
    /// Its client got neither an answer nor an error.
    Lost,
    /// It was billed twice, or for more than was read.
    Doubled,
    /// Its job does not end.
    Stuck,
    /// The answer is not the right one, or an error came although nothing had died that had the request.
    Broken,
}

/// Returns what went wrong with a request. `jobs` are those with its trace.
pub(super) fn judge(
    request: &Request,
    seen: &Seen,
    jobs: &[JobInfo],
    right: &RightAnswer,
    tolerance: Tolerance,
) -> Vec<(Fault, String)> {
    let mut found = vec![];
    match &seen.end {
        End::Whole if seen.texts != right.texts => found.push((Fault::Broken, difference(&seen.texts, &right.texts))),
        End::Whole => {}
        End::Silent => found.push((Fault::Lost, "the client got neither an answer nor an error".to_owned())),
        // A client with a key asks until it has its answer.
        end if request.key.is_some() => found.push((Fault::Lost, format!("no answer in spite of the key: {end}"))),
        End::Cut if !tolerance.cuts => found.push((Fault::Lost, "the answer broke off without an error".to_owned())),
        end if !tolerance.errors => {
            found.push((Fault::Broken, format!("no answer, although nothing died that alone had the request: {end}")));
        }
        _ => {}
    }
    if seen.texts.len() == right.texts.len()
        && seen.texts.iter().zip(&right.texts).any(|(seen, right)| !right.starts_with(seen.as_str()))
        && seen.end != End::Whole
    {
        found.push((Fault::Broken, difference(&seen.texts, &right.texts)));
    }
    if jobs.iter().any(|job| job.status == JobStatus::Running) {
        found.push((Fault::Stuck, "its job still runs".to_owned()));
    }
    let bills: Vec<u32> = jobs.iter().filter_map(|job| job.usage).map(|usage| usage.completion_tokens).collect();
    // Without a key, each try is a request of its own.
    let bills_max = if request.key.is_some() { 1 } else { seen.tries as usize };
    if bills.len() > bills_max {
        found.push((Fault::Doubled, format!("{} bills for {} tries: {bills:?} tokens", bills.len(), seen.tries)));
    }
    let read = tokens_read(seen, right);
    let billed: u32 = bills.iter().sum();
    if request.key.is_none() && request.is_streamed && billed > read + IN_BUFFERS {
        found.push((Fault::Doubled, format!("billed {billed} tokens, and read about {read}")));
    }
    if request.key.is_some() && seen.end == End::Whole && bills != [right.tokens] {
        found.push((Fault::Doubled, format!("billed {bills:?} tokens for an answer of {}", right.tokens)));
    }
    found
}

/// Returns about how many tokens all tries of a request read.
fn tokens_read(seen: &Seen, right: &RightAnswer) -> u32 {
    (u64::from(right.tokens) * seen.read_bytes as u64 / right.len().max(1) as u64) as u32
}

/// Describes where two answers begin to differ.
fn difference(seen: &[String], right: &[String]) -> String {
    if seen.len() != right.len() {
        return format!("{} answers instead of {}", seen.len(), right.len());
    }
    let of = seen.iter().zip(right).find(|(seen, right)| seen != right);
    let Some((seen, right)) = of else { return "no difference".to_owned() };
    let same = seen.bytes().zip(right.bytes()).take_while(|(one, other)| one == other).count();
    let from = |text: &str| {
        String::from_utf8_lossy(&text.as_bytes()[same.min(text.len())..]).chars().take(24).collect::<String>()
    };
    format!(
        "the text differs from byte {same} of {}: {:?} instead of {:?}, {} bytes in all",
        right.len(),
        from(seen),
        from(right),
        seen.len()
    )
}
