"""A fake inference server that answers as a model which writes a file and then says so."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "coder"
CONTEXT = 200_000
CONTENT = "written by a model\n"
DONE = "The file is written."


def chunk(delta=None, finish_reason=None, **others):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return head | {"choices": choices} | others


def call(name, arguments):
    """Returns the chunks of a call, whose arguments come in two parts."""
    text = json.dumps(arguments)
    head = {"index": 0, "id": "call_1", "type": "function", "function": {"name": name, "arguments": text[:9]}}
    return [
        chunk({"content": "I write the file."}),
        chunk({"tool_calls": [head]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": text[9:]}}]}),
        chunk({}, "tool_calls"),
    ]


def answer(request):
    """Returns the chunks of an answer. The path of the file is the question's last word."""
    tools = {tool["function"]["name"] for tool in request.get("tools", [])}
    asked = [message for message in request["messages"] if message["role"] == "user"]
    question = next((line for message in asked for line in message["content"].splitlines() if "Write" in line), "")
    if "Write" in tools and question and not any(message["role"] == "tool" for message in request["messages"]):
        return call("Write", {"file_path": question.split()[-1], "content": CONTENT})
    return [chunk({"content": DONE}), chunk({}, "stop")]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        model = {"id": MODEL, "object": "model", "created": 1, "owned_by": "test", "max_model_len": CONTEXT}
        body = json.dumps({"object": "list", "data": [model]}).encode() if self.path == "/v1/models" else b"{}"
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(request)
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for data in [json.dumps(event) for event in [*answer(request), chunk(usage=usage)]] + ["[DONE]"]:
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

    def log_message(self, *_):
        """Keeps the test's output clean."""


class CodingServer:
    def __init__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.asked = []
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def asked(self):
        return self.server.asked

    def stop(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
