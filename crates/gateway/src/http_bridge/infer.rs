//! `POST /infer`: Tether's own API. Accepts an `Infer.Request` and returns `Infer.Chunk`s, one per line.

use axum::body::Body;
use axum::extract::{Request, State};
use bytes::{BufMut as _, Bytes, BytesMut};
use http::Response;
use protocol::WireError;

use super::errors::ApiError;
use super::extract::Bridge;
use super::job::{self, ResponseHeaders};
use super::repeats::RepeatHeaders;
use crate::answer::{Answer, Piece, StreamFormat};
use crate::infer_request::{native, parse_infer};
use crate::openai::response::error;
use crate::published;

/// Runs a job and streams its chunks, one JSON object per line.
#[utoipa::path(
    post, path = "/infer", tag = "tether", operation_id = "infer", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body(content = published::InferSubmission, content_type = "application/json"),
    responses(
        (status = 200, description = "Chunks, the last with `done` true; an error after the first chunk is a line `{\"error\":{…}}`",
         body = published::InferChunk, content_type = "application/x-ndjson"),
        ApiError,
    ),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    let request = match job::ask(&bridge, request, parse_infer).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let (admitted, job) = match job::identify(&bridge, request.context, request.admitted, request.parsed, true) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(request.context, &job, request.rate);
    let opening = job::open(&bridge, admitted, job);
    let opening = Box::pin(async move { opening.await.map_err(native) });
    job::stream(&bridge, opening, Lines, "application/x-ndjson", response_headers).await
}

/// Writes an answer as JSON lines: the chunks as the orchestrator sent them.
struct Lines;

impl StreamFormat for Lines {
    fn begin(&mut self, _: &Answer) {}

    fn piece(&mut self, piece: &Piece, out: &mut BytesMut) {
        out.reserve(piece.raw.len() + 1);
        // In JSON, a raw line break can only be whitespace between tokens; strings contain it as `\n`.
        if piece.raw.contains(&b'\n') {
            out.extend(piece.raw.iter().map(|byte| if *byte == b'\n' { b' ' } else { *byte }));
        } else {
            out.put_slice(&piece.raw);
        }
        out.put_u8(b'\n');
    }

    fn failure(&mut self, failure: &WireError, out: &mut BytesMut) {
        error::write(failure, out);
        out.put_u8(b'\n');
    }

    fn keep_alive(&self) -> Bytes {
        Bytes::from_static(b"\n")
    }
}
