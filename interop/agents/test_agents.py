"""Coding agents, whose turns end without an error of the protocol.

The engines are mocks. `AGENTS_MODEL=model.gguf` has a network with this model answer instead, which may take long:
then a turn need not do what it was asked, but must end.
"""

import os
from pathlib import Path

import pytest
from coding_agents import AGENTS, ClaudeCode
from conftest import Network

MODEL = "tether-tiny"
REAL = os.environ.get("AGENTS_MODEL")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    network = Network(tmp_path_factory.mktemp("network"), *(["--model", REAL] if REAL else []))
    yield network
    network.stop()


@pytest.fixture(params=AGENTS)
def agent(request, network, tmp_path):
    return AGENTS[request.param](tmp_path / "home", network.url, network.key, MODEL)


def test_a_question_is_answered(agent, tmp_path):
    turn = agent.turn("Say hello.", tmp_path / "work")
    assert turn.status == 0, turn.output[-4000:]
    agent.check(turn)


def test_a_tool_is_used_and_its_result_is_read(agent, tmp_path):
    agent.check(agent.write(tmp_path / "work"))


def test_a_model_that_does_not_exist_is_an_error_that_claude_code_explains(network, tmp_path):
    turn = ClaudeCode(tmp_path / "home", network.url, network.key, "claude-nothing").turn("Say hello.", tmp_path / "work")
    assert turn.status != 0 and "claude-nothing" in turn.output
