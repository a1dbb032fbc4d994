"""A worker adopts a llama-server that makes embeddings."""

import math

import pytest
from conftest import MODEL, LlamaServer, Network, eventually


@pytest.fixture
def client(tmp_path):
    server = LlamaServer("embeddings")
    try:
        network = Network(tmp_path, "--adopt", server.url)
        try:
            eventually("it is attached", lambda: any(model["state"] == "ready" for model in network.cached(MODEL)))
            with network.client() as client:
                yield client
        finally:
            network.stop()
    finally:
        server.kill()


def test_texts_become_vectors_of_length_one(client):
    made = client.embeddings.create(model=MODEL, input=["What is 3 + 4?", "What is 3 + 5?"])
    first, second = (item.embedding for item in made.data)
    assert len(first) == len(second) > 1
    assert math.isclose(math.hypot(*first), 1, abs_tol=1e-4)
    assert first != second
    assert made.usage.prompt_tokens > 2
