//! `tether run`, against a gateway that does as it is told.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::program::Home;

const LOADING: &str = r#"{"error":{"message":"m@1.0 is being loaded, 12 % so far, try again","code":"model_loading"}}"#;
const FULL: &str = r#"{"error":{"message":"every worker is busy","code":"no_capacity"}}"#;
const RAW: &str = r#"{"error":{"message":"\u001b]0;title\u0007","code":"worker_failed"}}"#;
const ANSWER: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"yes\"}}]}\n\ndata: [DONE]\n\n";

/// A gateway whose answers are known beforehand.
struct Gateway {
    url: String,
    requests: Arc<Mutex<Vec<Value>>>,
}

impl Gateway {
    /// Refuses as often as there are refusals, and then answers.
    fn refusing(refusals: &[&'static str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let requests = Arc::<Mutex<Vec<Value>>>::default();
        let mut refusals: VecDeque<&'static str> = refusals.to_vec().into();
        let heard = requests.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &mut refusals, &heard);
            }
        });
        Self { url, requests }
    }

    fn requests(&self) -> Vec<Value> {
        self.requests.lock().clone()
    }

    /// Runs `tether run m`, with something on its stdin.
    fn ask(&self, arguments: &[&str], stdin: &str) -> Output {
        let home = Home::new();
        let mut command = home.command(&[&["run", "m", "--url", &self.url], arguments].concat());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        child.stdin.take().expect("piped").write_all(stdin.as_bytes()).expect("written");
        child.wait_with_output().expect("it ends")
    }
}

/// Reads a request whole; nothing where whoever connected left.
pub(crate) fn request(stream: &mut TcpStream) -> std::io::Result<Option<String>> {
    let mut request = String::new();
    let mut piece = [0; 4_096];
    let is_whole =
        |request: &str| request.starts_with("GET") && request.ends_with("\r\n\r\n") || !body_of(request).is_null();
    while !is_whole(&request) {
        match stream.read(&mut piece)? {
            0 => return Ok(None),
            length => request.push_str(&String::from_utf8_lossy(&piece[..length])),
        }
    }
    Ok(Some(request))
}

/// Returns the JSON of a request.
pub(crate) fn body_of(request: &str) -> Value {
    let body = request.split_once("\r\n\r\n").map(|(_, body)| body);
    body.and_then(|body| serde_json::from_str(body).ok()).unwrap_or_default()
}

fn answer(mut stream: TcpStream, refusals: &mut VecDeque<&str>, heard: &Mutex<Vec<Value>>) -> std::io::Result<()> {
    let Some(request) = request(&mut stream)? else { return Ok(()) };
    let (status, body) = match request.split(' ').nth(1) {
        Some("/healthz") => (200, r#"{"status":"ok"}"#),
        Some("/admin/v1/models" | "/v1/models") => (200, r#"{"data":[{"id":"m"}]}"#),
        _ => {
            heard.lock().push(body_of(&request));
            refusals.pop_front().map_or((200, ANSWER), |refusal| (503, refusal))
        }
    };
    let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes())
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_question_waits_for_a_model_that_is_being_loaded() {
    let gateway = Gateway::refusing(&[LOADING]);
    let output = gateway.ask(&["Well?"], "");
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert_eq!(output.stdout, b"yes\n");
    assert_eq!(errors(&output).matches("being loaded, 12 %").count(), 1, "{}", errors(&output));
    assert_eq!(gateway.requests().len(), 2);

    let output = Gateway::refusing(&[LOADING]).ask(&["Well?", "--timeout", "0"], "");
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("503"), "{}", errors(&output));
    let busy = Gateway::refusing(&[FULL]);
    assert_eq!(busy.ask(&["Well?"], "").status.code(), Some(2));
    assert_eq!(busy.requests().len(), 1, "only a load is waited for");
}

#[test]
fn an_error_cannot_change_the_terminal() {
    let output = Gateway::refusing(&[RAW]).ask(&["Well?"], "");
    assert!(errors(&output).contains("\\u{1b}]0;title\\u{7}"), "{}", errors(&output));
    assert!(!output.stderr.contains(&0x1b), "{}", errors(&output));
}

#[test]
fn a_prompt_comes_from_the_line_from_stdin_or_from_both() {
    let user = |text: &str| json!({ "role": "user", "content": text });
    for (arguments, stdin, messages) in [
        (&["sum up:"][..], "a\nb\n", json!([user("sum up:\n\na\nb")])),
        (&["-"], "a\n", json!([user("a")])),
        (&[], "a", json!([user("a")])),
        (&["a", "--system", "Be brief."], "", json!([{ "role": "system", "content": "Be brief." }, user("a")])),
    ] {
        let gateway = Gateway::refusing(&[]);
        let output = gateway.ask(arguments, stdin);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", errors(&output));
        assert_eq!(gateway.requests()[0]["messages"], messages, "{arguments:?}");
    }
    let gateway = Gateway::refusing(&[]);
    let output = gateway.ask(&["-"], "");
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("the prompt is empty"), "{}", errors(&output));
    assert!(gateway.requests().is_empty());
}
