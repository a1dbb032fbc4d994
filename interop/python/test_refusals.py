"""What clients get for requests that are refused."""

import openai
import pytest
from conftest import MODEL, variable

MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]


def mistyped(key):
    return key[:-1] + ("a" if key[-1] != "a" else "b")


@pytest.mark.parametrize("bad", ["sk-something", "mistyped", "of another network"])
def test_a_bad_key_is_refused(connect, network, bad):
    key = {"mistyped": mistyped(network.key), "of another network": variable("TETHER_FOREIGN_KEY")}.get(bad, bad)
    with pytest.raises(openai.AuthenticationError) as refusal:
        connect(key).chat.completions.create(model=MODEL, messages=MESSAGES)
    assert refusal.value.status_code == 401
    assert refusal.value.code == "invalid_api_key"
    assert refusal.value.response.headers["www-authenticate"] == "Bearer"
    assert key not in str(refusal.value), "a key does not come back into logs"


def test_a_bad_key_sees_no_models(connect):
    with pytest.raises(openai.AuthenticationError):
        connect("sk-something").models.list()


def test_an_unknown_model_is_not_found(client):
    for ask in (
        lambda: client.models.retrieve("gpt-nothing"),
        lambda: client.chat.completions.create(model="gpt-nothing", messages=MESSAGES),
        lambda: client.chat.completions.create(model="gpt-nothing", messages=MESSAGES, stream=True),
        lambda: client.completions.create(model="gpt-nothing", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError) as refusal:
            ask()
        assert refusal.value.code == "model_not_found"
        assert refusal.value.param == "model"
        assert "gpt-nothing" in refusal.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_prompt_is_refused(client, stream):
    messages = [{"role": "user", "content": "What is the capital of Japan? " * 200}]
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=messages, stream=stream)
    assert refusal.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens. However, your messages" in refusal.value.message
    assert refusal.value.type == "invalid_request_error"


def test_an_oversized_body_is_refused(client):
    messages = [{"role": "user", "content": "x" * (9 << 20)}]
    with pytest.raises(openai.APIStatusError) as refusal:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert refusal.value.status_code == 413
    assert refusal.value.code == "request_too_large"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("modalities", ["text", "audio"]),
        ("audio", {"format": "wav", "voice": "alloy"}),
        ("web_search_options", {"search_context_size": "low"}),
    ],
)
def test_what_is_not_done_here_is_refused_and_named(client, param, value):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, **{param: value})
    assert refusal.value.code == "unsupported_parameter"
    assert refusal.value.param == param


def test_the_part_of_a_message_that_is_not_done_here_is_named(client):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [picture]}])
    assert refusal.value.code == "unsupported_parameter"
    assert refusal.value.param == "messages[0].content[0]"
    assert "images" in refusal.value.message


@pytest.mark.parametrize(
    ("param", "value"), [("temperature", 9), ("top_p", -1), ("max_tokens", 0), ("messages", []), ("stop", 5)]
)
def test_a_value_out_of_range_is_refused_and_named(client, param, value):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, param: value})
    assert refusal.value.code == "invalid_value"
    assert refusal.value.param == param


def test_what_means_nothing_here_is_passed_over(client):
    options = {"user": "someone", "metadata": {"a": "b"}, "store": False, "extra_body": {"of_tomorrow": 1}}
    completion = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, **options)
    assert "Tokyo" in completion.choices[0].message.content
