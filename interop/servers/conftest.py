"""A llama-server and a network that adopts it, both only for this test run."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest

HERE = Path(__file__).parent
TINY = HERE.parent.parent / "models" / "tiny.gguf"
# The name that is derived from the server's own name for the model, which is the path of its file.
MODEL = "tiny"


def eventually(what, condition, seconds=30):
    """Waits until the condition returns a true value, and returns this value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


def get(url, path, key=None):
    """Returns the body of a response, or `None` if the request fails."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        body = response.read()
        return body if response.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


class LlamaServer:
    """A server that can be killed and restarted on the same port."""

    def __init__(self, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = options
        self.start()

    def start(self):
        command = [sys.executable, HERE / "llama_server.py", TINY, str(self.port), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually("the server answers", lambda: get(self.url, "/health"))

    def kill(self):
        self.process.kill()
        self.process.wait()

    def busy_slots(self):
        return sum(slot["is_processing"] for slot in json.loads(get(self.url, "/slots")))


class Network:
    """`tether up` with one worker or more, further arguments, and settings as variables."""

    def __init__(self, folder, *arguments, settings=None, workers=1):
        self.data = folder / "data"
        self.log = (folder / "log").open("w+")
        command = [os.environ["TETHER_BIN"], "up", *arguments, "--workers", str(workers), "--bind", "127.0.0.1:0"]
        command += ["--data-dir", str(self.data)]
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
        environment["TETHER_GATEWAY__RATE_LIMIT__REQUESTS_PER_MINUTE"] = "0"
        environment |= settings or {}
        self.environment, self.guests = environment, []
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        try:
            self.url = eventually("it listens", lambda: self.read("address"))
            self.key = self.read("api-key")
            eventually("it is ready", lambda: get(self.url, "/readyz"))
        except BaseException:
            self.stop()
            raise

    def join(self, folder, *arguments):
        """Starts a further worker in a process of its own. The network must have `--listen`."""
        folder.mkdir()
        log = self.data.parent / "log"
        lines = lambda: [line.strip() for line in log.read_text().splitlines()]
        invites = lambda: [line for line in lines() if line.startswith("tether join ")]
        invite = eventually("it prints an invite", invites)[0].split()[2]
        command = [os.environ["TETHER_BIN"], "join", invite, "--listen", "127.0.0.1:0", *arguments]
        with (folder / "log").open("w") as output:
            guest = subprocess.Popen(
                [*command, "--data-dir", str(folder / "data")], stdout=output, stderr=output, env=self.environment
            )
        self.guests.append(guest)

    def read(self, name):
        path = self.data / name
        return path.read_text().strip() if path.exists() else ""

    def cached(self, name):
        """Returns the workers' reports about a model."""
        nodes = json.loads(get(self.url, "/admin/v1/nodes", self.key) or "{}")
        reports = [worker["report"] for worker in nodes.get("workers", [])]
        return [model for report in reports for model in report["modelCache"] if model["modelId"] == name]

    def client(self):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key)

    def stop(self):
        for guest in self.guests:
            guest.terminate()
            guest.wait(timeout=40)
        self.process.terminate()
        status = self.process.wait(timeout=40)
        with self.log:
            self.log.seek(0)
            assert status == 0, self.log.read()


@pytest.fixture(scope="session")
def server():
    server = LlamaServer()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def network(server, tmp_path_factory):
    network = Network(tmp_path_factory.mktemp("network"), "--adopt", server.url)
    yield network
    network.stop()


@pytest.fixture(scope="session")
def client(network):
    with network.client() as client:
        listed = lambda: MODEL in {model.id.partition("@")[0] for model in client.models.list()}
        eventually("the model is listed", listed)
        yield client
