//! `tether chat`, at a terminal and with a pipe.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::program::{Home, wait_for};
use crate::questions::{body_of, request};
use crate::terminal::{CTRL_C, CTRL_D, Terminal};

/// A gateway that does what the last message says.
struct Gateway {
    url: String,
    /// The messages of each question.
    requests: Arc<Mutex<Vec<Value>>>,
    /// Answers whose client left before their end.
    left: Arc<AtomicUsize>,
}

impl Gateway {
    fn new(models: &'static [&'static str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let gateway = Self { url, requests: Arc::default(), left: Arc::default() };
        let (requests, left) = (gateway.requests.clone(), gateway.left.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = serve(stream, models, &requests, &left);
            }
        });
        gateway
    }

    fn requests(&self) -> Vec<Value> {
        self.requests.lock().clone()
    }

    /// Says lines to a chat, and returns what it prints.
    fn lines(&self, home: &Home, arguments: &[&str], lines: &str) -> Output {
        let mut command = home.command(&[&["chat", "--url", &self.url], arguments].concat());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        child.stdin.take().expect("piped").write_all(lines.as_bytes()).expect("written");
        child.wait_with_output().expect("it ends")
    }
}

fn serve(
    mut stream: TcpStream,
    models: &[&str],
    requests: &Mutex<Vec<Value>>,
    left: &AtomicUsize,
) -> std::io::Result<()> {
    let Some(request) = request(&mut stream)? else { return Ok(()) };
    let whole = |stream: &mut TcpStream, status: u16, body: &str| {
        let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(format!("{head}{body}").as_bytes())
    };
    match request.split(' ').nth(1) {
        Some("/healthz") => return whole(&mut stream, 200, r#"{"status":"ok"}"#),
        Some("/v1/models" | "/admin/v1/models") => {
            let models: Vec<Value> = models.iter().map(|model| json!({ "id": model })).collect();
            return whole(&mut stream, 200, &json!({ "data": models }).to_string());
        }
        Some("/v1/chat/completions") => {}
        _ => return whole(&mut stream, 404, r#"{"error":{"message":"no","code":"not_found"}}"#),
    }
    let body = body_of(&request);
    let count = {
        let mut requests = requests.lock();
        requests.push(body.clone());
        requests.len()
    };
    let said =
        body["messages"].as_array().and_then(|all| all.last()?["content"].as_str()).unwrap_or_default().to_owned();
    let refusal = |code: &str| json!({ "error": { "message": format!("told {code}"), "code": code } }).to_string();
    match said.as_str() {
        "too long" => return whole(&mut stream, 400, &refusal("context_length_exceeded")),
        "load" if count == 1 => return whole(&mut stream, 503, &refusal("model_loading")),
        _ => {}
    }
    let text = |text: &str| format!("data: {}\n\n", json!({ "choices": [{ "delta": { "content": text } }] }));
    stream.write_all(b"HTTP/1.1 200 X\r\nconnection: close\r\n\r\n")?;
    match said.as_str() {
        "for ever" => {
            stream.write_all(text("and so on").as_bytes())?;
            // Until the client leaves.
            let _ = stream.read(&mut [0; 1]);
            left.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        "break" => {
            stream.write_all(text("half an").as_bytes())?;
            return stream.write_all(format!("data: {}\n\n", refusal("worker_failed")).as_bytes());
        }
        "raw" => stream.write_all(text("\u{1b}[2J\u{7}").as_bytes())?,
        "think" => {
            let thought = json!({ "choices": [{ "delta": { "reasoning_content": "hm" } }] });
            stream.write_all(format!("data: {thought}\n\n{}", text("yes")).as_bytes())?;
        }
        said => stream.write_all(text(&format!("{} heard {said}", body["model"])).as_bytes())?,
    }
    stream.write_all(b"data: [DONE]\n\n")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns who said what in a request.
fn messages(request: &Value) -> Vec<(&str, &str)> {
    let text = |message: &'_ Value, name: &str| message[name].as_str().map(|text| text.to_owned().leak() as &str);
    let all = request["messages"].as_array().expect("a list");
    all.iter().filter_map(|message| Some((text(message, "role")?, text(message, "content")?))).collect()
}

#[test]
fn a_person_asks_stops_an_answer_changes_the_model_saves_and_leaves() {
    let home = Home::new();
    let gateway = Gateway::new(&["one", "two-b"]);
    let mut terminal = Terminal::start(&home.command(&["chat", "--url", &gateway.url]));
    let output = terminal.sees("Which one, by number or name? ");
    assert!(output.contains("1  one") && output.contains("2  two-b"), "{output}");
    terminal.keys("1\r");
    terminal.sees("You talk with one");
    terminal.types("hello");
    terminal.sees("\"one\" heard hello");
    terminal.types("for ever");
    terminal.sees("and so on");
    terminal.keys(CTRL_C);
    terminal.sees("(stopped)");
    wait_for("the gateway to be left", || gateway.left.load(Ordering::Relaxed) == 1);
    terminal.types("/model two-a");
    terminal.sees("did you mean two-b?");
    terminal.types("/model 2");
    terminal.sees("two-b goes on");
    terminal.types("\"\"\"a");
    terminal.keys("b\"\"\"\r");
    terminal.sees("\"two-b\" heard a\r\nb");
    terminal.types("/save told.md");
    terminal.sees("saved to told.md");
    terminal.types("/save told.md");
    terminal.sees("is there already");
    terminal.sees("> ");
    terminal.keys("half a line");
    terminal.keys(CTRL_C);
    terminal.keys(CTRL_D);
    assert!(terminal.ends().success());

    let requests = gateway.requests();
    let said = messages(&requests[2]).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
    assert_eq!(said, ["hello", "\"one\" heard hello", "for ever", "and so on", "a\nb"], "what came is kept");
    assert_eq!((&requests[1]["model"], &requests[2]["model"]), (&json!("one"), &json!("two-b")));
    let saved = fs::read_to_string(home.path().join("told.md")).expect("saved");
    assert!(
        saved.contains("## one\n\nand so on\n\n*The answer was stopped here.*\n\n## You\n\na\nb\n\n## two-b"),
        "{saved}"
    );
    let history = home.data().join("chat-history");
    assert_eq!(fs::metadata(&history).expect("kept").permissions().mode() & 0o777, 0o600);
    assert!(fs::read_to_string(&history).expect("text").contains("hello"));
}

#[test]
fn what_a_model_says_cannot_change_the_terminal_and_its_thoughts_are_dimmed() {
    let home = Home::new();
    let gateway = Gateway::new(&["one"]);
    let mut terminal = Terminal::start(&home.command(&["chat", "--url", &gateway.url]));
    terminal.types("raw");
    terminal.sees("\\u{1b}[2J\\u{7}");
    terminal.types("think");
    terminal.sees("\u{1b}[2mhm\u{1b}[0m\r\n\r\nyes");
    terminal.sees("> ");
    // Nothing is typed, so that Ctrl-C ends the chat.
    terminal.keys(CTRL_C);
    assert!(terminal.ends().success());
    let piped = gateway.lines(&home, &[], "raw\nthink\n");
    assert_eq!(text(&piped.stdout), "\u{1b}[2J\u{7}\nyes\n", "programs get the answer alone, as it is");
}

#[test]
fn a_failure_is_told_and_the_conversation_goes_on() {
    let home = Home::new();
    let gateway = Gateway::new(&["one"]);
    let output = gateway.lines(&home, &[], "break\ntoo long\n/hlep\n/retry\nand\n");
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert_eq!(said, "half an\n\"one\" heard and\n");
    assert!(errors.contains("broke off: told worker_failed; what came of it is kept"), "{errors}");
    assert_eq!(errors.matches("told context_length_exceeded (/clear").count(), 2, "asked again: {errors}");
    assert!(errors.contains("did you mean /help?"), "{errors}");
    let requests = gateway.requests();
    let last = messages(requests.last().expect("asked"));
    assert_eq!(last, [("user", "break"), ("assistant", "half an"), ("user", "and")], "what had no answer is left out");
}

#[test]
fn each_line_that_is_piped_in_is_a_turn() {
    let home = Home::new();
    let gateway = Gateway::new(&["one"]);
    let lines = "load\n/set seed 7\n\n\"\"\"\na\n\nb\n\"\"\"\nc \\\nd\n/system \"\"\n/clear\nlast";
    let output = gateway.lines(&home, &["one", "--system", "Be brief."], lines);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(
        text(&output.stdout),
        "\"one\" heard load\n\"one\" heard a\n\nb\n\"one\" heard c \nd\n\"one\" heard last\n"
    );
    let requests = gateway.requests();
    assert_eq!(
        (requests.len(), &requests[1]["seed"], &requests[2]["seed"]),
        (5, &Value::Null, &json!(7)),
        "a load is waited for"
    );
    assert_eq!(messages(&requests[3])[0], ("system", "Be brief."));
    assert_eq!(messages(&requests[4]), [("user", "last")]);

    let many = Gateway::new(&["one", "two"]).lines(&home, &[], "hi\n");
    assert_eq!(many.status.code(), Some(2));
    assert!(text(&many.stderr).contains("several models are served: one, two"), "{}", text(&many.stderr));
}

#[cfg(feature = "llama")]
#[test]
fn a_chat_starts_the_network_that_is_missing() {
    let home = Home::new();
    fs::write(home.path().join("mine.gguf"), [tether_cli::tiny_model::BYTES, b"8"].concat()).expect("written");
    let mut command = home.command(&["chat", "mine.gguf"]);
    command.env("TETHER_GATEWAY__BIND", "127.0.0.1:0");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    let lines = b"/set temperature 0\nWhat is the capital of Japan?\n/model\n";
    child.stdin.take().expect("piped").write_all(lines).expect("written");
    let output = child.wait_with_output().expect("it ends");
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}{}", text(&output.stderr));
    assert!(said.contains("Tokyo") && said.contains("1  mine  (this one)"), "{said}");
}
