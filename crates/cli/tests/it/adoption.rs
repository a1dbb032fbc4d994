//! `tether up --adopt`, where the server comes later.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use crate::program::{Home, wait_for};

const MODELS: &str = r#"{"data":[{"id":"Org/Late","owned_by":"vllm","max_model_len":2048}]}"#;
const ANSWER: &str = concat!(
    "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"better late\"}}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n",
);

/// Answers as vLLM does, one request a connection, until the test's process ends.
fn serve(address: SocketAddr) {
    let listener = TcpListener::bind(address).expect("the port is free again");
    thread::spawn(move || listener.incoming().flatten().for_each(answer));
}

fn answer(mut stream: TcpStream) {
    let mut request = String::new();
    let mut piece = [0; 4_096];
    // What is sent to it ends with a brace, or is a head without a body.
    while !(request.ends_with('}') || (request.starts_with("GET") && request.ends_with("\r\n\r\n"))) {
        match stream.read(&mut piece) {
            Ok(length) if length > 0 => request.push_str(&String::from_utf8_lossy(&piece[..length])),
            _ => return,
        }
    }
    let (status, body) = match request.split(' ').nth(1) {
        Some("/v1/models") => (200, MODELS),
        Some("/v1/chat/completions") => (200, ANSWER),
        _ => (404, "{}"),
    };
    let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    // A client that left needs no answer.
    let _ = stream.write_all(format!("{head}{body}").as_bytes());
}

#[cfg(feature = "llama")]
#[test]
fn a_network_stands_at_once_and_adopts_a_server_that_comes_later() {
    let home = Home::new();
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    // Returns once the gateway answers and the shipped model is ready.
    let up = home.up_with(&["--adopt", &format!("http://{free}")], &[]);
    let absent = home.run(&["run", "late", "Well?"]);
    assert_eq!(absent.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("there is no model"));
    serve(free);
    wait_for("the server to be adopted", || home.well(&["list"]).contains("late"));
    wait_for("its model to be ready", || home.well(&["nodes"]).contains("late@1.0 ready"));
    assert_eq!(home.well(&["run", "late", "Well?"]).trim(), "better late");
    assert!(home.well(&["run", "tether-tiny", "What is 3 + 4?", "--temperature", "0"]).contains('7'));
    assert_eq!(up.end(), Some(0));
}

#[test]
fn a_network_that_waits_for_a_server_can_be_stopped_and_says_what_it_waits_for() {
    let home = Home::new();
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let log = std::fs::File::create(home.path().join("out")).expect("a file");
    let mut up = home
        .command(&["up", "--bind", "127.0.0.1:0", "--workers", "0", "--adopt", &format!("http://{free}")])
        .stdout(log)
        .spawn()
        .expect("the program starts");
    let told = || std::fs::read_to_string(home.path().join("out")).unwrap_or_default();
    wait_for("the banner", || told().contains("Ctrl-C stops it"));
    assert!(told().contains(&format!("No server to adopt answers yet at http://{free}")), "{}", told());
    crate::program::signal(up.id(), rustix::process::Signal::TERM);
    assert!(up.wait().expect("ended").success());
}
