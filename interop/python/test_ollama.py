"""Ollama's own client for Python."""

import contextlib
import json

import ollama
import pytest
from conftest import MODEL

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
ANSWER = "The capital of Japan is Tokyo."
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(network):
    client = ollama.Client(host=network.url, headers={"Authorization": f"Bearer {network.key}"})
    yield client
    client.close()


def test_a_conversation_is_answered(client):
    answer = client.chat(MODEL, QUESTION, options=GREEDY)
    assert answer.message.content == ANSWER
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.eval_count > 0 and answer.prompt_eval_count > 0 and answer.total_duration > 0


def test_a_streamed_answer_is_the_same(client):
    parts = list(client.chat(MODEL, QUESTION, stream=True, options=GREEDY))
    assert "".join(part.message.content for part in parts) == ANSWER
    assert len(parts) > 3 and [part.done for part in parts[-2:]] == [False, True]


def test_a_text_is_answered(client):
    answer = client.generate(MODEL, "What is the capital of Japan?", options=GREEDY)
    assert answer.response == ANSWER
    parts = client.generate(f"{MODEL}:latest", "What is the capital of Japan?", stream=True, options=GREEDY)
    assert "".join(part.response for part in parts) == ANSWER


def test_options_hold(client):
    answer = client.chat(MODEL, QUESTION, options=GREEDY | {"num_predict": 2})
    assert (answer.done_reason, answer.eval_count) == ("length", 2)
    answer = client.chat(MODEL, QUESTION, options=GREEDY | {"stop": [" Tokyo"]})
    assert answer.message.content == "The capital of Japan is"


def test_an_answer_follows_its_schema(client):
    city = {"type": "string", "enum": ["Osaka", "Tokyo"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    answer = client.chat(MODEL, QUESTION, format=schema, options=GREEDY | {"num_predict": 200})
    assert json.loads(answer.message.content)["city"] in city["enum"]


def test_vectors(client):
    several = client.embed(MODEL, ["one", "two"])
    assert len(several.embeddings) == 2 and len(several.embeddings[0]) > 8
    assert client.embeddings(MODEL, "one").embedding == pytest.approx(several.embeddings[0], abs=1e-4)


def test_models_are_listed_shown_and_there(client):
    names = [model.model for model in client.list().models]
    assert f"{MODEL}:latest" in names
    for name in names:
        assert "completion" in client.show(name).capabilities
    client.generate(MODEL, "")
    assert f"{MODEL}:latest" in [model.model for model in client.ps().models]
    assert [part.status for part in client.pull(MODEL, stream=True)][-1] == "success"


def test_errors_are_ollamas(client, network):
    with pytest.raises(ollama.ResponseError) as refused:
        client.chat("absent", QUESTION)
    assert refused.value.status_code == 404 and "absent" in refused.value.error
    with contextlib.closing(ollama.Client(host=network.url)) as stranger, pytest.raises(ollama.ResponseError) as refused:
        stranger.list()
    assert refused.value.status_code == 401
    with pytest.raises(ollama.ResponseError) as refused:
        client.chat(MODEL, [{"role": "user", "content": "?", "images": [b"png"]}])
    assert refused.value.status_code == 400 and "images" in refused.value.error
