"""Renders chat templates with jinja2, configured as in Hugging Face's `apply_chat_template`."""

import json
from datetime import datetime, timezone

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationBlocks(Extension):
    """Blocks that mark the text that a model is trained on. Their content is rendered unchanged."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_keep"), [], [], body).set_lineno(line)

    def _keep(self, caller):
        return caller()


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise TemplateError(message)


def environment(now):
    """Returns an environment whose clock is fixed at `now`, in seconds since 1970."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    clock = datetime.fromtimestamp(now, timezone.utc).replace(tzinfo=None)
    made.globals["strftime_now"] = clock.strftime
    return made


def render(source, variables, now=0):
    """Returns the text, or None if jinja2 fails."""
    try:
        return environment(now).from_string(source).render(**variables)
    except Exception:  # A template may raise whatever Python raises.
        return None
