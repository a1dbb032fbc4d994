"""Renders the snippets of `crates/engine/src/chat_template/snippets.json` with jinja2.

    snippets.py --check     fails where the file says something else than jinja2
    snippets.py --record    writes what jinja2 makes of them into the file
"""

import json
import sys
from pathlib import Path

import jinja

FILE = Path(__file__).resolve().parents[2] / "crates/engine/src/chat_template/snippets.json"


def main():
    if sys.argv[1:] not in (["--check"], ["--record"]):
        sys.exit(__doc__)
    golden = json.loads(FILE.read_text())
    variables = golden["variables"]
    wrong = []
    for snippet in golden["snippets"]:
        rendered = jinja.render(snippet["template"], variables)
        if sys.argv[1] == "--record":
            snippet["rendered"] = rendered
        elif snippet["rendered"] != rendered:
            wrong.append(f"{snippet['template']!r}: jinja2 makes {rendered!r}, the file says {snippet['rendered']!r}")
    if sys.argv[1] == "--record":
        lines = [json.dumps(snippet, ensure_ascii=False) for snippet in golden["snippets"]]
        body = ",\n    ".join(lines)
        said = json.dumps(variables, ensure_ascii=False)
        FILE.write_text(f'{{\n  "variables": {said},\n  "snippets": [\n    {body}\n  ]\n}}\n')
    for line in wrong:
        print(line)
    print(f"{len(golden['snippets'])} snippets, {len(wrong)} differ")
    sys.exit(1 if wrong else 0)


main()
