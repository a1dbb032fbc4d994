"""A turn of each framework: a question, a call of a function, its result, and an answer in words.

No framework tries anything again: whatever breaks is seen.
"""

import asyncio
import subprocess
from pathlib import Path

import agents
import instructor
import litellm
import openai
from anthropic import AsyncAnthropic
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

MODEL = "tether-tiny"
QUESTION = "What is add(2, 3)?"
AI_SDK = Path(__file__).parent.parent / "ai-sdk" / "turn.js"
AI_SDK_APIS = ["responses", "chat", "messages", "compatible"]


class Person(BaseModel):
    name: str
    age: int


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def is_whole(text, words):
    """Returns whether a text is the whole answer of a mock."""
    return text.strip() == " ".join(f"tok{index}" for index in range(words))


def openai_agents(url, key, words, kind):
    async def turn():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            model = {"responses": agents.OpenAIResponsesModel, "chat": agents.OpenAIChatCompletionsModel}[kind]
            tools = [agents.function_tool(add)]
            agent = agents.Agent(name="adder", model=model(model=MODEL, openai_client=client), tools=tools)
            result = agents.Runner.run_streamed(agent, QUESTION)
            async for _ in result.stream_events():
                pass
            assert is_whole(result.final_output, words), result.final_output

    agents.set_tracing_disabled(True)
    asyncio.run(turn())


def pydantic_ai(url, key, words, kind):
    async def run(model):
        agent = Agent(model, tools=[add], model_settings={"max_tokens": 4096})
        async with agent.run_stream(QUESTION) as stream:
            text = await stream.get_output()
        assert is_whole(text, words), text

    async def turn():
        if kind == "messages":
            async with AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as client:
                return await run(AnthropicModel(MODEL, provider=AnthropicProvider(anthropic_client=client)))
        model = {"responses": OpenAIResponsesModel, "chat": OpenAIChatModel}[kind]
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            await run(model(MODEL, provider=OpenAIProvider(openai_client=client)))

    asyncio.run(turn())


def langchain(url, key, words, kind):
    of_openai = {"base_url": f"{url}/v1", "api_key": key, "max_retries": 0}
    if kind == "messages":
        model = ChatAnthropic(model=MODEL, base_url=url, api_key=key, max_retries=0, max_tokens=4096)
    elif kind == "ollama":
        model = ChatOllama(model=MODEL, base_url=url, client_kwargs={"headers": {"Authorization": f"Bearer {key}"}})
    else:
        model = ChatOpenAI(model=MODEL, use_responses_api=kind == "responses", **of_openai)
    model = model.bind_tools([add])
    asked = [HumanMessage(QUESTION)]
    called = join(model.stream(asked))
    [call] = called.tool_calls
    assert call["args"] == {"a": 2, "b": 3}, call
    answer = join(model.stream([*asked, called, ToolMessage("5", tool_call_id=call["id"])]))
    assert is_whole(answer.text, words), answer


def join(chunks):
    """Joins the chunks of a message."""
    whole = next(chunks)
    for chunk in chunks:
        whole += chunk
    return whole


def litellm_turn(url, key, words, kind):
    provider = {"chat": f"openai/{MODEL}", "messages": f"anthropic/{MODEL}"}[kind]
    base = f"{url}/v1" if kind == "chat" else url
    messages = [{"role": "user", "content": "hi"}]
    options = {"model": provider, "api_base": base, "api_key": key, "max_retries": 0, "num_retries": 0}
    chunks = litellm.completion(messages=messages, stream=True, max_tokens=4096, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert is_whole(text, words), text


def instructor_turn(url, key, words, kind):
    mode = {"chat": instructor.Mode.TOOLS, "responses": instructor.Mode.RESPONSES_TOOLS}[kind]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as sdk:
        client = instructor.from_openai(sdk, mode=mode, model=MODEL)
        messages = [{"role": "user", "content": "Who is it?"}]
        person = client.chat.completions.create(messages=messages, response_model=Person, max_retries=0)
    assert person.model_dump() == {"name": "tok0", "age": 0}, person


def ai_sdk(url, key, words, kind):
    ran = subprocess.run(["node", AI_SDK, url, key, kind], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and is_whole(ran.stdout, words), ran.stdout + ran.stderr[-2000:]


TURNS = [
    (openai_agents, ["responses", "chat"]),
    (pydantic_ai, ["responses", "chat", "messages"]),
    (langchain, ["responses", "chat", "messages", "ollama"]),
    (litellm_turn, ["chat", "messages"]),
    (instructor_turn, ["chat", "responses"]),
    (ai_sdk, AI_SDK_APIS),
]
