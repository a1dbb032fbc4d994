"""The network under test, whose engines are mocks, as `interop/run` started it."""

import os

import pytest

MODEL = "tether-tiny"
# The mock calls a function that is written so, and answers in words once it has the function's result.
QUESTION = "What is add(2, 3)?"


def variable(name):
    value = os.environ.get(name)
    if not value:
        pytest.exit(f"{name} is missing: start the tests by interop/run", returncode=2)
    return value


URL = variable("TETHER_URL")
KEY = variable("TETHER_API_KEY")
OPENAI = f"{URL}/v1"
