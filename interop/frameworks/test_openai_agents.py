"""openai-agents, whose default is the Responses API."""

import agents
import pytest
from agents import Agent, ModelSettings, Runner, function_tool
from conftest import KEY, MODEL, OPENAI, QUESTION
from openai import AsyncOpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    holds: bool


@pytest.fixture(params=["responses", "chat_completions"])
async def api(request):
    async with AsyncOpenAI(base_url=OPENAI, api_key=KEY, max_retries=0) as client:
        agents.set_default_openai_client(client, use_for_tracing=False)
        agents.set_default_openai_api(request.param)
        agents.set_tracing_disabled(True)
        yield request.param


def adder(**options):
    """Returns an agent that adds, and the calls of its function."""
    calls = []

    @function_tool
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        calls.append((a, b))
        return a + b

    return Agent(name="adder", instructions="Add.", model=MODEL, tools=[add], **options), calls


async def test_a_function_is_called_and_its_result_is_read(api):
    agent, calls = adder()
    result = await Runner.run(agent, QUESTION)
    assert calls == [(2, 3)] and result.final_output
    assert result.context_wrapper.usage.requests == 2 and result.context_wrapper.usage.output_tokens > 0


async def test_a_stream_ends_with_the_same_answer(api):
    agent, calls = adder()
    result = Runner.run_streamed(agent, QUESTION)
    kinds = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
    assert kinds == ["tool_called", "tool_output", "message_output_created"] and calls == [(2, 3)]
    assert result.final_output == (await Runner.run(agent, QUESTION)).final_output


async def test_a_conversation_goes_on(api):
    agent, calls = adder()
    first = await Runner.run(agent, QUESTION)
    second = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": "And add(4, 5)?"}])
    assert calls == [(2, 3), (4, 5)] and second.final_output


async def test_an_answer_has_the_type_that_is_asked_for(api):
    agent = Agent(name="judge", model=MODEL, output_type=Verdict)
    assert isinstance((await Runner.run(agent, "Is it so?")).final_output, Verdict)


async def test_an_agent_hands_over_to_another(api):
    helper = Agent(name="helper", model=MODEL)
    agent = Agent(name="first", model=MODEL, handoffs=[helper])
    result = await Runner.run(agent, "Please transfer_to_helper().")
    assert result.last_agent.name == "helper" and result.final_output


async def test_a_function_that_must_be_called_is_called(api):
    agent, calls = adder(model_settings=ModelSettings(tool_choice="required", parallel_tool_calls=False, temperature=0))
    await Runner.run(agent, "hi")
    assert calls == [(0, 0)]
