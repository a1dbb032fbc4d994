"""Frameworks and coding agents take turns while a worker is killed every ten seconds, and no turn breaks.

The engines are mocks at a realistic pace, so most kills meet an answer. A killed worker is started again, as a
supervisor does, and the next kill waits until both workers serve. `KILLS` is how often; the kills end when every client
had a turn, too.
"""

import os
import threading
import time
from collections import Counter

import pytest
from coding_agents import AGENTS
from conftest import eventually
from test_rolling import WORKERS, Mesh
from turns import MODEL, TURNS

KILLS = int(os.environ.get("KILLS", "6"))
EVERY_SECS = 10
WORDS = 150
PACE = {"GGML_MOCK_FIRST_MS": "300", "GGML_MOCK_EACH_MS": "30", "GGML_MOCK_WORDS": str(WORDS)}


@pytest.fixture
def mesh(tmp_path, monkeypatch):
    for name, value in PACE.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "mesh"
    folder.mkdir()
    mesh = Mesh(folder)
    yield mesh
    mesh.kill()


class Clients:
    """Threads in which clients take turns."""

    def __init__(self, mesh, folder):
        self.url, self.key, self.folder = mesh.nodes["gateway-1"].url, mesh.key, folder
        self.stopping, self.lock = threading.Event(), threading.Lock()
        self.turns, self.broken = Counter(), []
        frameworks = [(f"{turn.__name__} {kind}", self.framework(turn, kind)) for turn, kinds in TURNS for kind in kinds]
        coders = [(name, self.agent(name)) for name in AGENTS]
        # The frameworks begin at two places, so that two of them run at once.
        rounds = [frameworks, frameworks[len(frameworks) // 2 :] + frameworks[: len(frameworks) // 2], coders]
        self.expected = {name for name, _ in frameworks + coders}
        self.threads = [threading.Thread(target=self.run, args=[turns]) for turns in rounds]
        for thread in self.threads:
            thread.start()

    def framework(self, turn, kind):
        return lambda _: turn(self.url, self.key, WORDS, kind)

    def agent(self, name):
        def turn(number):
            folder = self.folder / f"{name}-{number}"
            agent = AGENTS[name](folder / "home", self.url, self.key, MODEL)
            agent.check(agent.write(folder / "work"))

        return turn

    def run(self, turns):
        number = 0
        while not self.stopping.is_set():
            name, turn = turns[number % len(turns)]
            number += 1
            began = time.monotonic()
            try:
                turn(number)
                failure = None
            except Exception as error:
                failure = f"{name} after {time.monotonic() - began:.1f} s: {type(error).__name__}: {error}"
            with self.lock:
                self.turns[name] += 1
                if failure:
                    self.broken.append(failure)

    def had_turns(self):
        with self.lock:
            return self.expected <= self.turns.keys()

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join()


def kill(mesh, number):
    """Kills a worker, starts it again and waits until both serve."""
    node = mesh.nodes[WORKERS[number % len(WORKERS)]]
    node.process.kill()
    node.process.wait()
    node.start()
    eventually("the killed worker serves again", mesh.is_ready, seconds=60)


def words_of(log, field):
    """Counts the values of a field in the lines of a log that have it."""
    lines = [line.partition(f" {field}=")[2].split() for line in log.splitlines()]
    return Counter(words[0].strip('"') for words in lines if words)


def test_no_turn_breaks_while_workers_are_killed(mesh, tmp_path):
    clients, kills = Clients(mesh, tmp_path), 0
    try:
        while kills < KILLS or not clients.had_turns():
            next_kill = time.monotonic() + EVERY_SECS
            kill(mesh, kills)
            kills += 1
            print(f"{kills} kills, {sum(clients.turns.values())} turns, {len(clients.broken)} broken", flush=True)
            time.sleep(max(0, next_kill - time.monotonic()))
    finally:
        clients.stop()
    attempts = words_of(mesh.nodes["orchestrator"].logged(), "attempts")
    outcomes = words_of(mesh.nodes["gateway-1"].logged(), "outcome")
    moved = sum(count for tries, count in attempts.items() if int(tries) > 1)
    print("turns:", ", ".join(f"{name} {count}" for name, count in sorted(clients.turns.items())))
    print(
        f"{kills} kills, {sum(clients.turns.values())} turns, {len(clients.broken)} broken; "
        f"{sum(attempts.values())} jobs, of which another worker went on with {moved}; requests: {dict(outcomes)}"
    )
    assert not clients.broken, "\n".join(clients.broken)
    assert moved > 0, "no kill met an answer"
