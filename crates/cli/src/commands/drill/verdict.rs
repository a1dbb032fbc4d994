//! Decides what went wrong with a request, from what its client saw and what the store has of it.

use protocol::jobs::{JobInfo, JobStatus};

use super::cell::Tolerance;
use super::client::{End, Seen};
use super::requests::{Request, RightAnswer};

/// Tokens that a gateway may have acknowledged when it died, and its client has not received: the buffers of a
/// connection.
const IN_BUFFERS: u32 = 64;

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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use protocol::usage::TokenUsage;
    use protocol::{PublicKey, UnixMillis};

    use super::super::requests::{Question, Shape};
    use super::*;

    fn request(has_key: bool) -> Request {
        let question = Question { shape: Shape::Text, prompt: 0 };
        Request::new(question, true, has_key, &mut fastrand::Rng::with_seed(1))
    }

    fn right() -> RightAnswer {
        RightAnswer { texts: vec!["abcd".repeat(100)], tokens: 100 }
    }

    fn seen(end: End, text: &str) -> Seen {
        Seen {
            end,
            texts: vec![text.to_owned()],
            request_id: String::new(),
            tries: 1,
            pause: Duration::ZERO,
            read_bytes: text.len(),
            tokens: None,
        }
    }

    fn job(status: JobStatus, tokens: Option<u32>) -> JobInfo {
        JobInfo {
            sequence: 1,
            correlation_id: "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("an id"),
            tenant_id: "default".parse().expect("a tenant"),
            model: crate::tiny_model::key(),
            region: "local".parse().expect("a region"),
            trace_id: request(true).trace,
            status,
            worker_id: PublicKey([1; 32]),
            attempts: 1,
            continued: 0,
            created_at: UnixMillis(1),
            updated_at: UnixMillis(2),
            error_code: None,
            error_message: None,
            finish_reason: None,
            usage: tokens.map(|completion_tokens| TokenUsage { completion_tokens, ..TokenUsage::default() }),
            history: vec![],
        }
    }

    fn faults(has_key: bool, seen: &Seen, jobs: &[JobInfo], tolerance: Tolerance) -> Vec<Fault> {
        let found = judge(&request(has_key), seen, jobs, &right(), tolerance);
        found.into_iter().map(|(fault, _)| fault).collect()
    }

    const STRICT: Tolerance = Tolerance { errors: false, cuts: false };
    const LAX: Tolerance = Tolerance { errors: true, cuts: true };

    #[test]
    fn a_whole_answer_with_one_bill_is_well() {
        let (whole, billed) = (right().texts.concat(), job(JobStatus::Completed, Some(100)));
        for has_key in [true, false] {
            assert_eq!(faults(has_key, &seen(End::Whole, &whole), std::slice::from_ref(&billed), STRICT), []);
        }
    }

    #[test]
    fn a_gap_a_repeat_and_a_splice_are_broken() {
        let billed = [job(JobStatus::Completed, Some(100))];
        let whole = right().texts.concat();
        for text in [whole.replacen("abcd", "", 1).replacen('a', "x", 1), format!("{whole}d"), whole[1..].to_owned()] {
            assert_eq!(faults(false, &seen(End::Whole, &text), &billed, LAX), [Fault::Broken], "{text}");
        }
        assert_eq!(faults(false, &seen(End::Cut, "abcx"), &[], LAX), [Fault::Broken], "up to a cut, too");
        assert_eq!(faults(false, &seen(End::Cut, "abcda"), &[], LAX), []);
    }

    #[test]
    fn what_gets_neither_an_answer_nor_an_error_is_lost() {
        assert_eq!(faults(false, &seen(End::Silent, ""), &[], LAX), [Fault::Lost]);
        assert_eq!(faults(false, &seen(End::Cut, "abcd"), &[], STRICT), [Fault::Lost]);
        let error = || End::Error("503 unavailable".to_owned());
        assert_eq!(faults(false, &seen(error(), ""), &[], LAX), []);
        assert_eq!(faults(false, &seen(error(), ""), &[], STRICT), [Fault::Broken]);
        assert_eq!(
            faults(true, &seen(error(), ""), &[], LAX),
            [Fault::Lost],
            "a key is asked with until there is an answer"
        );
    }

    #[test]
    fn second_bills_and_bills_for_what_was_not_read_are_doubled() {
        let (whole, billed) = (right().texts.concat(), job(JobStatus::Completed, Some(100)));
        let twice = [billed.clone(), job(JobStatus::Cancelled, Some(3))];
        assert_eq!(faults(false, &seen(End::Whole, &whole), &twice, LAX).first(), Some(&Fault::Doubled));
        let two_tries = Seen { tries: 2, ..seen(End::Whole, &whole) };
        assert_eq!(faults(false, &two_tries, &twice, LAX), [], "each try is a request of its own");
        assert!(faults(true, &two_tries, &twice, LAX).contains(&Fault::Doubled));
        assert!(faults(true, &seen(End::Whole, &whole), &[], LAX).contains(&Fault::Doubled), "a key without a bill");
        assert_eq!(faults(false, &seen(End::Cut, "abcd"), std::slice::from_ref(&billed), LAX), [Fault::Doubled]);
    }

    #[test]
    fn a_job_that_still_runs_is_stuck() {
        let whole = right().texts.concat();
        assert_eq!(faults(false, &seen(End::Whole, &whole), &[job(JobStatus::Running, None)], LAX), [Fault::Stuck]);
    }
}
