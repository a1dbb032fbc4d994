"""A worker adopts a running llama-server, and the network serves its model."""

from conftest import MODEL, eventually

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


def ask(client, **options):
    settings = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 16}
    return client.chat.completions.create(**settings | options)


def test_an_adopted_model_answers_as_its_server_does(client):
    answer = ask(client)
    assert "Tokyo" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 10 and answer.usage.completion_tokens > 1


def test_a_streamed_answer_is_the_same_and_tells_its_usage(client):
    whole = ask(client)
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    # A busy server joins tokens in a chunk. Of such a chunk, no more tokens are billed than its bytes show.
    for usage in (whole.usage, last.usage):
        assert len(text) / 4 <= usage.completion_tokens <= 16
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_texts_are_continued_and_seeds_repeat(client):
    options = {"model": MODEL, "prompt": "The capital", "max_tokens": 8, "temperature": 1.5, "seed": 7}
    first, second = (client.completions.create(**options) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert first.choices[0].finish_reason in ("stop", "length")


def test_a_prompt_that_does_not_fit_is_refused_by_its_numbers(client):
    refusal = client.with_options(max_retries=0).chat.completions.with_raw_response
    long = [{"role": "user", "content": "hi " * 3000}]
    try:
        refusal.create(model=MODEL, messages=long, max_tokens=1)
    except Exception as error:
        assert (error.status_code, error.code) == (400, "context_length_exceeded")
        assert "512" in error.message
    else:
        raise AssertionError("it was answered")


def test_a_client_that_leaves_frees_the_servers_slot(client, server):
    stream = ask(client, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
    next(stream)
    stream.close()
    eventually("the server rests", lambda: server.busy_slots() == 0, seconds=5)


def test_the_network_tells_that_nobody_attests_it(network, client):
    ask(client)
    (model,) = eventually("it is reported", lambda: network.cached(MODEL))
    assert (model["state"], model["attested"]) == ("ready", False)


def test_a_server_that_is_killed_and_comes_back_serves_again(network, client, server):
    server.kill()
    eventually("its loss is noticed", lambda: all(model["state"] != "ready" for model in network.cached(MODEL)))
    server.start()
    eventually("it is attached again", lambda: any(model["state"] == "ready" for model in network.cached(MODEL)), seconds=60)
    assert "Tokyo" in ask(client).choices[0].message.content
