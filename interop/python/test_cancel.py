"""A client that leaves its stream stops the engine."""

import time
from contextlib import suppress

from conftest import MODEL, eventually

GENERATED = "tether_generation_tokens_total"
CANCELLED = "tether_engine_cancelled_total"
RUNNING = "tether_worker_requests_running"
LONG = {"max_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}


def test_a_long_answer_that_is_read_to_its_end_is_long(chat):
    """Without this test, the next one could pass because there was nothing to cancel."""
    *_, last = chat(**LONG, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == 400


def test_a_cancelled_stream_stops_the_engine(network, chat):
    eventually("the engines rest", lambda: network.counter(RUNNING) == 0)
    generated, cancelled = network.counter(GENERATED), network.counter(CANCELLED)

    stream = chat(**LONG)
    assert next(stream).choices
    stream.close()

    eventually("the engine is told", lambda: network.counter(CANCELLED) == cancelled + 1)
    eventually("the engine rests", lambda: network.counter(RUNNING) == 0)
    after = network.counter(GENERATED)
    # One decode step, and those until the cancel arrives. On a slow machine there are more, but never the rest of the answer.
    assert 0 < after - generated < 200

    # All tokens that are generated from here on belong to this answer.
    own = chat().usage.completion_tokens
    eventually("the answer is counted", lambda: network.counter(GENERATED) >= after + own)
    assert network.counter(GENERATED) == after + own
    assert network.counter(CANCELLED) == cancelled + 1, "an answer that is complete is not cancelled"


def test_many_cancelled_streams_leave_no_engine_busy(network, chat):
    """A cancel that a race occasionally loses occupies a slot for ever."""
    cancelled = network.counter(CANCELLED)
    for _ in range(30):
        stream = chat(**LONG)
        next(stream)
        stream.close()
    eventually("the engines are told", lambda: network.counter(CANCELLED) == cancelled + 30)
    eventually("the engines rest", lambda: network.counter(RUNNING) == 0)


def test_an_answer_that_is_waited_for_no_longer_stops_the_engine(network, client):
    """Without streaming, only the closed connection shows that the client has left."""
    messages = [{"role": "user", "content": "Tell me a story"}]
    long = {"model": MODEL, "messages": messages, "max_tokens": 450, "extra_body": {"ignore_eos": True}}
    begun = time.monotonic()
    client.chat.completions.create(**long)
    halfway = (time.monotonic() - begun) / 2

    cancelled = network.counter(CANCELLED)
    body = long | long.pop("extra_body")
    # Not by the SDK, which would ask again: its job goes on for a moment.
    # On a busy machine, the answer may have ended by then, or not begun, but hardly every time.
    for _ in range(5):
        with suppress(TimeoutError):
            network.call("POST", "/v1/chat/completions", body, timeout=halfway)
    eventually("the engine is told", lambda: network.counter(CANCELLED) > cancelled)
