"""The Responses API. No test depends on the content of the answer, unless it is the demonstration model's."""

import time

import openai
import pytest
from conftest import MODEL, variable

QUESTION = "What is the capital of Japan?"


@pytest.fixture(scope="module")
def respond(client):
    """Asks one question, greedily unless a test sets otherwise."""

    def respond(question=QUESTION, **options):
        return client.responses.create(model=MODEL, input=question, **{"temperature": 0} | options)

    return respond


def ended(client, response_id, seconds=30):
    """Waits for the end of a response."""
    deadline = time.monotonic() + seconds
    while (response := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline, response.status
        time.sleep(0.05)
    return response


def test_a_question_is_answered(respond):
    response = respond(metadata={"for": "a test"}, instructions="Be brief.")
    assert (response.status, response.object, response.model) == ("completed", "response", MODEL)
    assert response.output_text
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.metadata == {"for": "a test"}


def test_the_events_of_a_stream_are_numbered_and_gathered_by_the_sdk(client, respond):
    whole = respond()
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == final.output_text


def test_an_answer_that_is_cut_is_incomplete(respond):
    response = respond(max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_an_answer_follows_a_schema(respond):
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
    response = respond(text={"format": {"type": "json_schema", "name": "verdict", "schema": schema, "strict": True}})
    assert response.output_text.replace(" ", "") in ('{"yes":true}', '{"yes":false}')


def test_a_stored_response_is_read_and_deleted(client, respond):
    response = respond()
    assert client.responses.retrieve(response.id) == response
    items = client.responses.input_items.list(response.id).data
    assert [(item.role, item.content[0].text) for item in items] == [("user", QUESTION)]
    client.responses.delete(response.id)
    for gone in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            gone(response.id)


def test_a_response_that_is_not_stored_is_not_found(client, respond):
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(respond(store=False).id)


def test_another_tenant_does_not_find_a_response(connect, respond):
    other = connect(variable("TETHER_LIMITED_KEY"))
    with pytest.raises(openai.NotFoundError):
        other.responses.retrieve(respond().id)


def test_a_conversation_goes_on_from_a_stored_response(client, respond):
    first = respond()
    second = respond("And of France?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    roles = [item.role for item in client.responses.input_items.list(second.id, order="asc").data]
    assert roles == ["user", "assistant", "user"]
    client.responses.delete(first.id)
    assert respond("And of Italy?", previous_response_id=second.id).status == "completed"
    with pytest.raises(openai.BadRequestError) as refusal:
        respond(previous_response_id=first.id)
    assert refusal.value.param == "previous_response_id"


def test_a_background_response_is_generated_without_its_client(client, respond):
    response = respond(background=True)
    assert response.status in ("queued", "in_progress", "completed") and response.background
    response = ended(client, response.id)
    assert (response.status, bool(response.output_text)) == ("completed", True)


def test_a_background_stream_is_resumed_after_any_event(client, respond):
    events = list(respond(background=True, stream=True))
    response_id = events[0].response.id
    for after in (0, 3, len(events) - 2):
        resumed = list(client.responses.retrieve(response_id, stream=True, starting_after=after))
        assert resumed == events[after + 1 :]


def test_a_background_response_is_cancelled(client, respond):
    response = respond("Count.", background=True, max_output_tokens=400)
    cancelled = client.responses.cancel(response.id)
    assert cancelled.status in ("cancelled", "completed", "incomplete")
    assert ended(client, response.id).status == cancelled.status


def test_only_a_background_response_can_be_cancelled(client, respond):
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(respond().id)


@pytest.fixture(scope="module")
def calls_functions(respond):
    """Skips a test if the model does not support function calls."""
    try:
        respond(tools=[{"type": "function", "name": "f"}], max_output_tokens=1)
    except openai.BadRequestError as refusal:
        assert (refusal.code, refusal.param) == ("unsupported_parameter", "tools")
        pytest.skip(refusal.message)


def test_a_custom_tool_gets_its_text_and_no_json(client, calls_functions):
    tools = [{"type": "custom", "name": "patch"}, {"type": "web_search"}]
    choice = {"type": "custom", "name": "patch"}
    with client.responses.stream(model=MODEL, input=QUESTION, tools=tools, tool_choice=choice, max_output_tokens=60) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.custom_tool_call_input.delta")
    call = events[-1].response.output[0]
    assert (call.type, call.name, call.input) == ("custom_tool_call", "patch", text)
    assert not text.startswith("{")


def test_a_function_of_a_namespace_is_called_by_both_parts_of_its_name(respond, calls_functions):
    schema = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Tokyo"]}}, "required": ["city"], "additionalProperties": False}
    tools = [{"type": "namespace", "name": "travel", "description": "Trips.", "tools": [{"type": "function", "name": "go", "parameters": schema}]}]
    call = respond(tools=tools, tool_choice="required").output[0]
    assert (call.type, call.namespace, call.name, call.arguments.replace(" ", "")) == ("function_call", "travel", "go", '{"city":"Tokyo"}')
    answer = respond(
        [
            {"role": "user", "content": QUESTION},
            call.model_dump(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "Done."},
        ],
        tools=tools,
        tool_choice="none",
    )
    assert answer.status == "completed"


def test_what_is_not_supported_is_refused_by_name(respond):
    with pytest.raises(openai.BadRequestError) as refusal:
        respond(conversation="conv_1")
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "conversation")
