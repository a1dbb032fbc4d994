"""The network under test, as `interop/run` started it."""

import http.client
import json
import os
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import openai
import pytest

MODEL = "tether-tiny"
JSON = {"Content-Type": "application/json"}


@dataclass
class Reply:
    """A response over plain HTTP."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self):
        return json.loads(self.body)

    def error(self):
        """Returns the error. It always has all four fields and no others."""
        envelope = self.json()
        assert list(envelope) == ["error"]
        assert set(envelope["error"]) == {"message", "type", "param", "code"}
        assert envelope["error"]["message"]
        assert self.headers["x-request-id"]
        return envelope["error"]


@dataclass
class Network:
    """A running network."""

    url: str
    key: str

    def call(self, method, path, body=None, headers=JSON, key=None, timeout=60):
        """Sends exactly this request, without the additions and corrections of an SDK. An empty key sends no header."""
        key = self.key if key is None else key
        headers = headers | ({"Authorization": f"Bearer {key}"} if key else {})
        body = json.dumps(body) if isinstance(body, dict) else body
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def counter(self, name):
        """Returns the sum of a metric over its labels. A metric that never changed is absent, and counts as 0."""
        text = self.call("GET", "/metrics").body.decode()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return sum(float(value) for series, value in lines if series.partition("{")[0] == name)


def eventually(what, condition, seconds=20):
    """Waits until the condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def variable(name):
    value = os.environ.get(name)
    if not value:
        pytest.exit(f"{name} is missing: start the tests by interop/run", returncode=2)
    return value


@pytest.fixture(scope="session")
def network():
    return Network(variable("TETHER_URL"), variable("TETHER_API_KEY"))


@pytest.fixture(scope="session")
def connect(network):
    """Makes an SDK client. Only its address and key are set, unless a test sets more."""

    def connect(key=network.key, **options):
        return openai.OpenAI(base_url=f"{network.url}/v1", api_key=key, **options)

    return connect


@pytest.fixture(scope="session")
def client(connect):
    return connect()


@pytest.fixture(scope="session")
def chat(client):
    """Asks one question, greedily unless a test sets otherwise."""

    def chat(question="What is the capital of Japan?", **options):
        messages = [{"role": "user", "content": question}]
        return client.chat.completions.create(model=MODEL, messages=messages, **{"temperature": 0} | options)

    return chat
