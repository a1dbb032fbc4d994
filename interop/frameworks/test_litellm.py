"""LiteLLM, as a library that translates between the APIs and as a router."""

import litellm
import pytest
from conftest import KEY, MODEL, OPENAI, QUESTION, URL

MESSAGES = [{"role": "user", "content": QUESTION}]
PROPERTIES = {"a": {"type": "integer"}, "b": {"type": "integer"}}
ADD = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {"type": "object", "properties": PROPERTIES, "required": ["a", "b"]},
}
CHAT_TOOLS = [{"type": "function", "function": ADD}]
SERVERS = {
    f"openai/{MODEL}": OPENAI,
    f"hosted_vllm/{MODEL}": OPENAI,
    f"anthropic/{MODEL}": URL,
    f"ollama_chat/{MODEL}": URL,
}


@pytest.fixture(params=SERVERS)
def server(request):
    options = {"model": request.param, "api_base": SERVERS[request.param], "api_key": KEY, "max_retries": 0}
    return options | {"extra_headers": {"Authorization": f"Bearer {KEY}"}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_is_called_and_its_result_is_read(server, stream):
    def complete(messages):
        answer = litellm.completion(messages=messages, tools=CHAT_TOOLS, stream=stream, **server)
        return litellm.stream_chunk_builder(list(answer), messages=messages) if stream else answer

    asked = complete(MESSAGES).choices[0]
    [call] = asked.message.tool_calls
    assert (asked.finish_reason, call.function.name) == ("tool_calls", "add")
    result = {"role": "tool", "tool_call_id": call.id, "content": "5"}
    answer = complete([*MESSAGES, asked.message.model_dump(exclude_none=True), result])
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def test_an_answer_follows_a_schema(server):
    schema = {"type": "object", "properties": PROPERTIES, "required": ["a", "b"], "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema, "strict": True}}
    answer = litellm.completion(messages=[{"role": "user", "content": "hi"}], response_format=shape, **server)
    assert answer.choices[0].message.content.replace(" ", "") == '{"a":0,"b":0}'


@pytest.mark.parametrize("stream", [False, True])
def test_the_responses_api_answers(stream):
    tools = [{"type": "function", **ADD}]
    options = {"model": f"openai/{MODEL}", "api_base": OPENAI, "api_key": KEY, "stream": stream}
    answer = litellm.responses(input=QUESTION, tools=tools, **options)
    response = list(answer)[-1].response if stream else answer
    [call] = [item for item in response.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    answer = litellm.responses(input=[result], previous_response_id=response.id, tools=tools, **options)
    response = list(answer)[-1].response if stream else answer
    assert response.status == "completed" and response.output[-1].content[0].text


async def test_the_messages_api_answers():
    tools = [{"name": "add", "description": "Adds.", "input_schema": ADD["parameters"]}]
    options = {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": KEY, "max_tokens": 64}
    answer = await litellm.anthropic.messages.acreate(messages=MESSAGES, tools=tools, **options)
    assert answer["stop_reason"] == "tool_use" and answer["content"][-1]["input"] == {"a": 2, "b": 3}


def test_texts_and_vectors_are_answered():
    options = {"api_base": OPENAI, "api_key": KEY, "max_retries": 0}
    assert litellm.text_completion(model=f"text-completion-openai/{MODEL}", prompt="hi", **options).choices[0].text
    assert len(litellm.embedding(model=f"openai/{MODEL}", input=["a", "b"], **options).data) == 2


def test_a_prompt_that_does_not_fit_goes_to_the_fall_back():
    def deployment(name):
        return {"model_name": name, "litellm_params": {"model": f"openai/{MODEL}", "api_base": OPENAI, "api_key": KEY}}

    small = deployment("small")
    router = litellm.Router(
        [small, deployment("large")], context_window_fallbacks=[{"small": ["large"]}], num_retries=0
    )
    too_long = [{"role": "user", "content": "a " * 250_000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=too_long, max_retries=0, **small["litellm_params"])
    with pytest.raises(litellm.ContextWindowExceededError, match="large"):
        router.completion("small", too_long)
