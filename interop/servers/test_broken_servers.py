"""An answer whose llama-server is killed in the middle goes on at another one with the same model."""

import openai
import pytest
from conftest import MODEL, LlamaServer, Network, eventually, get

QUESTION = [{"role": "user", "content": "Tell me a long story about Tokyo."}]
SCHEMA = {"type": "object", "properties": {"tale": {"type": "string", "minLength": 600}}, "required": ["tale"]}


@pytest.fixture
def pair(tmp_path):
    """Returns two servers, each with a worker of its own in one network."""
    servers = [LlamaServer(), LlamaServer()]
    network = None
    try:
        network = Network(tmp_path, "--listen", "127.0.0.1:0", "--adopt", servers[0].url)
        network.join(tmp_path / "second", "--adopt", servers[1].url)
        eventually("both serve the model", lambda: len(ready(network)) == 2, seconds=60)
        yield network, servers
    finally:
        if network:
            network.stop()
        for server in servers:
            server.kill()


def ready(network):
    return [model for model in network.cached(MODEL) if model["state"] == "ready"]


def read(stream, servers, kill_at=None):
    """Returns the text of a stream, its ids, and how often it was continued."""
    text, ids, continued, pieces = "", set(), 0, 0
    for chunk in stream:
        ids.add(chunk.id)
        continued = (chunk.model_extra.get("tether") or {}).get("continued", continued)
        for choice in chunk.choices:
            piece = getattr(choice, "text", None) or getattr(getattr(choice, "delta", None), "content", None) or ""
            text += piece
            pieces += bool(piece)
        if kill_at and pieces >= kill_at:
            kill_at = None
            busy = [server for server in servers if server.process.poll() is None and server.busy_slots()]
            for server in busy:
                server.kill()
    return text, ids, continued


def chat(network, **options):
    settings = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 200, "stream": True}
    return network.client().chat.completions.create(**settings | options, extra_body={"ignore_eos": True})


def complete(network):
    settings = {"model": MODEL, "prompt": "The capital of Japan", "temperature": 0, "max_tokens": 200, "stream": True}
    return network.client().completions.create(**settings, extra_body={"ignore_eos": True})


@pytest.mark.parametrize("ask", [chat, complete])
def test_an_answer_goes_on_at_another_server(pair, ask):
    network, servers = pair
    whole, _, _ = read(ask(network), servers)
    text, ids, continued = read(ask(network), servers, kill_at=3)
    assert (len(ids), continued) == (1, 1), "no server was killed in the middle of its answer"
    # Long after the cut, sums in another order may make the server choose other words.
    assert text[:120] == whole[:120] and len(text) > 120
    assert b"mid_stream" in get(network.url, "/metrics", network.key)


def test_a_constrained_answer_ends_with_an_error(pair):
    network, servers = pair
    format = {"type": "json_schema", "json_schema": {"name": "tale", "schema": SCHEMA, "strict": True}}
    with pytest.raises(openai.APIError):
        read(chat(network, response_format=format), servers, kill_at=3)
