"""Request parameters other than the text. No test depends on the content of the answer."""

import json
import math
from typing import Literal

import openai
import pytest
from conftest import MODEL
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Tokyo", "Kyoto"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def calls_functions(client):
    """Skips a test if the model does not support function calls, and checks that the error says so."""
    try:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[WEATHER], max_tokens=1)
    except openai.BadRequestError as refusal:
        assert (refusal.code, refusal.param) == ("unsupported_parameter", "tools")
        pytest.skip(refusal.message)


@pytest.mark.usefixtures("calls_functions")
@pytest.mark.parametrize("stream", [False, True])
def test_functions_in_the_older_form_are_called_in_it(chat, stream):
    function = WEATHER["function"]
    answer = chat(functions=[function], function_call={"name": function["name"]}, max_tokens=60, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer if chunk.choices]
        calls = [choice.delta.function_call for choice in choices if choice.delta.function_call]
        name, arguments = calls[0].name, "".join(call.arguments or "" for call in calls)
        reason = choices[-1].finish_reason
    else:
        call, reason = answer.choices[0].message.function_call, answer.choices[0].finish_reason
        name, arguments = call.name, call.arguments
    assert (name, reason) == (function["name"], "function_call")
    assert json.loads(arguments)["city"] in ("Tokyo", "Kyoto")


def test_a_functions_result_in_the_older_form_is_part_of_the_history(client):
    call = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}
    history = [*MESSAGES, call, {"role": "function", "name": "weather", "content": "sunny"}]
    try:
        completion = client.chat.completions.create(model=MODEL, messages=history, max_tokens=4)
    except openai.BadRequestError as refusal:
        # The model's template may not know results of tools.
        assert refusal.code == "unsupported_parameter"
    else:
        assert completion.choices[0].message.role == "assistant"


class Verdict(BaseModel):
    answer: Literal["yes", "no"]
    certain: bool


def test_several_answers_are_told_apart(chat):
    completion = chat(n=3, temperature=1, max_tokens=8)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert all(choice.message.content and choice.finish_reason for choice in completion.choices)
    assert completion.usage.completion_tokens > 8


def test_several_streamed_answers_end_once_each(chat):
    *chunks, last = chat(n=3, temperature=1, max_tokens=8, stream=True, stream_options={"include_usage": True})
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == [0, 1, 2]
    roles = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.role]
    assert sorted(roles) == [0, 1, 2]
    assert last.choices == [] and last.usage.completion_tokens > 8


def test_the_first_of_several_answers_is_that_of_one(chat):
    options = {"temperature": 1, "seed": 7, "max_tokens": 8}
    alone = chat(**options).choices[0].message.content
    assert chat(n=2, **options).choices[0].message.content == alone


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_told(chat, stream):
    answer = chat(logprobs=True, top_logprobs=3, max_tokens=4, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert len(tokens) == 4
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.token == bytes(token.bytes).decode(errors="replace")
        assert token.top_logprobs == sorted(token.top_logprobs, key=lambda top: -top.logprob)


def test_a_texts_log_probabilities_come_in_columns(client):
    logprobs = client.completions.create(model=MODEL, prompt="The capital", max_tokens=3, logprobs=2).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 3
    assert logprobs.text_offset[0] == len("The capital") and sorted(logprobs.text_offset) == logprobs.text_offset


@pytest.mark.usefixtures("calls_functions")
def test_a_function_that_must_be_called_is_called(chat):
    completion = chat(tools=[WEATHER], tool_choice="required")
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.id and call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Tokyo", "Kyoto")


@pytest.mark.usefixtures("calls_functions")
def test_one_call_is_made_where_no_more_are_wanted(chat):
    choice = chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False).choices[0]
    assert (choice.finish_reason, len(choice.message.tool_calls)) == ("tool_calls", 1)


@pytest.mark.parametrize("predicted", ["something else altogether", "The capital of Japan is Tokyo."])
def test_a_prediction_does_not_change_the_answer(chat, predicted):
    plain = chat(max_tokens=8).choices[0].message.content
    content = [{"type": "text", "text": predicted}]
    assert chat(max_tokens=8, prediction={"type": "content", "content": content}).choices[0].message.content == plain


@pytest.mark.usefixtures("calls_functions")
def test_a_streamed_call_is_gathered_by_the_sdk(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = {"model": MODEL, "messages": MESSAGES, "tools": [WEATHER], "tool_choice": choice}
    with client.chat.completions.stream(**asked) as stream:
        completion = stream.get_final_completion()
    call = completion.choices[0].message.tool_calls[0]
    assert completion.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("weather", {"city"})


@pytest.mark.usefixtures("calls_functions")
def test_a_call_and_its_result_stand_in_a_conversation(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Tokyo"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    completion = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=4)
    assert completion.choices[0].message.tool_calls is None
    assert completion.choices[0].finish_reason in ("length", "stop")


def test_a_prompt_is_counted_as_an_answer_to_it_counts_it(client, chat):
    asked = {"model": MODEL, "messages": MESSAGES}
    counted = client.post("/chat/completions/input_tokens", body=asked, cast_to=dict)
    assert counted == {"object": "response.input_tokens", "input_tokens": chat(max_tokens=1).usage.prompt_tokens}


def test_an_answer_keeps_to_a_schema(client):
    completion = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Verdict)
    assert completion.choices[0].message.parsed.answer in ("yes", "no")


def test_an_answer_is_json_where_that_is_asked_for(chat):
    answer = chat(response_format={"type": "json_object"}, max_tokens=200).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


def test_texts_become_vectors_of_length_one(client):
    # By default, the SDK requests Base64 and decodes it.
    texts = ["a cat", "a dog", "a cat"]
    packed = client.embeddings.create(model=MODEL, input=texts)
    assert [item.index for item in packed.data] == [0, 1, 2]
    assert packed.data[0].embedding == packed.data[2].embedding != packed.data[1].embedding
    assert math.isclose(sum(number**2 for number in packed.data[0].embedding), 1, rel_tol=1e-3)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert plain.data[1].embedding == pytest.approx(packed.data[1].embedding, rel=1e-6)


def test_vectors_of_another_length_are_refused(client):
    with pytest.raises(openai.BadRequestError) as refusal:
        client.embeddings.create(model=MODEL, input="x", dimensions=7)
    assert refusal.value.param == "dimensions"
