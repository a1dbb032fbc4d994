"""Claude Code in its headless mode, whose turns end without an error of the protocol."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from coding_server import CONTENT, DONE, MODEL, CodingServer
from conftest import Network, eventually, get

CLAUDE = Path(__file__).parent / "node_modules" / ".bin" / "claude"


@pytest.fixture(scope="module")
def server():
    server = CodingServer()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def network(server, tmp_path_factory):
    network = Network(tmp_path_factory.mktemp("network"), "--adopt", server.url)
    try:
        eventually("it is listed", lambda: MODEL in (get(network.url, "/v1/models", network.key) or b"").decode())
        eventually("it is attached", lambda: any(model["state"] == "ready" for model in network.cached(MODEL)))
        yield network
    finally:
        network.stop()


@pytest.fixture
def claude(network, tmp_path):
    """Runs a turn of Claude Code in a folder of its own, and returns its events."""
    folder = tmp_path / "work"
    folder.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "ANTHROPIC_BASE_URL": network.url,
        "ANTHROPIC_AUTH_TOKEN": network.key,
        "ANTHROPIC_MODEL": MODEL,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }

    def run(prompt, *options):
        command = [CLAUDE, "-p", prompt, "--output-format", "stream-json", "--verbose", *options]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr
        return folder, [json.loads(line) for line in ran.stdout.splitlines()]

    return run


def test_a_question_is_answered(claude):
    _, events = claude("Say hello.")
    result = events[-1]
    assert (result["type"], result["subtype"], result["is_error"]) == ("result", "success", False)
    assert result["result"] == DONE


def test_a_tool_is_used_and_its_result_is_read(claude, server, tmp_path):
    path = tmp_path / "work" / "note.txt"
    folder, events = claude(f"Write a line to {path}", "--permission-mode", "acceptEdits")
    assert (events[-1]["subtype"], events[-1]["result"]) == ("success", DONE)
    assert (folder / "note.txt").read_text() == CONTENT
    results = [message for message in server.asked[-1]["messages"] if message["role"] == "tool"]
    assert len(results) == 1 and results[0]["tool_call_id"]


def test_a_model_that_does_not_exist_is_an_error_that_claude_code_explains(claude):
    with pytest.raises(AssertionError, match="claude-nothing"):
        claude("Say hello.", "--model", "claude-nothing")
