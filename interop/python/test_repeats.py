"""Connections that break in the middle of an answer: one execution, one charge, and the whole answer."""

import http.client
import json
import os
import random
import socket
import sqlite3
import struct
import threading
import urllib.parse

import openai
import pytest
from conftest import MODEL, Network, eventually, variable

CUTS = int(os.environ.get("CUTS", "12"))
# Without it, what else is evaluated at the same time may change an answer on some processors.
EXACT = {"deterministic": True}
RESET = struct.pack("ii", 1, 0)


class Cutter:
    """Passes bytes to the gateway, and cuts each connection that is to be cut after so many bytes of the answer."""

    def __init__(self, url):
        self.gateway = urllib.parse.urlsplit(url)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        # How many bytes the next connections pass. Those that follow are not cut.
        self.cuts = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            left = self.cuts.pop(0) if self.cuts else None
            threading.Thread(target=self.serve, args=(client, left), daemon=True).start()

    def serve(self, client, left):
        with client, socket.create_connection((self.gateway.hostname, self.gateway.port)) as server:
            for end in (client, server):
                # Not an orderly end: the peers see a reset, as when a machine is unplugged.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            request = threading.Thread(target=copy, args=(client, server, None), daemon=True)
            request.start()
            copy(server, client, left)
            request.join()


def copy(source, sink, left):
    """Copies up to the end, or so many bytes, and then ends both."""
    try:
        while data := source.recv(65536):
            sink.sendall(data if left is None else data[:left])
            if left is not None:
                left -= len(data)
                if left <= 0:
                    break
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@pytest.fixture
def cutter(network):
    cutter = Cutter(network.url)
    yield cutter
    cutter.listener.close()


class Ledger:
    """The jobs and the bills since this test began."""

    def __init__(self):
        self.before = self.counts()

    def counts(self):
        store = sqlite3.connect(f"file:{variable('TETHER_LEDGER')}?mode=ro", uri=True)
        try:
            return [store.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("jobs", "usage")]
        finally:
            store.close()

    def since(self):
        return tuple(now - before for now, before in zip(self.counts(), self.before, strict=True))


def question(number):
    return [{"role": "user", "content": f"Tell me story {number}."}]


@pytest.mark.parametrize("keyed", [True, False], ids=["with-key", "by-the-sdk-alone"])
def test_a_cut_connection_costs_nothing_and_loses_nothing(network, connect, cutter, keyed):
    draw = random.Random(str(keyed))
    with connect(max_retries=5) as direct:
        options = {"model": MODEL, "max_tokens": 60, "temperature": 0, "extra_body": EXACT}
        for cut in range(CUTS):
            expected = direct.chat.completions.create(messages=question(cut), **options)
            length = len(expected.to_json())
            cutter.cuts = [draw.randrange(1, length)]
            headers = {"Idempotency-Key": f"{draw.random()}"} if keyed else {}
            ledger = Ledger()
            # The SDK may have a connection left from its last request; each cut needs one of its own.
            with connect_through(cutter, network) as client:
                answer = client.chat.completions.create(messages=question(cut), extra_headers=headers, **options)
            assert answer.choices[0] == expected.choices[0], f"cut {cut}"
            assert answer.usage.completion_tokens == expected.usage.completion_tokens
            assert not cutter.cuts, "the connection was cut"
            assert ledger.since() == (1, 1), f"cut {cut}: one execution, one charge"


def connect_through(cutter, network):
    return openai.OpenAI(base_url=f"{cutter.url}/v1", api_key=network.key, max_retries=5)


def read_events(network: Network, cutter, body, key, last):
    """Reads events up to the end or the cut. Returns them with their ids, and whether the stream ended."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {network.key}", "Idempotency-Key": key}
    if last is not None:
        headers["Last-Event-ID"] = last
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(cutter.url).netloc, timeout=30)
    events, id, is_whole = [], None, False
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 200
        pending = b""
        while data := response.read1():
            pending += data
            while b"\n\n" in pending:
                event, pending = pending.split(b"\n\n", 1)
                for line in event.split(b"\n"):
                    if line.startswith(b"id: "):
                        id = line[4:].decode()
                    elif line == b"data: [DONE]":
                        is_whole = True
                    elif line.startswith(b"data: "):
                        events.append(json.loads(line[6:]))
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()
    return events, id, is_whole


def test_a_stream_is_resumed_by_its_last_event(network, cutter):
    draw = random.Random("streams")
    for cut in range(CUTS):
        body = {"model": MODEL, "messages": question(cut), "max_tokens": 60, "temperature": 0, "stream": True} | EXACT
        ledger, key = Ledger(), f"stream {draw.random()}"
        cutter.cuts = [draw.randrange(200, 6_000) for _ in range(2)]
        events, last, is_whole = [], None, False
        for _ in range(6):
            more, id, is_whole = read_events(network, cutter, body, key, last)
            events += more
            last = id or last
            if is_whole:
                break
        assert is_whole
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
        whole = network.call("POST", "/v1/chat/completions", body | {"stream": False}).json()
        assert text == whole["choices"][0]["message"]["content"], f"cut {cut}"
        assert len({event["id"] for event in events}) == 1
        eventually("the resumed stream is billed once", lambda: ledger.since() == (2, 2))


def test_one_key_at_once_is_one_job(network):
    ledger = Ledger()
    body = {"model": MODEL, "messages": question(7), "max_tokens": 40}
    headers = {"Content-Type": "application/json", "Idempotency-Key": f"{random.random()}"}
    replies = []
    ask = lambda: replies.append(network.call("POST", "/v1/chat/completions", body, headers))
    # A client has 64 connections at most.
    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(50):
        ask()
    assert {reply.status for reply in replies} == {200}
    assert len({reply.body for reply in replies}) == 1
    assert replies[-1].headers["idempotency-replayed"] == "true"
    assert ledger.since() == (1, 1)
    other = network.call("POST", "/v1/chat/completions", body | {"max_tokens": 41}, headers)
    assert (other.status, other.error()["code"]) == (422, "idempotency_key_reused")
