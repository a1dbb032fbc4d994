"""pydantic-ai by three APIs, of which Responses is its default for `openai:`."""

import pytest
from anthropic import AsyncAnthropic
from conftest import KEY, MODEL, OPENAI, QUESTION, URL
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Verdict(BaseModel):
    holds: bool


@pytest.fixture(params=["responses", "chat", "messages"])
async def model(request):
    if request.param == "messages":
        async with AsyncAnthropic(base_url=URL, api_key=KEY, max_retries=0) as client:
            yield AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=client))
    else:
        kind = OpenAIResponsesModel if request.param == "responses" else OpenAIChatModel
        async with AsyncOpenAI(base_url=OPENAI, api_key=KEY, max_retries=0) as client:
            yield kind(MODEL, provider=OpenAIProvider(openai_client=client))


@pytest.fixture
def adder(model):
    """Returns an agent that adds, and the calls of its function."""
    agent, calls = Agent(model, instructions="Add."), []

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        calls.append((a, b))
        return a + b

    return agent, calls


async def test_a_function_is_called_and_its_result_is_read(adder):
    agent, calls = adder
    result = await agent.run(QUESTION)
    assert calls == [(2, 3)] and result.output and result.usage.requests == 2


async def test_a_stream_ends_with_the_same_answer(adder):
    agent, calls = adder
    async with agent.run_stream(QUESTION) as stream:
        texts = [text async for text in stream.stream_text(delta=True, debounce_by=None)]
    assert calls == [(2, 3)]
    assert "".join(texts) == (await agent.run(QUESTION)).output


async def test_a_conversation_goes_on(adder):
    agent, calls = adder
    first = await agent.run(QUESTION)
    assert (await agent.run("And add(4, 5)?", message_history=first.all_messages())).output
    assert calls == [(2, 3), (4, 5)]


@pytest.mark.parametrize("output", [ToolOutput, NativeOutput])
async def test_an_answer_has_the_type_that_is_asked_for(model, output):
    if output is NativeOutput and not model.profile.get("supports_json_schema_output"):
        pytest.skip("pydantic-ai knows no structured outputs for a model of this name by this API")
    agent = Agent(model, output_type=output(Verdict))
    assert isinstance((await agent.run("Is it so?")).output, Verdict)
