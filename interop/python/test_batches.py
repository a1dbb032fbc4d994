"""Files and batches, by OpenAI's SDK. No test depends on the content of an answer."""

import io
import json
import time

import openai
import pytest
from conftest import MODEL

ENDED = ("completed", "failed", "expired", "cancelled")


def line(number, url="/v1/chat/completions", **body):
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": {"model": MODEL} | body}


def chat(number):
    question = {"role": "user", "content": f"What is {number}?"}
    return line(number, messages=[question], max_tokens=8)


def upload(client, lines, **options):
    file = io.BytesIO("".join(json.dumps(each) + "\n" for each in lines).encode())
    return client.files.create(file=("requests.jsonl", file), purpose="batch", **options)


def run(client, lines, endpoint="/v1/chat/completions", **options):
    file = upload(client, lines)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)


def ended(client, batch_id, seconds=60):
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
    return batch


def results(client, file_id):
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


def test_a_file_is_uploaded_listed_read_and_deleted(client):
    file = upload(client, [chat(1)], expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.object, file.filename, file.purpose) == ("file", "requests.jsonl", "batch")
    assert file.expires_at - file.created_at == 3600
    assert client.files.retrieve(file.id).bytes == file.bytes
    assert json.loads(client.files.content(file.id).text) == chat(1)
    assert file.id in [each.id for each in client.files.list(purpose="batch", limit=2)]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_a_batch_answers_each_of_its_lines(client):
    refused = line(9, messages=[], max_tokens=8)
    batch = run(client, [chat(number) for number in range(8)] + [refused], metadata={"for": "a test"})
    assert (batch.status, batch.metadata) == ("validating", {"for": "a test"})
    batch = ended(client, batch.id)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (9, 8, 1)
    answers = results(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"line-{number}" for number in range(8)]
    assert all(answer["response"]["body"]["object"] == "chat.completion" for answer in answers)
    (error,) = results(client, batch.error_file_id)
    assert (error["custom_id"], error["response"]["status_code"]) == ("line-9", 400)
    assert batch.id in [each.id for each in client.batches.list(limit=3)]


@pytest.mark.parametrize(
    ("endpoint", "body", "kind"),
    [
        ("/v1/completions", {"prompt": "One, two,", "max_tokens": 4}, "text_completion"),
        ("/v1/responses", {"input": "What is one?", "max_output_tokens": 8}, "response"),
    ],
)
def test_a_batch_writes_what_its_endpoint_writes(client, endpoint, body, kind):
    batch = ended(client, run(client, [line(1, endpoint, **body)], endpoint).id)
    (answer,) = results(client, batch.output_file_id)
    assert answer["response"]["body"]["object"] == kind


def test_an_invalid_file_fails_its_batch(client):
    batch = ended(client, run(client, [chat(1), chat(1)]).id)
    assert batch.status == "failed"
    assert [(error.line, error.code) for error in batch.errors.data] == [(2, "duplicate_custom_id")]


def test_a_batch_is_cancelled(client):
    batch = run(client, [chat(number) for number in range(2000)])
    assert client.batches.cancel(batch.id).status == "cancelling"
    assert ended(client, batch.id).status == "cancelled"
