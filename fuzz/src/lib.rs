//! One function for each reader of foreign bytes: it takes any bytes at all and must return.
//!
//! libFuzzer drives them (`make fuzz`), and `cargo test` replays the corpus through them. Where a reader has an
//! inverse, its target also checks that what was read is written as it was read.

mod control;
mod structured_output;
mod swarm;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use engine::answer_parser::{AnswerFormat, AnswerParser, Delta};
use engine::chat_template::ChatTemplate;
use engine::gguf::{self, Header};
use engine::process::frame::{self, FileInfo, ToChild, ToParent};
use engine::process::handover;
use engine::remote::answer_reader::AnswerReader;
use engine::remote::event_stream::EventReader;
use engine::remote::{dialect, refusal, vectors};
use engine::text_assembler::TextAssembler;
use engine::{Chat, LoadOptions, Message, Role, Tool, ToolCall, VerifiedArtifact, memory_plan};
use observability::trace_context::TraceContext;
use protocol::health::HealthReport;
use protocol::infer::{InferChunk, InferRequest, InferSubmission};
use protocol::membership::{Certificate, Invite, RevocationList};
use protocol::model::ModelRef;
use protocol::presence::{self, Facts};
use protocol::signature::Signed;
use protocol::token::ApiToken;
use protocol::{Topic, UnixMillis, codec};
use rpc::frame::Frame;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tether_cli::args::Common;
use tether_cli::settings::{self, Env};

pub use control::{adapter_call, admission_call, enrolment_file, hello, known_peers, token_call};
pub use structured_output::grammar;
pub use swarm::{
    compact_value, dht_connection, dht_message, dht_record, mux_frames, noise_message, noise_payload, rpc_message,
    secret_frames, udx_packets,
};

/// Takes any bytes and must return.
pub type Target = fn(&[u8]);

/// Every target with its name, which is also that of its program and of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("adapter_call", adapter_call),
    ("admission_call", admission_call),
    ("answer_parser", answer_parser),
    ("api_token", api_token),
    ("certificate", certificate),
    ("chat_request", chat_request),
    ("chat_template", chat_template),
    ("compact_value", compact_value),
    ("completion_request", completion_request),
    ("config_file", config_file),
    ("descriptors", descriptors),
    ("dht_connection", dht_connection),
    ("dht_message", dht_message),
    ("dht_record", dht_record),
    ("embedding_request", embedding_request),
    ("engine_frame", engine_frame),
    ("enrolment_file", enrolment_file),
    ("gateway_submission", gateway_submission),
    ("gguf_header", gguf_header),
    ("gguf_pair", gguf_pair),
    ("grammar", grammar),
    ("health_report", health_report),
    ("hello", hello),
    ("infer_body", infer_body),
    ("infer_chunk", infer_chunk),
    ("infer_request", infer_request),
    ("infer_submission", infer_submission),
    ("invite", invite),
    ("known_peers", known_peers),
    ("messages_request", messages_request),
    ("model_ref", model_ref),
    ("mux_frames", mux_frames),
    ("noise_message", noise_message),
    ("noise_payload", noise_payload),
    ("ollama_request", ollama_request),
    ("remote_answer", remote_answer),
    ("remote_server", remote_server),
    ("responses_request", responses_request),
    ("revocations", revocations),
    ("rpc_message", rpc_message),
    ("secret_frames", secret_frames),
    ("signed_report", signed_report),
    ("stream_frame", stream_frame),
    ("text_assembler", text_assembler),
    ("token_call", token_call),
    ("topic", topic),
    ("traceparent", traceparent),
    ("udx_packets", udx_packets),
];

/// A topic's text.
pub fn topic(bytes: &[u8]) {
    if let Some(topic) = text(bytes).and_then(|text| text.parse::<Topic>().ok()) {
        assert_eq!(topic.to_string().as_bytes(), bytes);
    }
}

/// A model as a client names it.
pub fn model_ref(bytes: &[u8]) {
    if let Some(model) = text(bytes).and_then(|text| text.parse::<ModelRef>().ok()) {
        assert_eq!(model.to_string().parse(), Ok(model));
    }
}

/// An API token.
pub fn api_token(bytes: &[u8]) {
    if let Some(token) = text(bytes).and_then(|text| text.parse::<ApiToken>().ok()) {
        assert_eq!(token.to_string().as_bytes(), bytes);
        assert!(!format!("{token:?}").contains(token.secret()), "a token's Debug tells its secret");
    }
}

/// A W3C `traceparent` header.
pub fn traceparent(bytes: &[u8]) {
    if let Some(context) = text(bytes).and_then(TraceContext::parse) {
        assert_ne!(context.trace_id.0, [0; 16]);
    }
}

/// A job on its way to a worker. One whose numbers lie outside their ranges need not read back.
pub fn infer_request(bytes: &[u8]) {
    if let Ok(request) = codec::decode::<InferRequest>(bytes)
        && request.input.check().is_ok()
    {
        reads_back(&request);
    }
}

/// A job as a client writes it.
pub fn infer_submission(bytes: &[u8]) {
    if let Ok(submission) = codec::decode::<InferSubmission>(bytes)
        && submission.input.check().is_ok()
    {
        reads_back(&submission);
    }
}

/// The body of `POST /v1/chat/completions`.
pub fn chat_request(bytes: &[u8]) {
    if let Ok(generation) = gateway::parse_chat(bytes) {
        assert_eq!(generation.job.input.check(), Ok(()), "what passed is a sound job");
    }
}

/// The bodies of `POST /v1/messages` and of its count of tokens.
pub fn messages_request(bytes: &[u8]) {
    if let Ok(order) = gateway::parse_messages(bytes) {
        assert_eq!(order.job.input.check(), Ok(()), "what passed is a sound job");
        assert!(gateway::parse_message_count(bytes).is_ok(), "what can be answered can be counted");
    }
}

/// The body of `POST /v1/responses`.
pub fn responses_request(bytes: &[u8]) {
    if let Ok(request) = gateway::parse_response(bytes) {
        assert_eq!(request.job.input.check(), Ok(()), "what passed is a sound job");
    }
}

/// The bodies of Ollama's requests.
pub fn ollama_request(bytes: &[u8]) {
    for parse in [gateway::parse_ollama_chat, gateway::parse_ollama_generate] {
        if let Ok(generation) = parse(bytes) {
            assert_eq!(generation.job.input.check(), Ok(()), "what passed is a sound job");
        }
    }
    for parse in [gateway::parse_ollama_embed, gateway::parse_ollama_embedding] {
        if let Ok(vectors) = parse(bytes) {
            assert_eq!(vectors.job.input.check(), Ok(()), "what passed is a sound job");
        }
    }
}

/// The body of `POST /v1/embeddings`.
pub fn embedding_request(bytes: &[u8]) {
    if let Ok(vectors) = gateway::parse_embeddings(bytes) {
        assert_eq!(vectors.job.input.check(), Ok(()), "what passed is a sound job");
    }
}

/// The body of `POST /v1/completions`.
pub fn completion_request(bytes: &[u8]) {
    if let Ok(generation) = gateway::parse_completion(bytes) {
        assert_eq!(generation.job.input.check(), Ok(()), "what passed is a sound job");
    }
}

/// The body of `infer.submit` at a gateway.
pub fn gateway_submission(bytes: &[u8]) {
    if let Ok(submission) = gateway::parse_submission(bytes)
        && let Ok(read) = submission.job.read()
    {
        assert_eq!(read.job.input.check(), Ok(()), "what passed is a sound job");
    }
}

/// The body of `POST /infer`.
pub fn infer_body(bytes: &[u8]) {
    if let Ok(job) = gateway::parse_infer(bytes) {
        assert_eq!(job.input.check(), Ok(()), "what passed is a sound job");
    }
}

/// The settings file.
pub fn config_file(bytes: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(bytes).expect("it is written");
    let common = Common { config: Some(file.path().to_owned()), ..Common::default() };
    if let Err(error) = settings::load(&common, &Env::default(), &[]) {
        assert!(!format!("{error:#}").is_empty());
    }
}

/// A piece of an answer.
pub fn infer_chunk(bytes: &[u8]) {
    message::<InferChunk>(bytes);
    let _ = gateway::parse_chunk(bytes);
}

/// What a worker says of itself.
pub fn health_report(bytes: &[u8]) {
    message::<HealthReport>(bytes);
}

/// A signed report, up to the decision whether to believe it.
pub fn signed_report(bytes: &[u8]) {
    let Some(signed) = message::<Signed>(bytes) else { return };
    let facts = |now| Facts { remote_key: signed.key, regions: &[], check_worker: &|_| Ok(()), high_water: None, now };
    assert!(presence::verify(&signed, &facts(UnixMillis(0))).is_err(), "no region is of interest");
    let Ok(report) = codec::decode::<HealthReport>(signed.body.as_bytes()) else { return };
    let regions = [report.region];
    let facts = Facts { regions: &regions, ..facts(report.issued_at) };
    if presence::verify(&signed, &facts).is_ok() {
        let bent = Signed { body: format!("{} ", signed.body), ..signed.clone() };
        assert!(presence::verify(&bent, &facts).is_err(), "a signature covers every byte");
    }
}

/// An invite's text.
pub fn invite(bytes: &[u8]) {
    if let Some(invite) = text(bytes).and_then(|text| text.parse::<Invite>().ok()) {
        assert_eq!(invite.to_string().as_bytes(), bytes);
        assert!(!format!("{invite:?}").contains(&invite.secret.to_hex()), "an invite's Debug tells its secret");
    }
}

/// A node's certificate, up to the decision whether to believe it.
pub fn certificate(bytes: &[u8]) {
    let Some(signed) = message::<Signed>(bytes) else { return };
    let Ok(claimed) = codec::decode::<Certificate>(signed.body.as_bytes()) else { return };
    let verify = |signed: &Signed| Certificate::verify(signed, claimed.pool, claimed.public_key, claimed.not_before);
    if let Ok(certificate) = verify(&signed) {
        let _ = (certificate.is_due(UnixMillis(0)), certificate.is_due(UnixMillis(u64::MAX)));
        let bent = Signed { body: format!("{} ", signed.body), ..signed.clone() };
        assert!(verify(&bent).is_err(), "a signature covers every byte");
        assert!(RevocationList::verify(&signed, claimed.pool).is_err(), "a certificate is no list");
    }
}

/// The list of expelled nodes.
pub fn revocations(bytes: &[u8]) {
    let Some(signed) = message::<Signed>(bytes) else { return };
    if let Ok(list) = RevocationList::verify(&signed, signed.key) {
        assert_eq!(list.pool, signed.key);
        reads_back(&list);
    }
}

/// A frame of `tether/stream/1`.
pub fn stream_frame(bytes: &[u8]) {
    if let Ok(frame) = Frame::decode(Bytes::copy_from_slice(bytes)) {
        assert_eq!(Frame::decode(frame.encode()), Ok(frame));
    }
}

/// What passes between a worker and its engine process, in both directions.
pub fn engine_frame(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    while let Ok(Some(_)) = frame::decode::<ToChild>(&mut buffer) {}
    let mut buffer = BytesMut::from(bytes);
    while let Ok(Some(_)) = frame::decode::<ToParent>(&mut buffer) {}
}

/// The files that come to an engine process before the frame that describes them: as many as the first byte says.
pub fn descriptors(bytes: &[u8]) {
    let [count, described @ ..] = bytes else { return };
    let Ok(infos) = codec::decode::<Vec<FileInfo>>(described) else { return };
    let (sender, receiver) = UnixStream::pair().expect("a pair of sockets");
    let empty = || VerifiedArtifact { file: tempfile(), sha256: String::new(), bytes: 0, parts: Vec::new() };
    let sent = VerifiedArtifact { parts: (1..*count).map(|_| empty()).collect(), ..empty() };
    if handover::send(&sender, &sent).is_err() {
        return;
    }
    let received = handover::receive(&receiver, &infos);
    assert_eq!(received.is_ok(), infos.len() == sent.parts.len() + 1, "there is a file for each description");
    if let Ok(received) = received {
        assert_eq!(handover::describe(&received), infos);
    }
}

/// The header of a model file, and all that is asked of it.
pub fn gguf_header(bytes: &[u8]) {
    let Ok(header) = Header::parse(bytes) else { return };
    let _ = (header.architecture(), header.context_length(), header.chat_template());
    let _ = (header.bos_token(), header.eos_token(), header.vocabulary_size(), header.tensor_bytes());
    let _ = (header.hyperparameter("block_count"), header.per_layer("attention.head_count_kv", 64));
    let _ = gguf::check_model(&header);
    let options = LoadOptions::default();
    let _ = (memory_plan::plan(&header, &options), memory_plan::layers_that_fit(&header, &options, 1 << 30));
}

/// Two files, the length of the first in front: a model and its adapter, or two parts of a model.
pub fn gguf_pair(bytes: &[u8]) {
    let Some((length, files)) = bytes.split_first_chunk::<4>() else { return };
    let Some((first, second)) = files.split_at_checked(u32::from_le_bytes(*length) as usize) else { return };
    let (Ok(first), Ok(second)) = (Header::parse(first), Header::parse(second)) else { return };
    let _ = gguf::check_adapter(&second, &first);
    let _ = gguf::join(vec![first, second]);
}

/// A chat template out of a model file, over a short conversation with a call.
pub fn chat_template(bytes: &[u8]) {
    let Some(source) = text(bytes) else { return };
    let Ok(template) = ChatTemplate::new(Some(source), "<s>", "</s>") else { return };
    let said = |role: Role, content: &str| Message::new(role, content);
    let call = ToolCall { id: "call_1".into(), name: "add".into(), arguments: r#"{"a":[1,null],"b":"{}"}"#.into() };
    let calls = Message { tool_calls: vec![call], reasoning: Some("hm".into()), ..said(Role::Assistant, "") };
    let messages =
        vec![said(Role::System, "Be brief."), said(Role::User, "{{ 7 * 7 }}"), calls, said(Role::Tool, "49")];
    let parameters = Some(serde_json::json!({ "type": "object", "properties": { "a": { "type": "array" } } }));
    let tool = Tool { name: "add".into(), description: None, parameters };
    let _ = template.render(&Chat { tools: vec![tool], ..messages.into() }, SystemTime::UNIX_EPOCH);
}

/// What a model answers, on its way to text, thoughts and calls: however it is cut, the same comes out.
///
/// The first byte says how the model writes and whether a limit ended the answer, the second where to cut.
pub fn answer_parser(bytes: &[u8]) {
    const TEMPLATES: [&str; 7] = [
        "<tool_call></tool_call><think></think>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[TOOL_CALLS][ARGS][THINK][/THINK]",
        "<function=",
        "<|channel|>",
        "<think></think>",
    ];
    let [template, step, rest @ ..] = bytes else { return };
    let answer = String::from_utf8_lossy(rest);
    let format = AnswerFormat::detect(TEMPLATES[usize::from(*template) % TEMPLATES.len()]);
    let tool = Tool { name: "add".into(), description: None, parameters: None };
    let chat = Chat { tools: vec![tool], ..Chat::default() };
    let parse = |step: usize| {
        let mut parser = AnswerParser::new(format, &chat, "", 0);
        let mut whole = Delta::default();
        let mut take = |delta: Delta| {
            whole.text.push_str(&delta.text);
            whole.reasoning.push_str(&delta.reasoning);
            for call in delta.tool_calls {
                match whole.tool_calls.get_mut(call.index as usize) {
                    Some(known) => known.arguments.push_str(&call.arguments),
                    None => whole.tool_calls.push(call),
                }
            }
        };
        let mut rest = answer.as_ref();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.ceil_char_boundary(step.min(rest.len())));
            take(parser.push(piece));
            rest = after;
        }
        let (last, calls) = parser.finish(*template >= 0x80);
        take(last);
        assert_eq!(calls, !whole.tool_calls.is_empty());
        whole
    };
    assert_eq!(parse(usize::from(*step).max(1)), parse(answer.len().max(1)));
}

/// What a server streams of an answer: however it is cut, the same events come of it.
///
/// The first byte says where to cut.
pub fn remote_answer(bytes: &[u8]) {
    let [step, rest @ ..] = bytes else { return };
    let read = |step: usize| {
        let (mut stream, mut answer, mut events) = (EventReader::default(), AnswerReader::new(1), Vec::new());
        for piece in rest.chunks(step) {
            stream.push(piece);
            while let Ok(Some(data)) = stream.next_event() {
                if answer.read(&data, &mut events).is_err() {
                    return events;
                }
            }
        }
        let _ = answer.end(&mut events);
        events
    };
    assert_eq!(read(usize::from(*step).max(1)), read(rest.len().max(1)));
}

/// What a server says of itself, makes of a text, or refuses with.
pub fn remote_server(bytes: &[u8]) {
    let _ = (dialect::read_props(bytes), dialect::read_lm_studio(bytes));
    let listed = dialect::read_models(bytes).map(|(models, _)| models).into_iter().chain(dialect::read_tags(bytes));
    for mut model in listed.flatten() {
        dialect::add_show(&mut model, bytes);
    }
    if let Ok(embeddings) = vectors::read_embeddings(bytes, 2) {
        assert!(embeddings.vectors.iter().flatten().all(|number| number.is_finite()));
    }
    let _ = (refusal::engine_error(400, bytes, 512), refusal::engine_error(500, bytes, 512));
}

/// Token bytes on their way to text: however they are cut, the same text comes out.
///
/// The first byte says where to cut, the second how long the stop text is that follows.
pub fn text_assembler(bytes: &[u8]) {
    let [step, length, rest @ ..] = bytes else { return };
    let (stop, rest) = rest.split_at(rest.len().min(usize::from(*length % 8)));
    let stops = [String::from_utf8_lossy(stop).into_owned()];
    let assemble = |step: usize| {
        let mut assembler = TextAssembler::new(&stops);
        let mut whole: String = rest.chunks(step).map(|piece| assembler.push(piece)).collect();
        whole.push_str(&assembler.finish(false));
        whole
    };
    assert_eq!(assemble(usize::from(*step).max(1)), assemble(rest.len().max(1)));
}

fn tempfile() -> File {
    tempfile::tempfile().expect("a file")
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Reads a message and checks that it reads back as it is written.
fn message<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> Option<T> {
    let message = codec::decode(bytes).ok()?;
    reads_back(&message);
    Some(message)
}

fn reads_back<T: DeserializeOwned + Serialize>(message: &T) {
    let written = codec::encode(message);
    let again: T = codec::decode(&written).expect("what was written reads back");
    assert_eq!(codec::encode(&again), written);
}
