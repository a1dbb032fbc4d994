use super::*;
use proptest::prelude::*;

pub(crate) fn tiny_header() -> Header {
    Header::parse(&tiny()).expect("it is valid")
}

pub(crate) fn tiny() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny.gguf")).expect("the tiny model is there")
}

/// Builds files field by field.
#[derive(Default)]
struct Builder(Vec<u8>);

impl Builder {
    fn new(tensors: u64, pairs: u64) -> Self {
        let mut builder = Self(b"GGUF".to_vec());
        builder.0.extend(3_u32.to_le_bytes());
        builder.u64(tensors).u64(pairs);
        builder
    }

    fn u32(&mut self, number: u32) -> &mut Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn u64(&mut self, number: u64) -> &mut Self {
        self.0.extend(number.to_le_bytes());
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.u64(text.len() as u64);
        self.0.extend(text.as_bytes());
        self
    }
}

#[test]
fn the_tiny_model_tells_what_it_is() {
    let header = Header::parse(&tiny()).expect("it is valid");
    assert_eq!(header.architecture(), Some("llama"));
    assert_eq!(header.context_length(), Some(512));
    assert_eq!(header.vocabulary_size(), Some(1_024));
    assert_eq!(header.hyperparameter("block_count"), Some(4));
    assert_eq!(header.per_layer("attention.head_count_kv", 4), Some(vec![3; 4]));
    assert!(header.chat_template().is_some_and(|template| template.contains("<|im_start|>")));
    assert_eq!(header.eos_token().as_deref(), Some("<|im_end|>"));
}

#[test]
fn a_model_says_how_it_wants_to_be_sampled_in_llama_cpps_words() {
    let mut header = tiny_header();
    header.metadata.retain(|key, _| !key.starts_with("general.sampling."));
    assert_eq!(header.sampling_defaults(), SamplingDefaults::default());
    let mut set = |name: &str, value| header.metadata.insert(format!("general.sampling.{name}"), value);
    set("temp", Value::Float(0.5));
    set("top_k", Value::Signed(-1));
    set("top_p", Value::Unsigned(1));
    set("min_p", Value::Float(0.0));
    set("penalty_repeat", Value::Float(1.25));
    let expected = SamplingDefaults { temperature: 0.5, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.25 };
    assert_eq!(header.sampling_defaults(), expected);
    // A value that a request may not have is not allowed in a file either.
    for (name, value) in [("temp", -1.0), ("temp", f64::NAN), ("top_p", 0.0), ("min_p", 2.0), ("penalty_repeat", 9.0)] {
        let mut header = tiny_header();
        header.metadata.retain(|key, _| !key.starts_with("general.sampling."));
        header.metadata.insert(format!("general.sampling.{name}"), Value::Float(value));
        assert_eq!(header.sampling_defaults(), SamplingDefaults::default(), "{name} {value}");
    }
}

#[test]
fn the_tensors_of_the_tiny_model_end_where_the_file_ends() {
    let file = tiny();
    let header = Header::parse(&file).expect("it is valid");
    let end = header.tensors.iter().map(|tensor| header.data_offset + tensor.offset + tensor.bytes).max();
    let end = end.expect("it has tensors").next_multiple_of(32);
    assert_eq!(end, (file.len() as u64).next_multiple_of(32));
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let file = tiny();
    for length in (0..file.len()).step_by(997).chain(file.len() - 40..file.len() - 32) {
        assert!(Header::parse(&file[..length]).is_err(), "cut to {length} bytes");
    }
}

#[test]
fn a_length_beyond_the_file_is_refused_before_it_is_allocated() {
    let mut builder = Builder::new(0, 1);
    builder.text("k").u32(9).u32(10).u64(u64::MAX / 8);
    let error = Header::parse(&builder.0).expect_err("the array cannot be there");
    assert_eq!(error.key.as_deref(), Some("k"));
    assert!(error.problem.contains("do not fit"), "{error}");
}

#[test]
fn counts_above_the_limits_are_refused() {
    for builder in [Builder::new(u64::MAX, 0), Builder::new(0, u64::MAX), Builder::new(TENSORS_MAX + 1, 0)] {
        let error = Header::parse(&builder.0).expect_err("the count is too large");
        assert!(error.problem.contains("are the most"), "{error}");
    }
}

#[test]
fn an_error_names_the_offset_and_the_key() {
    let mut builder = Builder::new(0, 1);
    builder.text("general.name").u32(77);
    let error = Header::parse(&builder.0).expect_err("77 is no type");
    assert_eq!(error.to_string(), "77 is not a type of value at byte 48 (\"general.name\")");
}

#[test]
fn many_arrays_are_checked_and_few_of_their_numbers_kept() {
    let pairs = 1_000;
    let mut builder = Builder::new(0, pairs);
    for number in 0..pairs {
        // An array of bytes: a number that is kept takes tens of times its length in the file.
        builder.text(&format!("a.{number}")).u32(9).u32(0).u64(KEPT_NUMBERS_MAX);
        builder.0.extend(std::iter::repeat_n(7, KEPT_NUMBERS_MAX as usize));
    }
    let header = Header::parse(&builder.0).expect("it is sound");
    let kept = header.metadata.values().map(|value| if let Value::Array(items) = value { items.len() } else { 0 });
    assert_eq!(kept.sum::<usize>() as u64, KEPT_IN_ALL_MAX);
    let skipped = |value: &Value| matches!(value, Value::Skipped { items: KEPT_NUMBERS_MAX });
    assert_eq!(header.metadata.values().filter(|value| skipped(value)).count() as u64, pairs - 16);
}

#[test]
fn a_tensor_beyond_the_end_of_the_file_is_refused() {
    let mut builder = Builder::new(1, 0);
    builder.text("w").u32(1).u64(1 << 40).u32(0).u64(0);
    let error = Header::parse(&builder.0).expect_err("there are no such bytes");
    assert!(error.problem.contains("beyond the end"), "{error}");
}

#[test]
fn a_tensor_whose_size_overflows_is_refused() {
    let mut builder = Builder::new(1, 0);
    builder.text("w").u32(4).u64(1 << 20).u64(1 << 20).u64(1 << 20).u64(1 << 20).u32(0).u64(0);
    assert!(Header::parse(&builder.0).expect_err("it overflows").problem.contains("too many elements"));
}

#[test]
fn a_key_of_another_type_than_llama_cpp_takes_for_granted_is_refused() {
    let mut builder = Builder::new(0, 1);
    builder.text("split.count").u32(4).u32(3);
    let error = Header::parse(&builder.0).expect_err("it is a 16-bit number");
    assert!(error.problem.contains("not the type"), "{error}");
}

#[test]
fn an_open_file_keeps_its_position() {
    use std::io::{Seek, SeekFrom};
    let mut file = tempfile::tempfile().expect("temporary files work");
    std::io::Write::write_all(&mut file, &tiny()).expect("it is written");
    file.seek(SeekFrom::Start(7)).expect("it seeks");
    assert_eq!(Header::read(&file).expect("it is valid"), Header::parse(&tiny()).expect("it is valid"));
    assert_eq!(file.stream_position().expect("it tells"), 7);
}

proptest! {
    #[test]
    fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = Header::parse(&bytes);
        let mut file = Builder::new(1, 1).0;
        file.extend(bytes);
        let _ = Header::parse(&file);
    }

    #[test]
    fn a_flipped_header_never_panics(offset in 0_usize..40_000, bit in 0_u32..8) {
        let mut file = tiny();
        file[offset] ^= 1 << bit;
        let _ = Header::parse(&file);
    }
}
