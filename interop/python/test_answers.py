"""What clients get for valid requests."""

import asyncio

import openai
import pytest
from conftest import MODEL

QUESTION = "What is the capital of Japan?"
ANSWER = "The capital of Japan is Tokyo."


def test_the_models_are_listed(client):
    models = list(client.models.list())
    assert [model.id for model in models] == [MODEL, f"{MODEL}:pirate"]
    assert models[0].object == "model"
    assert models[0].owned_by == "tether"
    assert models[0].created > 0


def test_a_model_is_described(client):
    model = client.models.retrieve(MODEL)
    assert model.id == MODEL
    # Our additions to OpenAI's fields.
    assert model.state == "ready"
    assert model.context_length == 512
    assert len(model.digest) == 64


def test_a_question_is_answered(chat):
    completion = chat(QUESTION)
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == MODEL
    assert len(completion.choices) == 1
    choice = completion.choices[0]
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert completion._request_id


def test_usage_is_told(chat):
    usage = chat(QUESTION).usage
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def test_the_fingerprint_is_of_the_model(client, chat):
    assert chat().system_fingerprint == f"fp_{client.models.retrieve(MODEL).digest[:12]}"


def test_a_streamed_answer_is_the_same(chat):
    chunks = list(chat(QUESTION, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks), "usage was not asked for"


def test_a_long_answer_comes_in_many_pieces(chat):
    # The number of tokens in a piece depends on how fast it is read.
    assert len(list(chat("Tell me a story", stream=True))) > 5


def test_a_streamed_answer_ends_with_its_usage_where_asked(chat):
    *chunks, last = chat(QUESTION, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.model_dump() == chat(QUESTION).usage.model_dump()
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_the_sdk_gathers_a_stream(client):
    messages = [{"role": "user", "content": QUESTION}]
    with client.chat.completions.stream(model=MODEL, messages=messages, temperature=0) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"


def test_a_conversation_goes_on(client):
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello! How can I help you?"},
            {"role": "user", "content": [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of Japan?"}]},
        ],
        temperature=0,
    )
    assert "Tokyo" in completion.choices[0].message.content


def test_a_text_is_continued(client):
    completion = client.completions.create(model=MODEL, prompt="The capital of Japan", temperature=0)
    assert completion.object == "text_completion"
    assert completion.choices[0].text == " is Tokyo."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.system_fingerprint.startswith("fp_")


def test_a_text_is_continued_piece_by_piece(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(model=MODEL, prompt="The capital of Japan", temperature=0, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == " is Tokyo."
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens > 0


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_limit_of_tokens_ends_an_answer(chat, limit):
    completion = chat(QUESTION, **{limit: 3})
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 3
    text = completion.choices[0].message.content
    assert text and ANSWER.startswith(text) and text != ANSWER


def test_a_streamed_answer_tells_that_a_limit_ended_it(chat):
    chunks = list(chat(QUESTION, stream=True, max_tokens=3))
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", [" Tokyo", ["nowhere", "kyo"]])
def test_a_stop_text_ends_an_answer_and_is_left_out(chat, stop):
    expected = ANSWER.partition(stop if isinstance(stop, str) else stop[1])[0]
    whole = chat(QUESTION, stop=stop)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "stop"
    # If a stop sequence begins in one piece and ends in another, no part of it may be returned.
    streamed = list(chat(QUESTION, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected


def test_a_seed_repeats_an_answer(chat):
    def told(seed):
        return chat("Tell me a story", temperature=1, seed=seed, max_tokens=24).choices[0].message.content

    # The two workers take turns, so that a repetition shows that both agree.
    assert len({told(7) for _ in range(4)}) == 1
    assert len({told(seed) for seed in range(5)}) > 1, "the seed or the temperature changes nothing"


def test_bytes_that_are_cut_anywhere_are_told_alike_streamed_and_whole(chat):
    """At a high temperature, tokens contain any bytes, also invalid characters. Pieces are cut only between characters."""
    seen = ""
    for seed in range(8):
        # The whole distribution. Omitted settings would be the model's own, which cut off unlikely tokens.
        uncut = {"ignore_eos": True, "top_k": 0, "min_p": 0}
        draw = {"temperature": 2, "top_p": 1, "seed": seed, "max_tokens": 60, "extra_body": uncut}
        whole = chat("Tell me a story", **draw).choices[0].message.content
        streamed = chat("Tell me a story", stream=True, **draw)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole
        seen += whole
    assert not seen.isascii(), "nothing was proved"


def test_the_asynchronous_client_is_served_too(network):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{network.url}/v1", api_key=network.key) as client:
            messages = [{"role": "user", "content": QUESTION}]
            stream = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_together():
        return await asyncio.gather(*[ask() for _ in range(8)])

    assert asyncio.run(ask_together()) == [ANSWER] * 8
