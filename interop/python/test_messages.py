"""The Messages API, by Anthropic's SDK. No test depends on the content of an answer, except where the model is ours."""

import json
import os

import anthropic
import pytest
from conftest import MODEL as OURS
from conftest import eventually, variable
from pydantic import BaseModel

MODEL = os.environ.get("TETHER_MESSAGES_MODEL", OURS)
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
# The SDK has no argument for the temperature, which the API takes all the same.
GREEDY = {"temperature": 0}
ASKED = {"model": MODEL, "max_tokens": 64, "messages": QUESTION, "extra_body": GREEDY}
WEATHER = {
    "name": "weather",
    "description": "Tells the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Tokyo", "Kyoto"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ours = pytest.mark.skipif(MODEL != OURS, reason="only our own model is known to say this")


@pytest.fixture(scope="module")
def connect(network):
    """Makes an SDK client. Only its address and key are set, unless a test sets more."""

    def connect(key=network.key, **options):
        return anthropic.Anthropic(base_url=network.url, api_key=key, **options)

    return connect


@pytest.fixture(scope="module")
def client(connect):
    return connect()


@pytest.fixture(scope="module")
def calls_tools(client):
    """Skips a test if the model does not support tools, and checks that the error says so."""
    try:
        client.messages.create(**ASKED | {"max_tokens": 1}, tools=[WEATHER])
    except anthropic.BadRequestError as refusal:
        assert refusal.body["error"]["type"] == "invalid_request_error"
        assert "tools" in refusal.message
        pytest.skip(refusal.message)


def text(message):
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_question_is_answered(client):
    message = client.messages.create(**ASKED)
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.id.startswith("msg_") and message._request_id
    assert message.stop_reason in ("end_turn", "max_tokens") and message.stop_sequence is None
    assert text(message)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens > 0 and usage.output_tokens > 0


@ours
def test_our_model_knows_the_answer(client):
    assert text(client.messages.create(**ASKED)) == "The capital of Japan is Tokyo."


def test_a_token_is_taken_instead_of_a_key(network):
    client = anthropic.Anthropic(base_url=network.url, api_key=None, auth_token=network.key)
    assert client.messages.create(**ASKED | {"max_tokens": 1}).content


def test_a_streamed_answer_is_the_same(client):
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        pieces = list(stream.text_stream)
        streamed = stream.get_final_message()
    assert "".join(pieces) == text(streamed) == text(whole)
    assert (streamed.stop_reason, streamed.model) == (whole.stop_reason, MODEL)
    count = lambda usage: (usage.input_tokens + usage.cache_read_input_tokens, usage.output_tokens)
    assert count(streamed.usage) == count(whole.usage)


def test_events_come_in_their_order(client):
    types = [event.type for event in client.messages.create(**ASKED, stream=True)]
    assert types[:2] == ["message_start", "content_block_start"]
    assert types[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(types[2:-3]) == {"content_block_delta"}


def test_the_prompts_tokens_stand_at_the_beginning_of_a_stream(client):
    start = next(iter(client.messages.create(**ASKED, stream=True)))
    usage = start.message.usage
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted


def test_the_token_limit_ends_the_answer(client):
    message = client.messages.create(**ASKED | {"max_tokens": 2})
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 2)


def test_a_stop_sequence_ends_the_answer_and_is_named(client):
    answer = text(client.messages.create(**ASKED))
    stop = answer[4:9]
    asked = ASKED | {"stop_sequences": ["never said", stop]}
    message = client.messages.create(**asked)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text(message) == answer[: answer.index(stop)]
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().stop_sequence == stop


def test_instructions_come_as_a_text_or_in_blocks(client):
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    count = lambda system: client.messages.count_tokens(model=MODEL, messages=QUESTION, system=system).input_tokens
    plain = client.messages.count_tokens(model=MODEL, messages=QUESTION).input_tokens
    assert count("Be brief.") == count(blocks) > plain


def test_tokens_are_counted_and_more_text_is_more(client):
    count = lambda words: client.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": "word " * words}]
    ).input_tokens
    assert 0 < count(1) < count(20)


def test_an_answer_that_was_begun_is_continued(client):
    begun = "The capital of Japan"
    message = client.messages.create(**ASKED | {"messages": [*QUESTION, {"role": "assistant", "content": begun}]})
    assert message.content and not text(message).startswith(begun)
    if MODEL == OURS:
        assert text(message) == " is Tokyo."


def test_a_conversation_goes_on_with_what_was_answered(client):
    answer = client.messages.create(**ASKED)
    more = [*QUESTION, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "Really?"}]
    assert client.messages.create(**ASKED | {"messages": more}).stop_reason


def test_thinking_is_asked_for_and_forbidden(client):
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}, {"type": "adaptive"}):
        message = client.messages.create(**ASKED, thinking=thinking)
        thoughts = [block for block in message.content if block.type == "thinking"]
        assert all(block.thinking and block.signature for block in thoughts)
        assert not thoughts or thinking["type"] != "disabled"


def test_thoughts_are_taken_back(client):
    thought = {"type": "thinking", "thinking": "An island.", "signature": "whatever another server signed"}
    said = {"role": "assistant", "content": [thought, {"type": "text", "text": "Tokyo."}]}
    more = [*QUESTION, said, {"role": "user", "content": "Really?"}]
    assert client.messages.create(**ASKED | {"messages": more}).content


def test_what_means_nothing_here_is_passed_over(client):
    ignored = {
        "metadata": {"user_id": "ada"},
        "service_tier": "auto",
        "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}],
        "extra_body": GREEDY | {"context_management": {"edits": []}, "of_tomorrow": 1},
        "extra_headers": {"anthropic-beta": "context-management-2025-06-27"},
    }
    assert client.messages.create(**ASKED | ignored).content


class Verdict(BaseModel):
    answer: bool
    certain: bool


def test_an_answer_has_the_form_that_was_asked_for(client):
    form = {"type": "json_schema", "schema": {**Verdict.model_json_schema(), "additionalProperties": False}}
    message = client.messages.create(**ASKED, output_config={"format": form})
    Verdict.model_validate_json(text(message))


@pytest.mark.usefixtures("calls_tools")
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_that_must_be_used_is_used(client, choice):
    asked = ASKED | {"tools": [WEATHER], "tool_choice": choice}
    message = client.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    [call] = [block for block in message.content if block.type == "tool_use"]
    assert call.id and call.name == "weather" and call.input["city"] in ("Tokyo", "Kyoto")
    with client.messages.stream(**asked) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    [gathered] = [block for block in streamed.content if block.type == "tool_use"]
    assert gathered.input == call.input == json.loads("".join(parts))
    assert not any("weather" in text(answer) for answer in (message, streamed))


@pytest.mark.usefixtures("calls_tools")
def test_a_call_and_its_result_stand_in_a_conversation(client):
    asked = ASKED | {"tools": [WEATHER]}
    called = client.messages.create(**asked | {"tool_choice": {"type": "any"}})
    [call] = [block for block in called.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "12 degrees"}]}
    turns = [*QUESTION, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    none = client.messages.create(**asked | {"messages": turns, "tool_choice": {"type": "none"}})
    assert none.stop_reason in ("end_turn", "max_tokens")


@pytest.mark.usefixtures("calls_tools")
def test_the_sdk_runs_tools_by_itself(client):
    ran = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Tells the weather of a city."""
        ran.append(city)
        return f"In {city} it is warm."

    runner = client.beta.messages.tool_runner(**ASKED, tools=[weather], tool_choice={"type": "any"}, max_iterations=2)
    messages = list(runner)
    assert len(messages) == 2 and len(ran) >= 1


def test_models_are_listed_and_described(client):
    models = list(client.models.list())
    assert MODEL in [model.id for model in models]
    model = client.models.retrieve(MODEL)
    assert (model.type, model.id) == ("model", MODEL)
    assert model.created_at.year > 2020 and model.max_input_tokens > 0


@pytest.mark.parametrize("bad", ["sk-ant-something", "of another network"])
def test_a_bad_key_is_refused(connect, bad):
    key = {"of another network": variable("TETHER_FOREIGN_KEY")}.get(bad, bad)
    with pytest.raises(anthropic.AuthenticationError) as refusal:
        connect(key).messages.create(**ASKED)
    assert refusal.value.status_code == 401
    assert refusal.value.body["error"]["type"] == "authentication_error"
    assert refusal.value.request_id
    assert key not in str(refusal.value)


def test_an_unknown_model_is_not_found(client):
    for ask in (
        lambda: client.models.retrieve("claude-nothing"),
        lambda: client.messages.create(**ASKED | {"model": "claude-nothing"}),
        lambda: client.messages.create(**ASKED | {"model": "claude-nothing"}, stream=True),
        lambda: client.messages.count_tokens(model="claude-nothing", messages=QUESTION),
    ):
        with pytest.raises(anthropic.NotFoundError) as refusal:
            ask()
        assert refusal.value.body["error"]["type"] == "not_found_error"


@ours
@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_prompt_is_refused_in_the_words_that_clients_know(client, stream):
    messages = [{"role": "user", "content": "What is the capital of Japan? " * 200}]
    with pytest.raises(anthropic.BadRequestError) as refusal:
        client.messages.create(**ASKED | {"messages": messages}, stream=stream)
    assert "prompt is too long: " in refusal.value.message and "512 maximum" in refusal.value.message


def test_an_oversized_body_is_refused(client):
    messages = [{"role": "user", "content": "x" * (9 << 20)}]
    with pytest.raises(anthropic.RequestTooLargeError) as refusal:
        client.messages.create(**ASKED | {"messages": messages})
    assert refusal.value.status_code == 413


def test_an_image_is_refused_by_name(client):
    source = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    with pytest.raises(anthropic.BadRequestError) as refusal:
        client.messages.create(**ASKED | {"messages": messages})
    assert "images are not supported here: messages[0].content[0]" in refusal.value.message


@pytest.mark.parametrize(("param", "value"), [("top_p", 1.5), ("temperature", 1.5), ("max_tokens", 0), ("messages", [])])
def test_a_value_out_of_range_is_refused_and_named(client, param, value):
    with pytest.raises(anthropic.BadRequestError) as refusal:
        client.messages.create(**ASKED | {"extra_body": {param: value}})
    assert param in refusal.value.message


def test_a_stream_that_is_left_stops_the_engine(network, client):
    eventually("the engines rest", lambda: network.counter("tether_worker_requests_running") == 0)
    cancelled = network.counter("tether_engine_cancelled_total")
    asked = ASKED | {"messages": [{"role": "user", "content": "Tell me a story"}], "max_tokens": 400}
    for _ in range(5):
        stream = client.messages.create(**asked, stream=True)
        next(iter(stream))
        stream.close()
    # A short answer may have ended before its client left.
    eventually("the engines rest", lambda: network.counter("tether_worker_requests_running") == 0)
    assert network.counter("tether_engine_cancelled_total") > cancelled
