//! Programs that listen where the gateway of a data folder does or did: they are not shown the folder's API key.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;

use crate::program::Home;

const KEY: &str = "tth_live_the-key-of-the-folder";

/// Says that it is alive and proves nothing.
struct Impostor {
    url: String,
    heard: Arc<Mutex<String>>,
}

impl Impostor {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let heard = Arc::<Mutex<String>>::default();
        let ears = heard.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let ears = ears.clone();
                thread::spawn(move || drop(answer(stream, &ears)));
            }
        });
        Self { url, heard }
    }

    fn has_heard_the_key(&self) -> bool {
        self.heard.lock().contains(KEY)
    }
}

/// Answers every request of a connection with what a gateway says to `/healthz`, and a made-up proof.
fn answer(mut stream: TcpStream, ears: &Mutex<String>) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        ears.lock().push_str(&String::from_utf8_lossy(&buffer[..count]));
        let body = format!("{{\"status\":\"ok\",\"proof\":\"{}\"}}", "00".repeat(32));
        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    }
}

/// Writes the key of a folder whose network has ended, and where it ran.
fn folder(home: &Home, url: &str, has_secret: bool) {
    std::fs::create_dir_all(home.data()).expect("made");
    let write = |name: &str, bytes: &[u8]| std::fs::write(home.data().join(name), bytes).expect("written");
    write("api-key", KEY.as_bytes());
    write("address", url.as_bytes());
    if has_secret {
        write("gateway.secret", &[7; 32]);
    }
}

const COMMANDS: [&[&str]; 12] = [
    &["run", "tether-tiny", "hi"],
    &["chat", "tether-tiny"],
    &["token", "list"],
    &["token", "create"],
    &["doctor"],
    &["nodes"],
    &["model", "list"],
    &["model", "show", "tether-tiny"],
    &["model", "load", "tether-tiny"],
    &["model", "adapter", "list"],
    &["invite"],
    &["revoke", "garage"],
];

#[test]
fn no_command_shows_the_folders_key_to_another_program() {
    for has_secret in [true, false] {
        for arguments in COMMANDS {
            let (home, impostor) = (Home::apart(), Impostor::start());
            folder(&home, &impostor.url, has_secret);
            let output = home.command(arguments).stdin(Stdio::null()).output().expect("the program runs");
            assert!(!impostor.has_heard_the_key(), "{arguments:?} showed it: {output:?}");
        }
    }
}

#[test]
fn a_stale_address_is_told_with_what_to_do() {
    let (home, impostor) = (Home::apart(), Impostor::start());
    folder(&home, &impostor.url, true);
    for arguments in [&["run", "tether-tiny", "hi"][..], &["nodes"], &["model", "list"]] {
        let output = home.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        for part in [impostor.url.as_str(), "is not the gateway of", "--bind", "--data-dir", "--api-key-file"] {
            assert!(error.contains(part), "{arguments:?}: {error}");
        }
    }
    let doctor = home.run(&["doctor"]);
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("is not the gateway of"), "{doctor:?}");
}

#[test]
fn whoever_names_a_gateway_is_taken_at_their_word() {
    let (home, impostor) = (Home::apart(), Impostor::start());
    folder(&home, &impostor.url, true);
    home.run(&["nodes", "--url", &impostor.url]);
    assert!(impostor.has_heard_the_key(), "{}", impostor.heard.lock());
}

#[test]
fn a_key_that_the_user_names_is_not_shown_at_the_folders_address_without_a_proof() {
    let (home, impostor) = (Home::apart(), Impostor::start());
    folder(&home, &impostor.url, true);
    let mut nodes = home.command(&["nodes"]);
    let output = nodes.env("TETHER_API_KEY", KEY).output().expect("the program runs");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!impostor.has_heard_the_key(), "{}", impostor.heard.lock());
}

#[cfg(feature = "llama")]
#[test]
fn a_network_that_has_ended_leaves_no_address() {
    let home = Home::new();
    let up = home.up(&[]);
    assert!(home.data().join("address").exists() && home.data().join("gateway.secret").exists());
    assert_eq!(up.end(), Some(0));
    assert!(!home.data().join("address").exists());
}
