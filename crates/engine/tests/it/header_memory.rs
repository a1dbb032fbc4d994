//! The memory that reading a header takes, whatever the file says. Each file is read by a process of its own.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::Command;

use tether_engine::gguf::{
    HEADER_BYTES_MAX, Header, ITEM_BYTES_MAX, KEPT_NUMBERS_MAX, KEY_BYTES_MAX, PAIRS_MAX, TENSORS_MAX,
};
use tether_engine::merge::merge;
use tether_engine::{LoadOptions, ModelRuntime as _};

use crate::process_runtime::host;
use crate::{TINY, artifact};

/// The file that the child reads.
const FILE: &str = "TETHER_HEADER_FILE";
/// The most memory that reading a header may take.
const BYTES_MAX: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// Writes a header field by field.
struct Head(BufWriter<File>);

impl Head {
    fn new(path: &Path, tensors: u64, pairs: u64) -> io::Result<Self> {
        let mut head = Self(BufWriter::new(File::create(path)?));
        head.bytes(b"GGUF")?.bytes(&3_u32.to_le_bytes())?.u64(tensors)?.u64(pairs)?;
        Ok(head)
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<&mut Self> {
        self.0.write_all(bytes)?;
        Ok(self)
    }

    fn u32(&mut self, number: u32) -> io::Result<&mut Self> {
        self.bytes(&number.to_le_bytes())
    }

    fn u64(&mut self, number: u64) -> io::Result<&mut Self> {
        self.bytes(&number.to_le_bytes())
    }

    fn text(&mut self, text: &[u8]) -> io::Result<&mut Self> {
        self.u64(text.len() as u64)?.bytes(text)
    }

    /// Writes an array of texts, all the same.
    fn texts(&mut self, key: &str, items: u64, text: &[u8]) -> io::Result<()> {
        self.text(key.as_bytes())?.u32(9)?.u32(8)?.u64(items)?;
        (0..items).try_for_each(|_| self.text(text).map(drop))
    }
}

/// Returns a key of the greatest length.
fn long(number: u64) -> Vec<u8> {
    format!("{number:0width$}", width = KEY_BYTES_MAX as usize).into_bytes()
}

fn empty_tokens(path: &Path) -> io::Result<()> {
    Head::new(path, 0, 1)?.texts("tokenizer.ggml.tokens", HEADER_BYTES_MAX / 8 - 100, b"")
}

fn long_tokens(path: &Path) -> io::Result<()> {
    let items = HEADER_BYTES_MAX / (ITEM_BYTES_MAX + 8) - 1;
    Head::new(path, 0, 1)?.texts("tokenizer.ggml.tokens", items, &vec![b'a'; ITEM_BYTES_MAX as usize])
}

fn long_texts(path: &Path) -> io::Result<()> {
    let mut head = Head::new(path, 0, PAIRS_MAX)?;
    let text = vec![b'a'; (HEADER_BYTES_MAX / PAIRS_MAX) as usize - 100];
    (0..PAIRS_MAX).try_for_each(|number| head.text(number.to_string().as_bytes())?.u32(8)?.text(&text).map(drop))
}

fn long_keys(path: &Path) -> io::Result<()> {
    let mut head = Head::new(path, 0, PAIRS_MAX)?;
    (0..PAIRS_MAX).try_for_each(|number| head.text(&long(number))?.u32(8)?.text(b"").map(drop))
}

/// Arrays of small numbers, each of which takes many times its length in memory, as long as any are kept.
fn small_numbers(path: &Path) -> io::Result<()> {
    let mut head = Head::new(path, 0, PAIRS_MAX)?;
    let numbers = vec![1; KEPT_NUMBERS_MAX as usize];
    (0..PAIRS_MAX).try_for_each(|number| {
        head.text(number.to_string().as_bytes())?.u32(9)?.u32(0)?.u64(KEPT_NUMBERS_MAX)?.bytes(&numbers).map(drop)
    })
}

fn many_tensors(path: &Path) -> io::Result<()> {
    let mut head = Head::new(path, TENSORS_MAX, 0)?;
    for number in 0..TENSORS_MAX {
        head.text(format!("{number:063}").as_bytes())?.u32(4)?;
        head.u64(1)?.u64(1)?.u64(1)?.u64(1)?.u32(0)?.u64(0)?;
    }
    // The one number that all of them are.
    head.bytes(&[0; 64]).map(drop)
}

fn skipped_texts(path: &Path) -> io::Result<()> {
    Head::new(path, 0, 1)?.texts("tokenizer.ggml.merges", 4 * MIB, b"")
}

/// As much of everything as fits the file: tensors, tokens, texts and numbers.
fn of_everything(path: &Path) -> io::Result<()> {
    let mut head = Head::new(path, TENSORS_MAX / 4, 66)?;
    head.texts("tokenizer.ggml.tokens", 600_000, b"token")?;
    head.text(b"tokenizer.chat_template")?.u32(8)?.text(&vec![b'a'; MIB as usize])?;
    let numbers = vec![1; KEPT_NUMBERS_MAX as usize];
    for number in 0..64_u64 {
        head.text(&long(number))?.u32(9)?.u32(0)?.u64(KEPT_NUMBERS_MAX)?.bytes(&numbers)?;
    }
    for number in 0..TENSORS_MAX / 4 {
        head.text(format!("{number:063}").as_bytes())?.u32(1)?.u64(1)?.u32(0)?.u64(0)?;
    }
    head.bytes(&[0; 64]).map(drop)
}

fn tiny(path: &Path) -> io::Result<()> {
    fs::copy(TINY, path).map(drop)
}

type Make = fn(&Path) -> io::Result<()>;

/// The worst headers, and whether they are read.
const HEADERS: [(&str, Make, bool); 9] = [
    ("the tiny model", tiny, true),
    ("empty tokens", empty_tokens, false),
    ("long tokens", long_tokens, false),
    ("long texts", long_texts, false),
    ("long keys", long_keys, true),
    ("small numbers", small_numbers, true),
    ("many tensors", many_tensors, false),
    ("texts that are skipped", skipped_texts, true),
    ("something of everything", of_everything, true),
];

/// Runs an ignored test of this program on each header, and returns the memory it took and how it went.
fn taken_by(test: &str) -> impl Iterator<Item = (&'static str, bool, u64, String)> {
    let folder = tempfile::tempdir().expect("a folder");
    HEADERS.into_iter().map(move |(name, write, is_read)| {
        let path = folder.path().join("header.gguf");
        write(&path).expect("written");
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", test, "--ignored", "--nocapture"])
            .env(FILE, &path)
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&child.stdout);
        let took = said.lines().find_map(|line| line.split_once("took ")).expect("it says what it took").1;
        let (bytes, outcome) = took.split_once(' ').expect("two words");
        (name, is_read, bytes.parse().expect("a number"), outcome.to_owned())
    })
}

#[test]
fn no_header_takes_more_than_64_mib_whatever_it_says() {
    for (name, is_read, bytes, outcome) in taken_by("header_memory::read_one") {
        assert_eq!(outcome, if is_read { "read" } else { "refused" }, "{name}");
        assert!(bytes <= BYTES_MAX, "{name} took {} MiB", bytes / MIB);
    }
}

#[test]
fn a_worker_that_plans_and_merges_a_model_takes_no_more_than_256_mib_whatever_its_header_says() {
    for (name, _, bytes, _) in taken_by("header_memory::plan_and_merge_one") {
        assert!(bytes <= 256 * MIB, "{name} took {} MiB", bytes / MIB);
    }
}

#[test]
#[ignore = "run in a process of its own by no_header_takes_more_than_64_mib_whatever_it_says"]
fn read_one() {
    let path = std::env::var_os(FILE).expect("a file");
    let file = File::open(path).expect("it is there");
    let before = peak_bytes();
    let header = Header::read(&file);
    let outcome = if header.is_ok() { "read" } else { "refused" };
    println!("took {} {outcome}", peak_bytes() - before);
}

#[tokio::test]
#[ignore = "run in a process of its own by a_worker_that_plans_and_merges_a_model_takes_no_more_than_256_mib_whatever_its_header_says"]
async fn plan_and_merge_one() {
    let path = std::env::var_os(FILE).expect("a file");
    let model = || artifact(Path::new(&path));
    let before = peak_bytes();
    let plan = host(&["mock"]).estimate(&model(), &LoadOptions::default()).await;
    let merged = merge(&model(), &model(), tempfile::tempfile().expect("a file")).await;
    assert!(merged.is_err(), "a model is not its own adapter");
    println!("took {} {}", peak_bytes() - before, if plan.is_ok() { "planned" } else { "refused" });
}

/// Returns the peak of this process's resident memory.
fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("it is told");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel tells");
    peak.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1_024
}
