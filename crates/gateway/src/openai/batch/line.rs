//! The lines of a batch's files: requests, and their results.

use std::collections::HashSet;

use protocol::batches::{BatchError, ERRORS_MAX, LINES_MAX};
use protocol::{CorrelationId, Digest};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::BatchEndpoint;

/// The longest id that a client may give a line, in bytes.
const CUSTOM_ID_BYTES_MAX: usize = 512;

/// A request of a batch.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) custom_id: String,
    pub(crate) body: Box<RawValue>,
}

#[derive(Deserialize)]
struct RawLine {
    custom_id: Option<String>,
    method: Option<String>,
    url: Option<String>,
    body: Option<Box<RawValue>>,
}

/// The part of a body that all lines have in common.
#[derive(Deserialize)]
struct Named {
    model: Option<String>,
}

/// Why a line cannot be a request of its batch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LineFault {
    code: &'static str,
    message: String,
    param: Option<&'static str>,
}

impl LineFault {
    fn new(code: &'static str, param: impl Into<Option<&'static str>>, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: param.into() }
    }
}

/// Parses a line. Its body is checked when it runs.
pub(crate) fn parse_line(bytes: &[u8], endpoint: BatchEndpoint) -> Result<Line, LineFault> {
    let raw: RawLine = serde_json::from_slice(bytes)
        .map_err(|_| LineFault::new("invalid_json_line", None, "this line is not a JSON object of a request"))?;
    let lacks = |param| LineFault::new("missing_required_parameter", param, format!("{param} is missing"));
    let custom_id = raw.custom_id.filter(|id| !id.is_empty()).ok_or_else(|| lacks("custom_id"))?;
    if custom_id.len() > CUSTOM_ID_BYTES_MAX {
        let message = format!("custom_id is longer than {CUSTOM_ID_BYTES_MAX} bytes");
        return Err(LineFault::new("invalid_custom_id", "custom_id", message));
    }
    if raw.method.ok_or_else(|| lacks("method"))? != "POST" {
        return Err(LineFault::new("invalid_method", "method", "method must be POST"));
    }
    let path = endpoint.path();
    if raw.url.ok_or_else(|| lacks("url"))? != path {
        let message = format!("url must be the endpoint of the batch, {path}");
        return Err(LineFault::new("invalid_url", "url", message));
    }
    Ok(Line { custom_id, body: raw.body.ok_or_else(|| lacks("body"))? })
}

/// Splits a file into its lines, whatever pieces it comes in.
#[derive(Debug, Default)]
pub(crate) struct LineSplitter {
    buffer: Vec<u8>,
    /// Bytes at the beginning of the buffer that were returned already.
    taken: usize,
    number: u32,
}

impl LineSplitter {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next complete line that is not blank, and its number from 1.
    pub(crate) fn next(&mut self) -> Option<(u32, &[u8])> {
        loop {
            let length = self.buffer[self.taken..].iter().position(|byte| *byte == b'\n')?;
            let start = self.taken;
            self.taken += length + 1;
            self.number = self.number.saturating_add(1);
            if !is_blank(&self.buffer[start..start + length]) {
                return Some((self.number, without_mark(&self.buffer[start..start + length])));
            }
        }
    }

    /// Returns the length of the line that has begun.
    pub(crate) fn pending(&self) -> usize {
        self.buffer.len() - self.taken
    }
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}

/// Returns a line without the byte order mark that some editors put before the first.
fn without_mark(line: &[u8]) -> &[u8] {
    line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line)
}

/// Checks the lines of a file against each other.
pub(crate) struct FileCheck {
    endpoint: BatchEndpoint,
    /// Digests of the ids of the lines so far.
    ids: HashSet<Digest>,
    model: Option<String>,
    total: u32,
    errors: Vec<BatchError>,
}

/// A file whose lines may run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CheckedFile {
    /// How many requests it has.
    pub(crate) total: u32,
    /// The model that all lines ask for.
    pub(crate) model: String,
}

impl FileCheck {
    pub(crate) fn new(endpoint: BatchEndpoint) -> Self {
        Self { endpoint, ids: HashSet::new(), model: None, total: 0, errors: vec![] }
    }

    /// Returns whether enough is wrong with the file that the rest does not matter.
    pub(crate) fn has_failed(&self) -> bool {
        self.errors.len() >= ERRORS_MAX || self.total > LINES_MAX
    }

    pub(crate) fn add(&mut self, number: u32, bytes: &[u8]) {
        self.total = self.total.saturating_add(1);
        if let Err(LineFault { code, message, param }) = self.check(bytes) {
            let param = param.map(str::to_owned);
            self.errors.push(BatchError { code: code.to_owned(), message, param, line: Some(number) });
        }
    }

    fn check(&mut self, bytes: &[u8]) -> Result<(), LineFault> {
        let line = parse_line(bytes, self.endpoint)?;
        if !self.ids.insert(Digest::of(line.custom_id.as_bytes())) {
            let message = "another line of the file has this custom_id";
            return Err(LineFault::new("duplicate_custom_id", "custom_id", message));
        }
        let named: Named = serde_json::from_str(line.body.get())
            .map_err(|_| LineFault::new("invalid_body", "body", "body must be an object that names a model"))?;
        let lacks = || LineFault::new("missing_required_parameter", "body.model", "body.model is missing");
        let model = named.model.ok_or_else(lacks)?;
        let first = self.model.get_or_insert_with(|| model.clone());
        if *first != model {
            let message = format!("all lines must ask for one model, and the first line asks for {first}");
            return Err(LineFault::new("mismatched_model", "body.model", message));
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<CheckedFile, Vec<BatchError>> {
        let whole = |code: &str, message: String| BatchError { code: code.into(), message, param: None, line: None };
        if self.total > LINES_MAX {
            self.errors.push(whole("too_many_requests", format!("the file has more than {LINES_MAX} requests")));
        }
        match self.model {
            Some(model) if self.errors.is_empty() => Ok(CheckedFile { total: self.total, model }),
            None if self.errors.is_empty() => Err(vec![whole("empty_file", "the file has no request".into())]),
            _ => Err(self.errors),
        }
    }
}

/// What became of a line.
pub(crate) enum LineOutcome<'a> {
    /// The status and the body of the response.
    Response { status: u16, body: &'a RawValue },
    /// It was never run.
    Error { code: &'a str, message: &'a str },
}

#[derive(Serialize)]
struct ResultLine<'a> {
    id: String,
    custom_id: &'a str,
    response: Option<LineResponse<'a>>,
    error: Option<LineError<'a>>,
}

#[derive(Serialize)]
struct LineResponse<'a> {
    status_code: u16,
    request_id: String,
    body: &'a RawValue,
}

#[derive(Serialize)]
struct LineError<'a> {
    code: &'a str,
    message: &'a str,
}

/// Writes a line of a result file.
pub(crate) fn write_result(job: CorrelationId, custom_id: &str, outcome: &LineOutcome<'_>) -> Vec<u8> {
    let (response, error) = match outcome {
        LineOutcome::Response { status, body } => {
            (Some(LineResponse { status_code: *status, request_id: job.to_string(), body }), None)
        }
        LineOutcome::Error { code, message } => (None, Some(LineError { code, message })),
    };
    let line = ResultLine { id: format!("batch_req_{}", job.0.simple()), custom_id, response, error };
    let mut written = serde_json::to_vec(&line).expect("texts and JSON are JSON");
    written.push(b'\n');
    written
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn line(id: &str, model: &str) -> Value {
        json!({"custom_id": id, "method": "POST", "url": "/v1/embeddings", "body": {"model": model, "input": "x"}})
    }

    fn check(lines: &[String]) -> Result<CheckedFile, Vec<BatchError>> {
        let mut check = FileCheck::new(BatchEndpoint::Embeddings);
        for (number, line) in (1..).zip(lines) {
            check.add(number, line.as_bytes());
        }
        check.finish()
    }

    #[test]
    fn a_file_of_requests_to_one_model_is_well() {
        let lines = [line("a", "tiny").to_string(), line("b", "tiny").to_string()];
        assert_eq!(check(&lines), Ok(CheckedFile { total: 2, model: "tiny".into() }));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_told_by_line() {
        let mut faults = vec![line("a", "tiny"), line("a", "tiny"), line("c", "other")];
        for (field, value) in [("method", json!("GET")), ("url", json!("/v1/x")), ("body", json!(null))] {
            let mut faulty = line(field, "tiny");
            faulty[field] = value;
            faults.push(faulty);
        }
        let mut lines: Vec<String> = faults.iter().map(Value::to_string).collect();
        lines.push("{".into());
        let errors = check(&lines).expect_err("invalid");
        let told: Vec<_> = errors.iter().map(|error| (error.line, &*error.code)).collect();
        let expected = [
            (Some(2), "duplicate_custom_id"),
            (Some(3), "mismatched_model"),
            (Some(4), "invalid_method"),
            (Some(5), "invalid_url"),
            (Some(6), "missing_required_parameter"),
            (Some(7), "invalid_json_line"),
        ];
        assert_eq!(told, expected);
        assert_eq!(check(&[]).expect_err("empty")[0].code, "empty_file");
    }

    #[test]
    fn a_file_with_too_many_lines_or_errors_is_read_no_further() {
        let mut check = FileCheck::new(BatchEndpoint::Embeddings);
        for number in 1..=LINES_MAX {
            check.add(number, line(&number.to_string(), "tiny").to_string().as_bytes());
        }
        assert!(!check.has_failed());
        check.add(LINES_MAX + 1, line("more", "tiny").to_string().as_bytes());
        assert!(check.has_failed());
        assert_eq!(check.finish().expect_err("too many")[0].code, "too_many_requests");
        let mut check = FileCheck::new(BatchEndpoint::Embeddings);
        (1..=ERRORS_MAX as u32).for_each(|number| check.add(number, b"?"));
        assert!(check.has_failed());
    }

    #[test]
    fn a_result_is_one_line_with_its_custom_id() {
        let body = RawValue::from_string("{\"a\":\"\\n\"}".into()).expect("JSON");
        let job = CorrelationId(uuid::Uuid::from_u128(7));
        let written = write_result(job, "q\"1", &LineOutcome::Response { status: 200, body: &body });
        assert_eq!(written.split(|byte| *byte == b'\n').count(), 2, "one end of a line");
        let read: Value = serde_json::from_slice(&written).expect("JSON");
        assert_eq!((&read["custom_id"], &read["response"]["status_code"]), (&json!("q\"1"), &json!(200)));
        let expired = write_result(job, "a", &LineOutcome::Error { code: "batch_expired", message: "over" });
        let read: Value = serde_json::from_slice(&expired).expect("JSON");
        assert_eq!((&read["response"], &read["error"]["code"]), (&Value::Null, &json!("batch_expired")));
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_the_file_is_cut(
            file in "[a\u{e9}\n\r ]{0,60}",
            cuts in prop::collection::vec(0_usize..80, 0..6),
        ) {
            // What has no end is no line yet.
            let ends = file.rfind('\n').map_or("", |end| &file[..end]);
            let whole: Vec<(u32, String)> = (1..).zip(ends.split('\n').map(str::to_owned))
                .filter(|(_, line)| !is_blank(line.as_bytes())).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(file.len())).collect();
            cuts.extend([0, file.len()]);
            cuts.sort_unstable();
            let (mut splitter, mut lines) = (LineSplitter::default(), vec![]);
            for ends in cuts.windows(2) {
                splitter.push(&file.as_bytes()[ends[0]..ends[1]]);
                while let Some((number, line)) = splitter.next() {
                    lines.push((number, String::from_utf8(line.to_vec()).expect("UTF-8")));
                }
            }
            prop_assert_eq!(lines, whole);
        }

        #[test]
        fn no_line_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_line(&bytes, BatchEndpoint::Chat);
        }
    }
}
