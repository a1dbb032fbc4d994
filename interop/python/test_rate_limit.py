"""The rate limit is reached, reported, and obeyed."""

import time

import openai
import pytest
from conftest import MODEL, variable

ONE_TOKEN = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
# The limit that `interop/run` sets for this tenant.
PER_MINUTE, BURST = 60, 2


def wait_told(refusal):
    return int(refusal.response.headers["retry-after-ms"]) / 1000


def until_refused(client):
    """Sends requests until the limit is reached, and returns the refusal."""
    impatient = client.with_options(max_retries=0)
    with pytest.raises(openai.RateLimitError) as refusal:
        # A token bucket that never empties would allow all of these.
        for _ in range(20):
            impatient.chat.completions.create(**ONE_TOKEN)
    return refusal.value


@pytest.fixture(scope="module")
def limited(connect):
    return connect(variable("TETHER_LIMITED_KEY"))


def test_the_standing_is_told_with_every_answer(limited):
    answer = limited.chat.completions.with_raw_response.create(**ONE_TOKEN)
    assert answer.headers["x-ratelimit-limit-requests"] == str(PER_MINUTE)
    assert 0 <= int(answer.headers["x-ratelimit-remaining-requests"]) < BURST
    assert answer.headers["x-ratelimit-reset-requests"].endswith("s")


def test_one_request_too_many_is_refused(limited):
    refusal = until_refused(limited)
    assert refusal.status_code == 429
    assert refusal.code == "rate_limit_exceeded"
    assert refusal.type == "rate_limit_error"
    headers = refusal.response.headers
    assert headers["retry-after"] == "1"
    assert 0 < wait_told(refusal) <= 60 / PER_MINUTE
    assert headers["x-ratelimit-limit-requests"] == str(PER_MINUTE)
    assert headers["x-ratelimit-remaining-requests"] == "0"


def test_an_sdk_that_waits_as_told_is_answered(limited):
    told = wait_told(until_refused(limited))
    begun = time.monotonic()
    answer = limited.chat.completions.with_raw_response.create(**ONE_TOKEN)
    # There was one retry: the request was refused, and the returned wait was long enough.
    assert answer.retries_taken == 1
    assert answer.parse().choices[0].finish_reason == "length"
    assert time.monotonic() - begun < told + 5


def test_one_tenant_does_not_slow_another(limited, client):
    until_refused(limited)
    client.with_options(max_retries=0).chat.completions.create(**ONE_TOKEN)
