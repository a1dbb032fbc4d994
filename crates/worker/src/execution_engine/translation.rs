//! Translates jobs into engine requests, and pieces and errors of the engine into protocol messages.

use engine::{
    Chat, EmbedRequest, EngineError, GenerateRequest, LeftToModel, ModelId, Piece, PromptInput, RerankRequest, Sampling,
};
use protocol::error_code::ContextLength;
use protocol::infer::{EmbedInput, InferRequest, Input, Payload};
use protocol::policy::ServiceClass;
use protocol::{ErrorCode, WireError};

use crate::model_loader::u64_of;

/// Returns the engine request of a job.
pub(super) fn generate_request(model: ModelId, request: &InferRequest) -> GenerateRequest {
    let input = &request.input;
    // Seeded by the correlation id, so that an attempt on another worker draws the same tokens.
    let (first, second) = request.correlation_id.0.as_bytes().split_at(8);
    GenerateRequest {
        sampling: Sampling::of(input, u64_of(first) ^ u64_of(second)),
        left_to_model: LeftToModel::of(input),
        stop: input.stop.clone(),
        max_tokens: input.max_tokens,
        ignore_eos: input.ignore_eos,
        logprobs: input.logprobs,
        suffix: input.suffix.clone(),
        echo: input.echo,
        format: input.format.clone(),
        prediction: input.prediction.clone().map(PromptInput::Text),
        deterministic: input.deterministic,
        yields: request.class == ServiceClass::Batch,
        ..GenerateRequest::new(model, prompt(input))
    }
}

/// Returns the prompt of a job.
pub(super) fn prompt(input: &Input) -> PromptInput {
    match input {
        Input { messages: Some(messages), .. } => PromptInput::Chat(Chat {
            messages: messages.clone(),
            tools: input.tools.clone(),
            tool_choice: input.tool_choice.clone(),
            one_call: input.one_call,
            continue_last: input.continue_last,
            template_options: input.template_options.clone(),
        }),
        Input { prompt_tokens: Some(tokens), .. } => PromptInput::Tokens(tokens.clone()),
        Input { prompt, .. } => PromptInput::Text(prompt.clone().unwrap_or_default()),
    }
}

/// Returns the prompts of a job that has several.
pub(super) fn prompts(input: &Input) -> Vec<PromptInput> {
    input.prompts.as_deref().map(texts).unwrap_or_default()
}

/// Returns the engine request for embedding these inputs.
pub(super) fn embed_request(model: ModelId, inputs: &[EmbedInput]) -> EmbedRequest {
    EmbedRequest { model, inputs: texts(inputs) }
}

/// Returns the engine request for scoring these texts by the job's query.
pub(super) fn rerank_request(model: ModelId, input: &Input, texts: &[EmbedInput]) -> RerankRequest {
    // A checked input has texts here and no tokens.
    let text = |text: &EmbedInput| match text {
        EmbedInput::Text(text) => Some(text.clone()),
        EmbedInput::Tokens(_) => None,
    };
    RerankRequest {
        model,
        query: input.query.clone().unwrap_or_default(),
        texts: texts.iter().filter_map(text).collect(),
    }
}

fn texts(inputs: &[EmbedInput]) -> Vec<PromptInput> {
    inputs.iter().cloned().map(PromptInput::from).collect()
}

/// Appends a piece of an answer to its unsent payload.
pub(super) fn append(payload: &mut Payload, piece: Piece) {
    let Piece { text, reasoning, tool_calls, tokens, logprobs, stop_sequence } = piece;
    let join = |whole: &mut String, more: String| if whole.is_empty() { *whole = more } else { whole.push_str(&more) };
    join(&mut payload.text, text);
    join(&mut payload.reasoning, reasoning);
    payload.tool_calls.extend(tool_calls);
    if payload.tokens.is_empty() {
        payload.tokens = tokens;
    } else {
        payload.tokens.extend(tokens);
    }
    payload.logprobs.extend(logprobs);
    payload.stop_sequence = stop_sequence.or(payload.stop_sequence.take());
}

/// Translates an engine's error to a wire error. Reasons are left out: they may name paths and processes.
pub(super) fn wire_error(error: &EngineError, input: &Input) -> WireError {
    match error {
        EngineError::ContextLength { prompt_tokens, context_length } => {
            let part = match input {
                Input { messages: Some(_), .. } => "messages",
                Input { query: Some(_), .. } => "documents",
                Input { embed: Some(_), .. } => "input",
                _ => "prompt",
            };
            ContextLength { context_length: *context_length, part, prompt_tokens: *prompt_tokens }.into()
        }
        EngineError::Unsupported { parameter, .. } => {
            WireError::new(ErrorCode::UnsupportedParameter, error.to_string()).with_param(parameter.as_str())
        }
        EngineError::Busy => crate::quota_guard::Refusal::QueueFull.into(),
        EngineError::NotLoaded => WireError::new(ErrorCode::WorkerFailed, "the model was unloaded, try again"),
        EngineError::Crashed { suspects, .. } => {
            WireError::new(ErrorCode::EngineCrashed, "the engine crashed, try again").with_suspects(*suspects)
        }
        // No request is suspected.
        EngineError::Killed { .. } => {
            WireError::new(ErrorCode::WorkerFailed, "the engine was killed, try again").with_suspects(0)
        }
        EngineError::InvalidModel { .. } | EngineError::OutOfMemory { .. } | EngineError::Failed { .. } => {
            WireError::new(ErrorCode::WorkerFailed, "the engine failed, try again")
        }
    }
}

#[cfg(test)]
mod tests {
    use engine::{Message, OutputFormat, Role, Tool, ToolCall, ToolChoice};

    use super::*;

    fn request(input: Input) -> InferRequest {
        let model = protocol::model::ModelKey {
            model_id: "tether-tiny".parse().expect("model"),
            version: "1.0".parse().expect("version"),
        };
        InferRequest::new(
            "acme".parse().expect("tenant"),
            model,
            input,
            "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("id"),
            "r".parse().expect("token"),
            protocol::TraceId([1; 16]),
        )
    }

    fn of_text() -> Input {
        Input { prompt: Some("once".into()), ..Input::default() }
    }

    #[test]
    fn what_the_caller_leaves_open_is_left_to_the_model() {
        let generate = generate_request(ModelId(3), &request(of_text()));
        assert_eq!(generate.input, PromptInput::Text("once".into()));
        assert_eq!(generate.sampling, Sampling { seed: generate.sampling.seed, ..Sampling::default() });
        let all = LeftToModel { temperature: true, top_p: true, top_k: true, min_p: true, repetition_penalty: true };
        assert_eq!(generate.left_to_model, all);
        assert_eq!((generate.model, generate.max_tokens, generate.ignore_eos), (ModelId(3), None, false));
    }

    #[test]
    fn what_the_caller_asks_for_reaches_the_engine() {
        let message = Message::new(Role::User, "hi");
        let input = Input {
            messages: Some(vec![message]),
            max_tokens: Some(5),
            temperature: Some(0.0),
            top_p: Some(0.5),
            top_k: Some(9),
            min_p: Some(0.1),
            repetition_penalty: Some(1.5),
            seed: Some(42),
            stop: vec!["END".into()],
            ignore_eos: true,
            ..Input::default()
        };
        let generate = generate_request(ModelId(1), &request(input.clone()));
        assert_eq!(generate.input, PromptInput::Chat(vec![Message::new(Role::User, "hi")].into()));
        assert_eq!(generate.sampling, Sampling::of(&input, 0));
        assert_eq!(generate.left_to_model, LeftToModel::default());
        assert_eq!((generate.stop, generate.max_tokens, generate.ignore_eos), (vec!["END".to_owned()], Some(5), true));
    }

    #[test]
    fn what_a_conversation_offers_and_the_form_of_its_answer_reach_the_engine() {
        let call = ToolCall { id: "c1".into(), name: "f".into(), arguments: "{}".into() };
        let messages = vec![
            Message { tool_calls: vec![call], reasoning: Some("hm".into()), ..Message::new(Role::Assistant, "") },
            Message { tool_call_id: Some("c1".into()), ..Message::new(Role::Tool, "42") },
        ];
        let schema = serde_json::json!({"type": "object"});
        let offered = Tool { name: "f".into(), description: None, parameters: Some(schema.clone()) };
        let input = Input {
            messages: Some(messages),
            tools: vec![offered],
            tool_choice: ToolChoice::Function("f".into()),
            one_call: true,
            continue_last: true,
            format: OutputFormat::JsonSchema(schema.clone()),
            logprobs: Some(3),
            prediction: Some("so".into()),
            ..Input::default()
        };
        let generate = generate_request(ModelId(1), &request(input));
        let PromptInput::Chat(chat) = generate.input else { panic!("a conversation") };
        assert_eq!(chat.messages[0].tool_calls[0].name, "f");
        assert_eq!(chat.messages[0].reasoning.as_deref(), Some("hm"));
        assert_eq!((chat.messages[1].role, chat.messages[1].tool_call_id.as_deref()), (Role::Tool, Some("c1")));
        assert_eq!(chat.tools, [Tool { name: "f".into(), description: None, parameters: Some(schema.clone()) }]);
        assert_eq!((chat.tool_choice, chat.one_call), (ToolChoice::Function("f".into()), true));
        assert!(chat.continue_last);
        assert_eq!(generate.prediction, Some(PromptInput::Text("so".into())));
        assert_eq!((generate.format, generate.logprobs), (OutputFormat::JsonSchema(schema), Some(3)));
    }

    #[test]
    fn another_attempt_draws_the_same_tokens_and_another_job_does_not() {
        let seed = |request: &InferRequest| generate_request(ModelId(1), request).sampling.seed;
        let first = request(of_text());
        let second = InferRequest { attempt: 2, ..first.clone() };
        assert_eq!(seed(&first), seed(&second));
        let id = "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e10".parse().expect("id");
        assert_ne!(seed(&first), seed(&InferRequest { correlation_id: id, ..first.clone() }));
    }

    /// LiteLLM, aider, Cline and others match these words.
    #[test]
    fn a_full_context_is_told_in_openais_words() {
        let error = EngineError::ContextLength { prompt_tokens: 9031, context_length: 4096 };
        let expected = "This model's maximum context length is 4096 tokens. However, your prompt resulted in 9031 \
                        tokens. Please reduce the length of the prompt.";
        assert_eq!(wire_error(&error, &of_text()).message, expected);
        let embed = Input { embed: Some(vec![EmbedInput::Text("x".into())]), ..Input::default() };
        assert!(wire_error(&error, &embed).message.contains("your input resulted in 9031 tokens"));
    }

    #[test]
    fn each_engine_error_has_its_code_and_keeps_its_reasons_to_itself() {
        let secret = || String::from("/srv/secret");
        let chat = Input { messages: Some(vec![]), ..Input::default() };
        let too_long = EngineError::ContextLength { prompt_tokens: 9, context_length: 8 };
        for (error, input, code, param) in [
            (too_long.clone(), of_text(), ErrorCode::ContextLengthExceeded, Some("prompt")),
            (too_long, chat, ErrorCode::ContextLengthExceeded, Some("messages")),
            (
                EngineError::Unsupported { parameter: "top_k".into(), reason: "no".into() },
                of_text(),
                ErrorCode::UnsupportedParameter,
                Some("top_k"),
            ),
            (EngineError::Busy, of_text(), ErrorCode::WorkerFull, None),
            (EngineError::NotLoaded, of_text(), ErrorCode::WorkerFailed, None),
            (EngineError::InvalidModel { reason: secret() }, of_text(), ErrorCode::WorkerFailed, None),
            (EngineError::Failed { reason: secret() }, of_text(), ErrorCode::WorkerFailed, None),
            (EngineError::Killed { reason: secret() }, of_text(), ErrorCode::WorkerFailed, None),
        ] {
            let wire = wire_error(&error, &input);
            assert_eq!((wire.code, wire.param.as_deref()), (code, param), "{error}");
            assert!(!wire.message.contains("secret"), "{wire}");
        }
        let suspects = |error| wire_error(&error, &of_text()).suspects;
        assert_eq!(suspects(EngineError::Killed { reason: secret() }), Some(0), "nobody is suspected");
        assert_eq!(suspects(EngineError::Failed { reason: secret() }), None);
        assert_eq!(suspects(EngineError::Crashed { reason: secret(), suspects: 2 }), Some(2));
    }
}
