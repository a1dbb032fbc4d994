"""A paused stream sends keep-alives, which every client ignores."""

import http.client
import json
import os
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import Network, eventually, get
from pausing_server import ANSWER, MODEL, PAUSE_SECS, PLACES, PausingServer

HERE = Path(__file__).parent
INTEROP = HERE.parent
KEEP_ALIVE_MS = 50
QUESTIONS = [f"pause at {place}" for place in range(PLACES)]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    server = PausingServer()
    try:
        settings = {"TETHER_GATEWAY__KEEP_ALIVE_MS": str(KEEP_ALIVE_MS)}
        network = Network(tmp_path_factory.mktemp("network"), "--adopt", server.url, settings=settings)
        try:
            eventually("it is listed", lambda: MODEL in (get(network.url, "/v1/models", network.key) or b"").decode())
            eventually("it is attached", lambda: any(model["state"] == "ready" for model in network.cached(MODEL)))
            yield network
        finally:
            network.stop()
    finally:
        server.stop()


def stream(network, question):
    """Returns the lines of a stream as received."""
    connection = http.client.HTTPConnection(urlsplit(network.url).netloc, timeout=30)
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "stream": True}
    headers = {"Authorization": f"Bearer {network.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.status == 200
    lines = response.read().decode().splitlines()
    connection.close()
    return lines


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stream_that_pauses_says_so(network, question):
    lines = stream(network, question)
    assert lines.count(": keep-alive") >= PAUSE_SECS * 1000 / KEEP_ALIVE_MS / 4, lines
    assert all(lines[place + 1] != "" for place, line in enumerate(lines) if line == ": keep-alive"), lines
    assert [line for line in lines if line][-1] == "data: [DONE]"


def python(environment, script):
    return [INTEROP / environment / "bin" / "python", HERE / "pauses" / script]


CLIENTS = {
    "openai 1": python(".venv-openai-1", "openai_client.py"),
    "openai 2": python(".venv-openai-2", "openai_client.py"),
    "openai 3": python(".venv", "openai_client.py"),
    "langchain": python(".venv-openai-2", "langchain_client.py"),
    "litellm": python(".venv-openai-2", "litellm_client.py"),
    "openai for node": ["node", HERE / "pauses" / "openai_client.mjs"],
}


@pytest.mark.parametrize("command", CLIENTS.values(), ids=CLIENTS)
def test_a_pause_at_any_place_disturbs_no_client(network, tmp_path, command):
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OPENAI_BASE_URL": f"{network.url}/v1",
        "OPENAI_API_KEY": network.key,
        "MODEL": MODEL,
        "NODE_PACKAGES": str(INTEROP / "node" / "package.json"),
        # LiteLLM would otherwise fetch its list of prices.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    ran = subprocess.run([*command, *QUESTIONS], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"{''.join(ANSWER)} {len(ANSWER)}"] * PLACES
