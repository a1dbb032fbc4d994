"""A worker starts a llama-server itself, with the model file that it has verified."""

import hashlib
import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import HERE, TINY, Network, eventually

NAME = "tether-tiny"
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
SETTINGS = """
[[worker.models]]
model_id = "{name}"
version = "1.0"
digest = "{digest}"
server_command = ["{python}", "{script}", "{{model}}", "{{port}}"]
server_paths = ["{packages}", "{script}"]
"""


@pytest.fixture
def network(tmp_path):
    settings = tmp_path / "tether.toml"
    digest = hashlib.sha256(TINY.read_bytes()).hexdigest()
    script = HERE / "llama_server.py"
    values = {"python": sys.executable, "packages": sys.prefix, "script": script}
    settings.write_text(SETTINGS.format(name=NAME, digest=digest, **values))
    network = Network(tmp_path, "--config", str(settings))
    yield network
    network.stop()


def server_of(network):
    """Returns the process of the server that the network started."""
    threads = Path(f"/proc/{network.process.pid}/task").iterdir()
    children = [child for thread in threads for child in text_of(thread / "children").split()]
    return next((int(child) for child in children if "llama_server.py" in command_of(child)), None)


def command_of(process):
    return text_of(f"/proc/{process}/cmdline")


def text_of(path):
    """Returns what a file of `/proc` says, and nothing once its thread or process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def is_ready(network):
    return any(model["state"] == "ready" for model in network.cached(NAME))


def answer_of(network):
    with network.client() as client:
        answer = client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0)
        return answer.choices[0].message.content


def test_it_serves_the_verified_model_attested_and_is_started_again(network):
    eventually("it is loaded", lambda: is_ready(network), seconds=60)
    assert "Tokyo" in answer_of(network)
    # Reports omit this field unless it is false.
    assert all(model.get("attested", True) for model in network.cached(NAME))

    first = server_of(network)
    os.kill(first, signal.SIGKILL)
    eventually("its death is noticed", lambda: server_of(network) not in (None, first), seconds=60)
    eventually("it is loaded again", lambda: is_ready(network), seconds=60)
    assert "Tokyo" in answer_of(network)


def test_it_ends_with_its_worker(tmp_path, network):
    eventually("it is loaded", lambda: is_ready(network), seconds=60)
    server = server_of(network)
    network.process.terminate()
    network.process.wait(timeout=40)
    eventually("the server is gone", lambda: not command_of(server))
