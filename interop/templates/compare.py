"""Compares how our engine and jinja2 render every chat template of a folder with a set of conversations.

    compare.py RENDERER FOLDER [--verbose]

RENDERER is the example `render_template` of `crates/engine`. In FOLDER, and below it, `*.jinja` files are templates,
and `*.json` files may hold them under `chat_template`, as `tokenizer_config.json` does. Exits with 1 where a template
renders another text than with jinja2, or fails where jinja2 does not.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jinja

WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather of a \"place\" <today>",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "A town"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["place"],
    },
}
CLOCK = {"name": "clock", "description": "Tells the time", "parameters": {"type": "object", "properties": {}}}


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def calls(*arguments, content=""):
    made = [{"id": f"call{n:05}", "name": "get_weather", "arguments": text} for n, text in enumerate(arguments)]
    return say("assistant", content, toolCalls=made)


def result(text, number=0):
    return say("tool", text, toolCallId=f"call{number:05}", name="get_weather")


USER = say("user", "How are you?")
ROME = '{"place": "Rome", "days": [1, 2], "exact": 1e-7, "deep": {"a": null, "b": true}}'
CONVERSATIONS = {
    "one question": {"messages": [USER]},
    "system": {"messages": [say("system", "Be brief."), USER]},
    "several turns": {"messages": [USER, say("assistant", "Well."), say("user", "Good.\nAnd now?")]},
    "system and turns": {"messages": [say("system", " Be kind. "), USER, say("assistant", " Yes "), say("user", "ok")]},
    "unicode": {"messages": [say("user", "Grüße 日本語 🦀 <b>&amp;</b> {{ x }} {% y %}")]},
    "empty": {"messages": [say("system", ""), say("user", "")]},
    "a thought": {"messages": [USER, say("assistant", "42", reasoning="Hm, let me see."), say("user", "Why?")]},
    "a thought in the text": {"messages": [USER, say("assistant", "<think>\nHm\n</think>\n\n42"), say("user", "Why?")]},
    "system late": {"messages": [USER, say("assistant", "Well."), say("system", "Be brief."), say("user", "Go on")]},
    "tools": {"messages": [USER], "tools": [WEATHER, CLOCK]},
    "tools and system": {"messages": [say("system", "Be brief."), USER], "tools": [WEATHER]},
    "a call": {"messages": [USER, calls(ROME), result("20 °C"), say("assistant", "Warm."), USER], "tools": [WEATHER]},
    "a call just answered": {"messages": [USER, calls('{"place": "Oslo"}', content="One moment."), result("-3")], "tools": [WEATHER]},
    "two calls": {"messages": [USER, calls(ROME, "{}"), result("{\"t\": 20}"), result("30", 1)], "tools": [WEATHER, CLOCK]},
    "no thinking": {"messages": [USER], "template_options": {"enable_thinking": False, "reasoning_effort": "low"}},
    "an answer last": {"messages": [USER, say("assistant", "Well, ")]},
}


def templates(folder):
    """Returns names and sources. Of equal sources, returns the first."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jinja":
            found.setdefault(path.read_bytes().decode(), (name, "<s>", "</s>"))
        elif path.suffix == ".json":
            try:
                config = json.loads(path.read_text())
            except ValueError:
                continue
            config = config if isinstance(config, dict) else {}
            given = config.get("chat_template")
            given = [given] if isinstance(given, str) else [one["template"] for one in given or []]
            text = lambda token: token.get("content", "") if isinstance(token, dict) else token or ""
            for source in given:
                found.setdefault(source, (name, text(config.get("bos_token")), text(config.get("eos_token"))))
    return [(name, source, bos, eos) for source, (name, bos, eos) in found.items()]


def main():
    options = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if len(paths) != 2 or set(options) - {"--verbose"}:
        sys.exit(__doc__)
    renderer, folder = paths
    found = templates(Path(folder))
    cases = [
        (name, source, title, {"template": source, "bos_token": bos, "eos_token": eos, "chat": chat})
        for name, source, bos, eos in found
        for title, chat in CONVERSATIONS.items()
    ]
    lines = "".join(json.dumps(case) + "\n" for *_, case in cases)
    done = subprocess.run([renderer], input=lines, capture_output=True, text=True, check=True)
    counts, differing = Counter(), Counter()
    for (name, source, title, _), line in zip(cases, done.stdout.splitlines(), strict=True):
        ours = json.loads(line)
        theirs = jinja.render(source, ours["variables"]) if "variables" in ours else jinja.render(source, {"messages": []})
        if "prompt" in ours and theirs is not None:
            outcome = "same" if ours["prompt"] == theirs else "other text"
        elif "prompt" in ours:
            outcome = "only jinja2 fails"
        else:
            outcome = "both fail" if theirs is None else "only we fail"
        counts[outcome] += 1
        if outcome in ("other text", "only we fail"):
            differing[name] += 1
            print(f"{name}, {title}: {outcome}: {ours.get('error', '')}")
            if "--verbose" in options and outcome == "other text":
                print(f"  jinja2: {theirs!r}\n  ours:   {ours['prompt']!r}")
        elif "--verbose" in options and outcome != "same":
            print(f"{name}, {title}: {outcome}: {ours.get('error', '')}")
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items(), key=lambda pair: -pair[1]))
    print(f"{len(found)} templates x {len(CONVERSATIONS)} conversations: {told}; {len(differing)} templates differ")
    sys.exit(1 if differing else 0)


main()
