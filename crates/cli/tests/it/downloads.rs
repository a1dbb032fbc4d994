//! Models from the web and the Hub, by the program and a server of the test.

#![cfg(feature = "llama")]

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tether_cli::tiny_model;

use crate::program::Home;

/// A request as the server saw it.
#[derive(Debug, Clone, Default)]
struct Received {
    path: String,
    headers: HashMap<String, String>,
}

impl Received {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn range(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What the server says.
struct Said {
    head: String,
    body: Vec<u8>,
}

impl Said {
    fn new(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
        for (name, value) in headers {
            head = format!("{head}{name}: {value}\r\n");
        }
        if !headers.iter().any(|(name, _)| *name == "content-length" || *name == "transfer-encoding") {
            head = format!("{head}content-length: {}\r\n", body.len());
        }
        Self { head, body: body.to_vec() }
    }

    /// A whole file, or its end where that is asked for and the file is the same.
    fn file(request: &Received, bytes: &[u8], etag: &str) -> Self {
        let is_same = request.header("if-range").is_none_or(|known| known == etag);
        match request.range().filter(|_| is_same) {
            Some(from) if from >= bytes.len() => {
                let range = format!("bytes */{}", bytes.len());
                Self::new("416 Range Not Satisfiable", &[("content-range", &range)], b"")
            }
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                Self::new("206 Partial Content", &[("content-range", &range), ("etag", etag)], &bytes[from..])
            }
            None => Self::new("200 OK", &[("etag", etag)], bytes),
        }
    }

    fn redirect(to: &str) -> Self {
        Self::new("302 Found", &[("location", to)], b"")
    }

    /// Says that all would come, and ends before.
    fn cut(mut self, after: usize) -> Self {
        self.body.truncate(after);
        self
    }
}

/// A server that answers each request as a function says, and remembers it.
struct Server {
    url: String,
    requests: Arc<Mutex<Vec<Received>>>,
}

impl Server {
    fn new(answer: impl Fn(&Received, usize) -> Said + Send + Sync + 'static) -> Self {
        Self::start("http", answer, |stream, answer, seen| serve(stream, answer, seen))
    }

    /// The same over TLS, with a certificate of an authority that nobody knows.
    fn secure(
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
        answer: impl Fn(&Received, usize) -> Said + Send + Sync + 'static,
    ) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .expect("a certificate and its key");
        let config = Arc::new(config);
        Self::start("https", answer, move |stream, answer, seen| {
            let connection = rustls::ServerConnection::new(config.clone()).expect("a connection");
            let mut stream = rustls::StreamOwned::new(connection, stream);
            serve(&mut stream, answer, seen);
            stream.conn.send_close_notify();
            let _ = stream.flush();
        })
    }

    fn start(
        scheme: &str,
        answer: impl Fn(&Received, usize) -> Said + Send + Sync + 'static,
        speak: impl Fn(TcpStream, &dyn Fn(&Received, usize) -> Said, &Mutex<Vec<Received>>) + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("{scheme}://{}", listener.local_addr().expect("bound"));
        let requests: Arc<Mutex<Vec<Received>>> = Arc::default();
        let (both, seen) = (Arc::new((answer, speak)), requests.clone());
        // It ends with the process of the test.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (both, seen) = (both.clone(), seen.clone());
                thread::spawn(move || (both.1)(stream, &both.0, &seen));
            }
        });
        Self { url, requests }
    }

    fn requests(&self) -> Vec<Received> {
        self.requests.lock().clone()
    }
}

fn serve(mut stream: impl Read + Write, answer: &dyn Fn(&Received, usize) -> Said, seen: &Mutex<Vec<Received>>) {
    let (mut head, mut byte) = (vec![], [0]);
    while !head.ends_with(b"\r\n\r\n") {
        // Whoever does not trust the certificate leaves.
        let Ok(1) = stream.read(&mut byte) else { return };
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("text");
    let mut lines = head.lines();
    let path = lines.next().and_then(|first| first.split(' ').nth(1)).unwrap_or_default().to_owned();
    let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let request = Received { path, headers: lines.filter_map(header).collect() };
    let number = {
        let mut seen = seen.lock();
        seen.push(request.clone());
        seen.iter().filter(|before| before.path == request.path).count()
    };
    let said = answer(&request, number);
    // Whoever has enough leaves.
    let _ = stream.write_all(format!("{}\r\n", said.head).as_bytes());
    let _ = stream.write_all(&said.body);
    let _ = stream.flush();
}

/// A model of its own digest.
fn model() -> Vec<u8> {
    [tiny_model::BYTES, &vec![7; 100_000]].concat()
}

fn run(home: &Home, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = home.command(&[&["model", "add"], arguments].concat());
    command.envs(variables.iter().copied()).output().expect("the program runs")
}

fn well(home: &Home, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let output = run(home, arguments, variables);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{errors}");
    String::from_utf8(output.stdout).expect("text")
}

fn refused(home: &Home, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let output = run(home, arguments, variables);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).expect("text")
}

/// Returns the SHA-256 of some bytes, as the system's own program makes it.
fn digest(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
    child.stdin.take().expect("piped").write_all(bytes).expect("written");
    let output = child.wait_with_output().expect("it ends");
    String::from_utf8(output.stdout).expect("text").split(' ').next().expect("a digest").to_owned()
}

fn listed(home: &Home) -> Vec<(String, String)> {
    let list = home.json(&["model", "list", "--json"]);
    let row =
        |row: &Value| (row["id"].as_str().expect("id").to_owned(), row["digest"].as_str().expect("it").to_owned());
    list["data"].as_array().expect("a list").iter().map(row).collect()
}

/// Returns what lies in the folder of downloads.
fn left(home: &Home) -> usize {
    fs::read_dir(home.data().join("downloads")).map_or(0, Iterator::count)
}

#[test]
fn a_download_goes_on_where_it_was_cut_and_is_verified() {
    let home = Home::apart();
    let bytes = model();
    let whole = bytes.clone();
    let server = Server::new(move |request, number| match (request.path.as_str(), number) {
        ("/m/Mine.Q8_0.gguf", 1) => Said::file(request, &whole, "\"a\"").cut(60_000),
        ("/m/Mine.Q8_0.gguf", 2) => Said::new("503 Service Unavailable", &[], b"busy"),
        ("/m/Mine.Q8_0.gguf", _) => Said::file(request, &whole, "\"a\""),
        _ => Said::new("404 Not Found", &[], b""),
    });
    let output = well(&home, &[&format!("{}/m/Mine.Q8_0.gguf", server.url)], &[]);
    assert!(output.contains("mine@1.0 is added"), "{output}");
    assert_eq!(listed(&home), [("mine".to_owned(), digest(&bytes))]);
    let requests = server.requests();
    let ranges: Vec<_> = requests.iter().map(|request| (request.range(), request.header("if-range"))).collect();
    assert_eq!(ranges, [(None, None), (Some(60_000), Some("\"a\"")), (Some(60_000), Some("\"a\""))]);
    assert_eq!(left(&home), 0, "nothing of it is left beside the store");
}

#[test]
fn a_model_comes_over_tls_from_a_server_that_is_trusted() {
    let (authority_key, key) = (KeyPair::generate().expect("a key"), KeyPair::generate().expect("a key"));
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key).expect("a certificate").pem();
    let issuer = Issuer::new(params, authority_key);
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
    let certificate = params.signed_by(&key, &issuer).expect("a certificate").der().clone();
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    let (bytes, whole) = (model(), model());
    let server = Server::secure(certificate, key, move |request, number| match number {
        1 => Said::file(request, &whole, "\"a\"").cut(60_000),
        _ => Said::file(request, &whole, "\"a\""),
    });
    let home = Home::apart();
    let url = format!("{}/mine.gguf", server.url);
    let output = refused(&home, &[&url], &[]);
    assert!(output.contains("the certificate of 127.0.0.1") && output.contains("is not trusted here"), "{output}");
    fs::write(home.path().join("authority.pem"), authority).expect("written");
    let file = home.path().join("authority.pem").display().to_string();
    well(&home, &[&url], &[("SSL_CERT_FILE", &file)]);
    assert_eq!(listed(&home), [("mine".to_owned(), digest(&bytes))]);
    assert_eq!(server.requests().len(), 2, "it went on after the cut");
}

#[test]
fn a_file_that_changed_meanwhile_is_downloaded_from_its_beginning() {
    let home = Home::apart();
    let bytes = model();
    let whole = bytes.clone();
    let server = Server::new(move |request, number| match number {
        1 => Said::file(request, &[whole.clone(), vec![1]].concat(), "\"old\"").cut(60_000),
        _ => Said::file(request, &whole, "\"new\""),
    });
    well(&home, &[&format!("{}/mine.gguf", server.url)], &[]);
    assert_eq!(listed(&home), [("mine".to_owned(), digest(&bytes))]);
    assert_eq!(server.requests()[1].header("if-range"), Some("\"old\""));
}

#[test]
fn a_part_that_is_all_there_or_too_long_is_found_out() {
    for (have, requests) in [(0, 1), (1, 2)] {
        let home = Home::apart();
        let whole = model();
        // What came before is as long as the file, or longer, while the note does not say how long that is.
        let first = [whole.clone(), vec![9; have]].concat();
        let server = Server::new(move |request, number| match number {
            1 => Said::new("200 OK", &[("etag", "\"a\""), ("transfer-encoding", "chunked")], &chunk(&first)),
            _ => Said::file(request, &whole, "\"a\""),
        });
        well(&home, &[&format!("{}/mine.gguf", server.url)], &[]);
        assert_eq!(listed(&home), [("mine".to_owned(), digest(&model()))]);
        assert_eq!(server.requests()[1].range(), Some(model().len() + have));
        assert_eq!(server.requests().len(), 1 + requests);
    }
}

/// One chunk of a body, without the end of it.
fn chunk(bytes: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

#[test]
fn redirects_are_followed_without_the_token_and_a_circle_is_named() {
    let bytes = model();
    let whole = bytes.clone();
    let storage = Server::new(move |request, _| Said::file(request, &whole, "\"a\""));
    let to = format!("{}/blob?signature=secret", storage.url);
    let files = json!([
        {"type": "directory", "path": "sub"},
        {"type": "file", "path": "README.md", "size": 5},
        {"type": "file", "path": "mmproj-F16.gguf", "size": 5, "lfs": {"oid": "0".repeat(64), "size": 5}},
        {"type": "file", "path": "sub/m-Q8_0.gguf", "size": bytes.len(), "lfs": {"oid": digest(&bytes), "size": bytes.len()}},
    ]);
    let (first, second) = (json!([files[0], files[1]]).to_string(), json!([files[2], files[3]]).to_string());
    let hub = Server::new(move |request, _| match request.path.as_str() {
        "/api/models/org/My-Model-GGUF/tree/main?recursive=true" => {
            let next = format!("<http://{}/api/page2>; rel=\"next\"", request.header("host").expect("a host"));
            Said::new("200 OK", &[("link", &next)], first.as_bytes())
        }
        "/api/page2" => Said::new("200 OK", &[], second.as_bytes()),
        "/org/My-Model-GGUF/resolve/main/sub/m-Q8_0.gguf" => Said::redirect("/inner"),
        "/inner" => Said::redirect(&to),
        "/round.gguf" => Said::redirect("/about"),
        "/about" => Said::redirect("/round.gguf"),
        path if path.starts_with("/far/") => {
            let number: u32 = path["/far/".len()..].trim_end_matches(".gguf").parse().expect("a number");
            Said::redirect(&format!("/far/{}.gguf", number + 1))
        }
        _ => Said::new("404 Not Found", &[], b""),
    });
    let home = Home::apart();
    let variables = [("HF_ENDPOINT", hub.url.as_str()), ("HF_TOKEN", "hf_secret")];
    let output = well(&home, &["hf:org/My-Model-GGUF"], &variables);
    assert!(output.contains("org/My-Model-GGUF: Q8_0") && output.contains("my-model@1.0 is added"), "{output}");
    assert_eq!(listed(&home), [("my-model".to_owned(), digest(&bytes))]);
    assert!(hub.requests().iter().all(|request| request.header("authorization") == Some("Bearer hf_secret")));
    assert!(
        storage.requests().iter().all(|request| request.header("authorization").is_none()),
        "{:?}",
        storage.requests()
    );

    let output = refused(&home, &[&format!("{}/round.gguf", hub.url)], &[]);
    assert!(output.contains("sends in a circle"), "{output}");
    let output = refused(&home, &[&format!("{}/far/1.gguf", hub.url)], &[]);
    assert!(output.contains("redirects more than 10 times"), "{output}");
    // What the environment does not say, the Hub's own folder does.
    fs::create_dir_all(home.path().join(".cache/huggingface")).expect("made");
    fs::write(home.path().join(".cache/huggingface/token"), "hf_kept\n").expect("written");
    refused(&home, &["hf.co/org/My-Model-GGUF:Q2_K"], &[("HF_ENDPOINT", hub.url.as_str())]);
    assert_eq!(hub.requests().last().expect("asked").header("authorization"), Some("Bearer hf_kept"));
}

#[test]
fn a_model_of_the_web_answers_in_one_command_and_is_downloaded_once() {
    let bytes = model();
    let whole = bytes.clone();
    let files = json!([
        {"type": "file", "path": "m-Q8_0.gguf", "size": bytes.len(), "lfs": {"oid": digest(&bytes), "size": bytes.len()}},
    ]);
    let hub = Server::new(move |request, _| match request.path.as_str() {
        "/api/models/org/My-Model-GGUF/tree/main?recursive=true" => {
            Said::new("200 OK", &[], files.to_string().as_bytes())
        }
        "/org/My-Model-GGUF/resolve/main/m-Q8_0.gguf" | "/other.gguf" => Said::file(request, &whole, "\"a\""),
        _ => Said::new("404 Not Found", &[], b""),
    });
    let home = Home::apart();
    let ask = |model: &str, more: &[&str]| {
        let arguments = [&["run", model, "What is 3 + 4?", "--temperature", "0"], more].concat();
        let output = home.command(&arguments).env("HF_ENDPOINT", &hub.url).output().expect("the program runs");
        (
            output.status.code(),
            String::from_utf8(output.stdout).expect("text"),
            String::from_utf8(output.stderr).expect("text"),
        )
    };
    let (code, answer, notes) = ask("hf:org/My-Model-GGUF", &[]);
    assert_eq!(code, Some(0), "{notes}");
    assert!(answer.contains('7') && answer.lines().count() == 1, "nothing but the answer: {answer}");
    assert!(notes.contains("org/My-Model-GGUF: Q8_0") && notes.contains("my-model@1.0 is added"), "{notes}");
    let before = hub.requests().len();
    let (_, again, notes) = ask("hf:org/My-Model-GGUF", &[]);
    assert_eq!((again, hub.requests().len()), (answer.clone(), before), "it is known by its source: {notes}");
    let url = format!("{}/other.gguf", hub.url);
    let (_, other, notes) = ask(&format!("mine={url}"), &[]);
    assert_eq!(other, answer, "{notes}");
    let of_both = [("mine".to_owned(), digest(&bytes)), ("my-model".to_owned(), digest(&bytes))];
    assert_eq!(listed(&home)[..2], of_both);
    // The same for a network that runs, and for one that is to run.
    let before = hub.requests().len();
    let up = home.up_with(&["hf:org/My-Model-GGUF"], &[]);
    assert_eq!(ask(&format!("mine={url}"), &[]).1, answer);
    assert_eq!(hub.requests().len(), before);
    let (code, _, notes) = ask(&url, &["--url", &up.url]);
    assert_eq!(code, Some(2));
    assert!(notes.contains("add the model there") && notes.contains(&url), "{notes}");
    assert_eq!(up.end(), Some(0));
}

#[test]
fn each_refusal_of_the_hub_has_a_sentence_of_its_own() {
    let bytes = model();
    let (whole, oid) = (bytes.clone(), digest(&bytes));
    let files = json!([
        {"type": "file", "path": "m-Q4_K_M.gguf", "size": bytes.len(), "lfs": {"oid": "0".repeat(64), "size": bytes.len()}},
        {"type": "file", "path": "m-Q8_0.gguf", "size": 10, "lfs": {"oid": oid, "size": 10}},
        {"type": "file", "path": "m-Q6_K.gguf", "size": bytes.len(), "lfs": {"oid": oid, "size": bytes.len()}},
        {"type": "file", "path": "m-F16-00001-of-00002.gguf", "size": 3},
    ]);
    let list = files.to_string();
    let hub = Server::new(move |request, _| {
        let gated = [("x-error-code", "GatedRepo")];
        match request.path.as_str() {
            "/api/models/o/gated/tree/main?recursive=true" => Said::new("403 Forbidden", &gated, b""),
            "/api/models/o/private/tree/main?recursive=true" => Said::new("401 Unauthorized", &[], b""),
            "/api/models/o/empty/tree/main?recursive=true" => Said::new("200 OK", &[], b"[]"),
            "/api/models/o/odd/tree/main?recursive=true" => Said::new("200 OK", &[], b"<html>"),
            "/api/models/o/busy/tree/main?recursive=true" => Said::new("429 Too Many Requests", &[], b""),
            "/api/models/o/m/tree/main?recursive=true" => Said::new("200 OK", &[], list.as_bytes()),
            // Bytes without end, and bytes that are others than those of the list.
            "/o/m/resolve/main/m-Q8_0.gguf" => Said::new("200 OK", &[("transfer-encoding", "chunked")], &chunk(&whole)),
            "/o/m/resolve/main/m-Q4_K_M.gguf" => Said::file(request, &whole, "\"a\""),
            "/o/m/resolve/main/m-Q6_K.gguf" => Said::new("403 Forbidden", &[], b""),
            _ => Said::new("404 Not Found", &[], b""),
        }
    });
    let home = Home::apart();
    let variables = [("HF_ENDPOINT", hub.url.as_str())];
    for (source, words) in [
        ("hf:o/gated", &["is gated", "accept its terms on", "/o/gated", "HF_TOKEN"][..]),
        ("hf:o/private", &["shows no o/private", "set HF_TOKEN"]),
        ("hf:o/missing", &["has no repository o/missing"]),
        ("hf:o/empty", &["no model in the GGUF format"]),
        ("hf:o/odd", &["does not list files as the Hub does"]),
        ("hf:o/busy", &["limits requests at present"]),
        ("hf:o/m:Q4_K_S", &["has no \"Q4_K_S\"", "did you mean o/m:Q4_K_M?", "Q6_K, Q8_0"]),
        ("hf:o/m:F16", &["has no \"F16\""]),
        ("hf:o/m:Q8_0", &["sends more than the 10 bytes"]),
        ("hf:o/m:Q4_K_M", &["has the digest", "should have 000000"]),
        ("hf:o/m:Q6_K", &["refuses m-Q6_K.gguf", "HF_TOKEN"]),
        ("hf:o", &["hf:ORG/REPO"]),
        ("http://192.0.2.1/m.gguf", &["--insecure"]),
        ("ftp://127.0.0.1/m.gguf", &["is no URL"]),
    ] {
        let output = refused(&home, &[source], &variables);
        for word in words {
            assert!(output.contains(word), "{source}: {output}");
        }
    }
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let output = refused(&home, &[&format!("http://{nobody}/m.gguf")], &[]);
    assert!(output.contains("takes no connection"), "{output}");
    let output = refused(&home, &[&format!("{}/page.gguf", hub.url)], &[]);
    assert!(output.contains("there is nothing at") && output.contains("/page.gguf"), "{output}");
    let page = Server::new(|_, _| Said::new("200 OK", &[], b"<html>a page that is no model</html>"));
    let output = refused(&home, &[&format!("{}/m.gguf", page.url)], &[]);
    assert!(output.contains("is not kept") && output.contains("GGUF"), "{output}");
    let stored = home.data().join("artifacts/sha256");
    let artifacts = fs::read_dir(stored)
        .expect("a folder")
        .flat_map(|folder| fs::read_dir(folder.expect("it").path()).expect("it"));
    assert_eq!(artifacts.count(), 0);
}
