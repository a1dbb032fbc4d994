"""instructor, which parses answers into types, in each of its modes that the mock can follow."""

import anthropic
import instructor
import openai
import pytest
from conftest import KEY, MODEL, OPENAI, URL
from instructor import Mode
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "Who is it?"}]


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(params=[Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS, Mode.ANTHROPIC_TOOLS])
def client(request):
    if request.param is Mode.ANTHROPIC_TOOLS:
        with anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0) as sdk:
            yield instructor.from_anthropic(sdk, mode=request.param, model=MODEL, max_tokens=64)
    else:
        with openai.OpenAI(base_url=OPENAI, api_key=KEY, max_retries=0) as sdk:
            yield instructor.from_openai(sdk, mode=request.param, model=MODEL)


def test_an_answer_is_of_the_type_that_is_asked_for(client):
    person = client.chat.completions.create(messages=QUESTION, response_model=Person, max_retries=0)
    assert person.model_dump() == {"name": "tok0", "age": 0}


def test_a_stream_ends_with_the_same_answer(client):
    partial = client.chat.completions.create_partial(messages=QUESTION, response_model=Person, max_retries=0)
    assert list(partial)[-1].model_dump() == {"name": "tok0", "age": 0}
