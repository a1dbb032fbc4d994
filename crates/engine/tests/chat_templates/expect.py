"""Writes expected.json: what Python's jinja2, set up as Hugging Face sets it up, makes of the templates here.

By hand, after a template or a conversation changed:

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install jinja2 && /tmp/venv/bin/python expect.py
"""

import datetime
import json
import pathlib

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2025, 6, 15, 12, 0, 0)
# Templates that want the arguments of calls as text, and those that want content in parts.
ARGUMENTS_AS_TEXT = {"deepseek_r1"}
CONTENT_IN_PARTS = {"parts"}


class Generation(Extension):
    """`{% generation %}`, which marks text and changes none."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise TemplateError(message)


def environment():
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = NOW.strftime
    return made


def message_of(said, family):
    message = {"role": said["role"], "content": said["content"]}
    if family in CONTENT_IN_PARTS:
        message["content"] = [{"type": "text", "text": said["content"]}]
    if "reasoning" in said:
        message |= {"reasoning_content": said["reasoning"], "thinking": said["reasoning"]}
    if "toolCalls" in said:
        message["tool_calls"] = [call_of(call, family) for call in said["toolCalls"]]
    if "toolCallId" in said:
        message["tool_call_id"] = said["toolCallId"]
    return message | {key: said[key] for key in ("name",) if key in said}


def call_of(call, family):
    arguments = call["arguments"] if family in ARGUMENTS_AS_TEXT else json.loads(call["arguments"])
    return {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def function_of(tool):
    function = {key: tool[key] for key in ("name", "description") if key in tool}
    function["parameters"] = tool.get("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def prompt_of(template, chat, family):
    variables = dict(chat.get("template_options", {}))
    variables |= {
        "messages": [message_of(said, family) for said in chat["messages"]],
        "tools": [function_of(tool) for tool in chat["tools"]] if "tools" in chat else None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    try:
        return {"prompt": template.render(**variables)}
    except TemplateError as error:
        return {"refused": error.message}


def main():
    conversations = json.loads((HERE / "conversations.json").read_text())
    expected = {}
    for path in sorted(HERE.glob("*.jinja")):
        template = environment().from_string(path.read_text())
        expected[path.stem] = {name: prompt_of(template, chat, path.stem) for name, chat in conversations.items()}
    (HERE / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=2) + "\n")


if __name__ == "__main__":
    main()
