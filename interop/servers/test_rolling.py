"""Every process of a network is restarted in turn while clients ask, and no request fails.

Two gateways, as behind a load balancer: a client whose connection is refused goes to the other one. Nothing else is
tried again. `REQUESTS` is the least number of requests; the processes are restarted in turn for as long as that takes.
`DOWN` is how many seconds each process is away.
"""

import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time

import pytest
from conftest import eventually, get

MODEL = "tether-tiny"
REQUESTS = int(os.environ.get("REQUESTS", "200"))
DOWN = float(os.environ.get("DOWN", "1"))
CLIENTS = 4
GATEWAYS = ["gateway-1", "gateway-2"]
WORKERS = ["worker-1", "worker-2"]
# Short and long answers, whole and streamed.
KINDS = [(12, True), (12, False), (300, True), (12, True), (12, False)]
# Several stories, so that no worker has them all in its cache.
STORIES = 7


def free_port(kind):
    with socket.socket(socket.AF_INET, kind) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Node:
    """A process of the network, which keeps its addresses over restarts."""

    def __init__(self, folder, role):
        self.folder, self.role, self.process = folder, role, None
        self.flags = ["--listen", f"127.0.0.1:{free_port(socket.SOCK_DGRAM)}"]
        self.port = free_port(socket.SOCK_STREAM)
        if role == "gateway":
            self.flags += ["--bind", f"127.0.0.1:{self.port}"]
        self.url = f"http://127.0.0.1:{self.port}"
        folder.mkdir()

    def command(self, *arguments):
        return [os.environ["TETHER_BIN"], *arguments, "--data-dir", str(self.folder / "data")]

    def environment(self):
        variables = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        pace = {name: value for name, value in os.environ.items() if name.startswith("GGML_MOCK_")}
        return variables | pace | {"TETHER_GATEWAY__RATE_LIMIT__REQUESTS_PER_MINUTE": "0"}

    def start(self, *how):
        with (self.folder / "log").open("a") as log:
            command = self.command(*(how or [self.role]), *self.flags, "--with-parent")
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment())

    def run(self, *arguments):
        return subprocess.run(
            self.command(*arguments), env=self.environment(), check=True, capture_output=True, text=True
        ).stdout.strip()

    def read(self, name):
        path = self.folder / "data" / name
        return path.read_text().strip() if path.exists() else ""

    def logged(self):
        return (self.folder / "log").read_text()

    def stop(self):
        """Stops the process as an operator does, and returns how long that took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=90)
        assert status == 0, self.logged()
        return time.monotonic() - began


class Mesh:
    def __init__(self, folder):
        roles = {name: name.partition("-")[0] for name in ["registry", "orchestrator", *GATEWAYS, *WORKERS]}
        self.nodes = {name: Node(folder / name, role) for name, role in roles.items()}
        registry = self.nodes["registry"]
        try:
            registry.start()
            self.key = eventually("the registry makes a key", lambda: registry.read("api-key"))
            eventually("the registry founds a network", lambda: registry.read("pool.json"))
            for node in self.nodes.values():
                if node is not registry:
                    node.start(*registry.run("invite", "--role", node.role).split()[1:])
            eventually("the network is ready", self.is_ready, seconds=60)
        except BaseException:
            self.kill()
            raise

    def epochs(self, gateway):
        """Returns the workers that hold the model, each with the number of its start."""
        fleet = json.loads(get(self.nodes[gateway].url, "/admin/v1/nodes", self.key) or "{}")
        reports = [worker["report"] for worker in fleet.get("workers", [])]
        ready = lambda report: any(model["state"] == "ready" for model in report["modelCache"])
        return {report["workerId"]: report["epoch"] for report in reports if ready(report) and not report["draining"]}

    def is_ready(self):
        """Returns whether both gateways know both workers, with their latest start."""
        starts = sorted(int(self.nodes[name].read("nodes/worker.epoch") or -1) for name in WORKERS)
        return all(
            get(self.nodes[name].url, "/readyz") and sorted(self.epochs(name).values()) == starts for name in GATEWAYS
        )

    def restart(self, name):
        node = self.nodes[name]
        logged = len(node.logged())
        took = node.stop()
        time.sleep(DOWN)
        node.start()
        said = " on UDP " if name == "registry" else "on the network"
        eventually(f"{name} is back", lambda: said in node.logged()[logged:], seconds=60)
        eventually(f"the network is ready after {name}", self.is_ready, seconds=60)
        return took

    def kill(self):
        for node in self.nodes.values():
            if node.process and node.process.poll() is None:
                node.process.kill()
                node.process.wait()


class Load:
    """Clients that ask all the time."""

    def __init__(self, mesh):
        self.mesh = mesh
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.whole = {}
        self.asked, self.failed, self.slowest, self.continued = 0, [], 0, 0
        self.during = "nothing"
        for story in range(STORIES):
            for max_tokens in {max_tokens for max_tokens, _ in KINDS}:
                self.whole[story, max_tokens], _ = self.answer(story, max_tokens, stream=True)
        self.threads = [threading.Thread(target=self.run) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def connect(self, number):
        """Returns a connection to a gateway that accepts one."""
        for turn in range(len(GATEWAYS)):
            gateway = GATEWAYS[(number + turn) % len(GATEWAYS)]
            connection = http.client.HTTPConnection("127.0.0.1", self.mesh.nodes[gateway].port, timeout=120)
            try:
                connection.connect()
                return connection
            except ConnectionRefusedError:
                connection.close()
        raise AssertionError("both gateways refuse connections")

    def answer(self, number, max_tokens, stream):
        """Returns the text of an answer, and how often it was continued."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Tell me story {number % STORIES}."}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "deterministic": True,
            "seed": 7,
            "stream": stream,
        }
        headers = {"Authorization": f"Bearer {self.mesh.key}", "Content-Type": "application/json"}
        connection = self.connect(number)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            response = connection.getresponse()
            raw = response.read().decode()
        finally:
            connection.close()
        assert response.status == 200, f"status {response.status}: {raw}"
        if not stream:
            continued = int(response.headers.get("x-tether-continued") or 0)
            return json.loads(raw)["choices"][0]["message"]["content"], continued
        events = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
        assert events and events.pop() == "[DONE]", f"a stream without an end: {raw[-300:]}"
        events = [json.loads(event) for event in events]
        assert not any("error" in event for event in events), f"an error event: {events[-1]}"
        text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        return text, (events[-1].get("tether") or {}).get("continued", 0)

    def run(self):
        while not self.stopping.is_set():
            number = next(self.numbers)
            kind = KINDS[number % len(KINDS)]
            began, during, failure, continued = time.monotonic(), self.during, None, 0
            try:
                text, continued = self.answer(number, *kind)
                if text != self.whole[number % STORIES, kind[0]]:
                    failure = f"another text: {text[:300]}"
            except (AssertionError, OSError, http.client.HTTPException, ValueError) as error:
                failure = f"{type(error).__name__}: {error}"
            with self.lock:
                self.asked += 1
                self.continued += continued
                self.slowest = max(self.slowest, time.monotonic() - began)
                if failure:
                    self.failed.append(f"{kind} after {time.monotonic() - began:.1f} s, {during} to {self.during}: {failure}")

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def mesh(tmp_path):
    mesh = Mesh(tmp_path)
    yield mesh
    mesh.kill()


def test_a_rolling_restart_fails_no_request(mesh):
    load = Load(mesh)
    restarts = 0
    try:
        while restarts == 0 or load.asked < REQUESTS:
            for name in [*WORKERS, *GATEWAYS, "orchestrator", "registry"]:
                load.during = name
                took = mesh.restart(name)
                restarts += 1
                print(f"{name} stopped in {took:.1f} s; {load.asked} requests, {len(load.failed)} failed", flush=True)
    finally:
        load.during = "the end"
        load.stop()
        for name, node in mesh.nodes.items():
            if load.failed:
                print(f"--- {name}", *node.logged().splitlines()[-30:], sep="\n")
    print(
        f"{restarts} restarts, {load.asked} requests, {len(load.failed)} failed, {load.continued} continuations, "
        f"the slowest {load.slowest:.1f} s"
    )
    assert not load.failed, f"{len(load.failed)} of {load.asked} failed:\n" + "\n".join(load.failed[:20])
