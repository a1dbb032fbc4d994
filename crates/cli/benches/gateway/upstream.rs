//! A server in the format of OpenAI that answers at once.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::time;

/// Between two events of a paced answer.
const PACE: Duration = Duration::from_millis(5);
/// An answer of more tokens than this is paced.
const AT_ONCE_MAX: u64 = 16;

/// Starts the server on a thread of its own.
pub(crate) fn start() -> SocketAddr {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            send.send(listener.local_addr().unwrap()).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let service = hyper::service::service_fn(async |request| Ok::<_, Infallible>(answer(request).await));
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
    });
    receive.recv().unwrap()
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

async fn answer(request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    match path.as_str() {
        "/v1/models" => json(r#"{"object":"list","data":[{"id":"bench","object":"model","max_model_len":32768}]}"#),
        "/health" | "/healthz" => json(r#"{"status":"ok"}"#),
        "/get_model_info" | "/model_info" => json(r#"{"model_path":"bench","is_generation":true}"#),
        "/get_server_info" | "/server_info" => json(r#"{"model_path":"bench","served_model_name":"bench"}"#),
        "/v1/chat/completions" => chat(&body),
        _ => Response::builder().status(404).body(full("{}")).unwrap(),
    }
}

fn chat(body: &[u8]) -> Response<Body> {
    let request: serde_json::Value = serde_json::from_slice(body).unwrap();
    let tokens = request["max_tokens"].as_u64().or(request["max_completion_tokens"].as_u64()).unwrap_or(1);
    if request["stream"] != true {
        return json(&format!(
            r#"{{"id":"c","object":"chat.completion","created":1,"model":"bench","choices":[{{"index":0,"message":{{"role":"assistant","content":"{}"}},"finish_reason":"length"}}],"usage":{{"prompt_tokens":9,"completion_tokens":{tokens},"total_tokens":{}}}}}"#,
            " word".repeat(tokens as usize),
            tokens + 9
        ));
    }
    let events = events(tokens).map(|event| Ok(Frame::data(Bytes::from(event))));
    let body = StreamBody::new(events).boxed_unsync();
    Response::builder().header("content-type", "text/event-stream").body(body).unwrap()
}

/// The events of a streamed answer: one for each token, then the end.
fn events(tokens: u64) -> impl Stream<Item = String> + Send {
    let event = |choice: &str| {
        format!(
            "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\",\"choices\":[{choice}]}}\n\n"
        )
    };
    let token = event(r#"{"index":0,"delta":{"content":" word"},"finish_reason":null}"#);
    let end = event(r#"{"index":0,"delta":{},"finish_reason":"length"}"#);
    let usage = format!(
        "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\",\"choices\":[],\"usage\":{{\"prompt_tokens\":9,\"completion_tokens\":{tokens},\"total_tokens\":{}}}}}\n\ndata: [DONE]\n\n",
        tokens + 9
    );
    let paced = stream::iter(0..tokens).then(move |_| {
        let token = token.clone();
        async move {
            if tokens > AT_ONCE_MAX {
                time::sleep(PACE).await;
            }
            token
        }
    });
    paced.chain(stream::iter([end, usage]))
}

fn json(text: &str) -> Response<Body> {
    Response::builder().header("content-type", "application/json").body(full(text)).unwrap()
}

fn full(text: &str) -> Body {
    Full::new(Bytes::from(text.to_owned())).boxed_unsync()
}
