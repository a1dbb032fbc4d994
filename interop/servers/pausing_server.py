"""A fake inference server that pauses where the question says, like a server that evaluates another prompt first."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "pausing"
ANSWER = ["one ", "two ", "three"]
# Before each piece, before the finish reason, before the usage, and before the end.
PLACES = len(ANSWER) + 3
PAUSE_SECS = 0.4


def chunk(delta=None, finish_reason=None, **others):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return head | {"choices": choices} | others


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        listed = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "test", "max_model_len": 4096}]}
        body = json.dumps(listed).encode() if self.path == "/v1/models" else b"{}"
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        place = int(request["messages"][-1]["content"].split()[-1])
        usage = {"prompt_tokens": 3, "completion_tokens": len(ANSWER), "total_tokens": 3 + len(ANSWER)}
        events = [chunk({"content": text}) for text in ANSWER]
        events += [chunk({}, "stop"), chunk(usage=usage)]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number, data in enumerate([json.dumps(event) for event in events] + ["[DONE]"]):
            if number == place:
                time.sleep(PAUSE_SECS)
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

    def log_message(self, *_):
        """Keeps the test's output clean."""


class PausingServer:
    def __init__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
