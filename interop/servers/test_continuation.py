"""An answer whose engine is killed in the middle is complete all the same, for the SDK as it is."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
from conftest import Network, eventually, get

MODEL = "tether-tiny"
KILLS = int(os.environ.get("KILLS", "4"))
# A worker waits longer with each crash before it loads a model again, so a network lives for so many kills.
KILLS_EACH = 6
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 8},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}


@pytest.fixture
def start(tmp_path_factory):
    """Returns what starts a network in the place of the last one."""
    networks = []

    def start_another():
        for network in networks[-1:]:
            network.stop()
        networks.append(Network(tmp_path_factory.mktemp("network"), workers=2))
        return networks[-1]

    yield start_another
    networks[-1].stop()


def engines(network):
    """Returns the processes that hold a model."""
    children = []
    for thread in Path(f"/proc/{network.process.pid}/task").iterdir():
        try:
            children += (thread / "children").read_text().split()
        except OSError:
            pass
    return [int(child) for child in children]


def seconds_of(process):
    """Returns the processor time that a process has used, in ticks."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])
    except OSError:
        return 0


def ask(network, number, kill_at=None, **options):
    """Returns the text of an answer, its finish reason, and how often it was continued."""
    before = {engine: seconds_of(engine) for engine in engines(network)}
    question = [{"role": "user", "content": f"Tell me story {number}."}]
    with network.client() as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=question,
            seed=number,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"deterministic": True},
            **options,
        )
        text, reason, ids, continued, usage = "", None, set(), 0, None
        for count, chunk in enumerate(stream):
            ids.add(chunk.id)
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
            usage = chunk.usage or usage
            continued = (chunk.model_extra.get("tether") or {}).get("continued", 0)
            if count == kill_at:
                # The one that works is the one whose time has passed.
                busy = max(before, key=lambda engine: seconds_of(engine) - before[engine])
                os.kill(busy, signal.SIGKILL)
    assert len(ids) == 1
    return text, reason, continued, usage


def until_two_engines(network):
    def loaded():
        return sum(model["state"] == "ready" for model in network.cached(MODEL)) == 2 and len(engines(network)) == 2

    eventually("both engines are loaded", loaded, seconds=60)


@pytest.mark.parametrize("kind", ["story", "schema"])
def test_killed_engines_end_no_answer(start, kind):
    options = {"max_tokens": 300, "temperature": 0.8}
    if kind == "schema":
        format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
        options["response_format"] = format
    draw = random.Random(kind)
    continued = 0
    for kill in range(KILLS):
        if kill % KILLS_EACH == 0:
            network = start()
        until_two_engines(network)
        number = kill + (1_000 if kind == "schema" else 0)
        whole, reason, _, usage = ask(network, number, **options)
        kill_at = draw.randrange(2, 12)
        text, again, often, usage_again = ask(network, number, kill_at=kill_at, **options)
        assert (text, again) == (whole, reason), f"killed at chunk {kill_at}"
        assert usage_again.completion_tokens == usage.completion_tokens
        if kind == "schema" and reason == "stop":
            assert set(json.loads(text)) == {"name", "ages"}
        continued += often
    assert continued > 0, "no engine was killed in the middle of its answer"
    assert b"mid_stream" in (get(network.url, "/metrics", network.key) or b"")
