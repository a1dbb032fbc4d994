"""Plain HTTP: our own endpoints, their description, and errors that no SDK would cause."""

import json

import pytest
from conftest import JSON, MODEL
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

JOB = {"modelId": MODEL, "input": {"prompt": "The capital of Japan", "temperature": 0}}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}


def test_a_native_job_is_answered_in_lines_of_json(network):
    reply = network.call("POST", "/infer", JOB)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.body.endswith(b"\n")
    chunks = [json.loads(line) for line in reply.body.splitlines()]
    assert [chunk["seq"] for chunk in chunks] == list(range(len(chunks)))
    assert {chunk["correlationId"] for chunk in chunks} == {reply.headers["x-request-id"]}
    assert [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert "".join(chunk["payload"].get("text", "") for chunk in chunks) == " is Tokyo."
    last = chunks[-1]["payload"]
    assert last["finishReason"] == "stop"
    tokens = sum(len(chunk["payload"].get("tokens", [])) for chunk in chunks)
    assert last["usage"]["completionTokens"] == tokens > 0
    assert last["usage"]["promptTokens"] > 0


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"modelId": "nothing"}, 404, "model_not_found", "modelId"),
        ({"modelId": None}, 400, "missing_model", "modelId"),
        ({"input": {}}, 400, "invalid_value", "input"),
        ({"input": {"prompt": "x", "topP": 5}}, 400, "invalid_value", "input.topP"),
        ({"input": {"prompt": "capital " * 2000}}, 400, "context_length_exceeded", "input.prompt"),
    ],
)
def test_a_native_job_that_cannot_be_done_is_refused_in_its_own_words(network, change, status, code, param):
    body = {field: value for field, value in (JOB | change).items() if value is not None}
    reply = network.call("POST", "/infer", body)
    error = reply.error()
    assert (reply.status, error["code"], error["param"]) == (status, code, param)


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz"])
def test_probes_need_no_key(network, path):
    reply = network.call("GET", path, key="")
    assert (reply.status, reply.json()) == (200, {"status": "ok"})


def test_the_version_is_told(network):
    reply = network.call("GET", "/version", key="")
    assert reply.status == 200
    assert reply.json()["name"] == "tether"
    assert reply.json()["version"].count(".") == 2


WHOLE = json.dumps(CHAT | JOB | {"prompt": "x"}).encode()
BROKEN = [b"", b"{", b'{"model":', b"[]", b"null", b'"text"', b"\xff\xfe", WHOLE + b" x", b"{'model':1}", b"[" * 100_000]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/infer"])
@pytest.mark.parametrize("body", BROKEN, ids=lambda body: repr(body[:16]))
def test_bad_json_is_refused(network, path, body):
    reply = network.call("POST", path, body)
    error = reply.error()
    assert (reply.status, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_json")
    assert "struct" not in error["message"], "what our types are called is no help to a client"


def test_a_model_that_is_not_named_is_missed(network):
    reply = network.call("POST", "/v1/chat/completions", {"messages": CHAT["messages"]})
    error = reply.error()
    assert (reply.status, error["code"], error["param"]) == (400, "missing_model", "model")


def test_an_oversized_body_is_refused_however_it_comes(network):
    size = 9 << 20
    for body in (b" " * size, iter([b" " * 65_536] * (size // 65_536))):
        reply = network.call("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.error()["code"]) == (413, "request_too_large")


def test_an_unknown_path_is_not_found(network):
    for path in ("/v1", "/v1/nothing", "/v1/models/a/b", "/v2/models"):
        reply = network.call("GET", path)
        assert (reply.status, reply.error()["code"]) == (404, "not_found")


def test_a_method_that_is_not_taken_is_told_which_are(network):
    for method, path, allowed in (("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/models", "GET")):
        reply = network.call(method, path)
        assert (reply.status, reply.error()["code"]) == (405, "method_not_allowed")
        assert allowed in reply.headers["allow"]


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/plain"}, {"Content-Type": "application/xml"}, JSON | {"Content-Encoding": "gzip"}],
)
def test_a_body_that_says_it_is_something_else_is_refused(network, headers):
    reply = network.call("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), headers)
    assert (reply.status, reply.error()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/x-www-form-urlencoded"}])
def test_a_body_of_no_type_or_of_curls_is_json(network, headers):
    reply = network.call("POST", "/v1/chat/completions", json.dumps(CHAT).encode(), headers)
    assert reply.status == 200


def test_a_path_that_is_no_text_gets_an_error_like_any_other(network):
    reply = network.call("GET", "/v1/models/%ff")
    assert (reply.status, reply.error()["code"]) == (404, "not_found")


def test_a_last_message_is_gone_on_with_and_a_deterministic_answer_repeats(network):
    said = CHAT["messages"] + [{"role": "assistant", "content": "The capital of Japan"}]
    reply = network.call("POST", "/v1/chat/completions", CHAT | {"messages": said, "continue_final_message": True})
    assert reply.json()["choices"][0]["message"]["content"] == " is Tokyo."
    asked = {"model": MODEL, "messages": CHAT["messages"], "seed": 7, "deterministic": True}
    first, second = (network.call("POST", "/v1/chat/completions", asked).json() for _ in range(2))
    assert first["choices"] == second["choices"]


def test_what_a_request_leaves_open_is_sampled_as_the_model_says(network):
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "What is 3 + 4?"}]}
    answers = [network.call("POST", "/v1/chat/completions", asked | {"seed": seed}).json() for seed in range(30)]
    right = sum("3 + 4 = 7" in answer["choices"][0]["message"]["content"] for answer in answers)
    assert right >= 28


def test_json_with_a_charset_is_taken(network):
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert network.call("POST", "/v1/chat/completions", CHAT, headers).status == 200


def test_without_a_key_nothing_is_answered(network):
    for method, path, body in (
        ("GET", "/v1/models", None),
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/completions", {"model": MODEL, "prompt": "x"}),
        ("POST", "/infer", JOB),
    ):
        reply = network.call(method, path, body, key="")
        assert (reply.status, reply.error()["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"


def test_a_stream_is_framed_as_events(network):
    reply = network.call("POST", "/v1/chat/completions", CHAT | {"stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.body.decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    ids = []
    for event in events[:-1]:
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        json.loads(fields["data"])
        ids.append(int(fields["id"]))
    assert ids == list(range(len(ids)))


class Description:
    """Our OpenAPI document."""

    def __init__(self, document):
        self.document = document

    def check(self, method, path, status, answer):
        """Fails unless the response matches the description."""
        response = self.resolve(self.document["paths"][path][method]["responses"][str(status)])
        schema = response["content"]["application/json"]["schema"]
        OAS31Validator({**schema, "components": self.document["components"]}).validate(answer)

    def resolve(self, part):
        while "$ref" in part:
            target = self.document
            for name in part["$ref"].removeprefix("#/").split("/"):
                target = target[name.replace("~1", "/").replace("~0", "~")]
            part = target
        return part


@pytest.fixture(scope="module")
def description(network):
    reply = network.call("GET", "/openapi.json", key="")
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    return Description(reply.json())


def test_the_description_is_sound(description):
    assert description.document["openapi"].startswith("3.1")
    validate(description.document, cls=OpenAPIV31SpecValidator)
    paths = description.document["paths"]
    served = {"/v1/models", "/v1/chat/completions", "/v1/completions", "/infer"}
    assert served | {"/healthz", "/readyz", "/metrics", "/version"} <= set(paths)
    names = [call["operationId"] for path in paths.values() for call in path.values() if "operationId" in call]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("get", "/healthz", None, 200),
        ("get", "/readyz", None, 200),
        ("get", "/version", None, 200),
        ("get", "/v1/models", None, 200),
        ("get", "/admin/v1/nodes", None, 200),
        ("post", "/v1/chat/completions", CHAT, 200),
        ("post", "/v1/completions", {"model": MODEL, "prompt": "The capital of Japan"}, 200),
        ("post", "/v1/chat/completions", {}, 400),
        ("post", "/v1/completions", {"model": "nothing", "prompt": "x"}, 404),
        ("post", "/infer", {}, 400),
    ],
)
def test_answers_are_as_described(network, description, method, path, body, status):
    reply = network.call(method.upper(), path, body)
    assert reply.status == status
    description.check(method, path, status, reply.json())


def test_requests_that_are_answered_are_as_described(description):
    for path, body in (("/v1/chat/completions", CHAT), ("/infer", JOB)):
        request = description.resolve(description.document["paths"][path]["post"]["requestBody"])
        schema = request["content"]["application/json"]["schema"]
        OAS31Validator({**schema, "components": description.document["components"]}).validate(body)
