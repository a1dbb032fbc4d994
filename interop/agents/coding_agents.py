"""Coding agents in their headless modes, as their documentation configures them for another server.

Each agent is asked to write a file by a call that the question writes out, which a mock follows.
"""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(__file__).parent / "node_modules" / ".bin"
CONTENT = "written by a model"


@dataclass
class Turn:
    """A turn of an agent: its output, and the folder that it worked in."""

    status: int
    output: str
    folder: Path

    def events(self):
        return [json.loads(line) for line in self.output.splitlines() if line.startswith("{")]


@dataclass
class Agent:
    """An agent that talks to the network at `url`. Its home folder is its own."""

    home: Path
    url: str
    key: str
    model: str
    environment: dict = field(default_factory=dict)
    timeout_secs: int = 300
    reads_stdin = False

    def __post_init__(self):
        self.home.mkdir(parents=True)
        self.configure()

    def turn(self, question, folder):
        folder.mkdir(parents=True, exist_ok=True)
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home)} | self.environment
        ran = subprocess.run(
            [BIN / self.command[0], *self.command[1:], *([] if self.reads_stdin else [question])],
            cwd=folder,
            env=environment,
            input=question if self.reads_stdin else "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=self.timeout_secs,
        )
        return Turn(ran.returncode, ran.stdout, folder)

    def write(self, folder):
        """Returns the turn in which the agent writes a file."""
        path = folder / "note.txt"
        turn = self.turn(f"Please {self.call(path)} and say so.", folder)
        assert turn.status == 0, turn.output[-4000:]
        assert path.exists() and path.read_text().strip() == CONTENT, turn.output[-4000:]
        return turn

    def call(self, path):
        return f"{self.tool}({json.dumps(self.arguments(path))})"


class ClaudeCode(Agent):
    """Claude Code, by the Messages API."""

    tool = "Write"
    command = ["claude", "--output-format", "stream-json", "--verbose", "--permission-mode", "acceptEdits", "-p"]

    def configure(self):
        self.environment |= {
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_AUTH_TOKEN": self.key,
            "ANTHROPIC_MODEL": self.model,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": self.model,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        }

    def arguments(self, path):
        return {"file_path": str(path), "content": CONTENT}

    def check(self, turn):
        last = turn.events()[-1]
        assert (last["type"], last["subtype"], last["is_error"]) == ("result", "success", False), last
        assert last["result"]


class Codex(Agent):
    """Codex, by the Responses API."""

    tool = "exec_command"
    # The machine of a test may lack the sandbox of Codex, which runs what the test wrote out.
    command = ["codex", "exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]

    def configure(self):
        self.environment |= {"TETHER_API_KEY": self.key}
        folder = self.home / ".codex"
        folder.mkdir(parents=True)
        provider = {"name": "Tether", "base_url": f"{self.url}/v1", "env_key": "TETHER_API_KEY", "wire_api": "responses"}
        # Codex counts no keep-alives, and a large prompt takes minutes without a GPU.
        provider |= {"stream_idle_timeout_ms": 3_600_000}
        lines = [f"model = {json.dumps(self.model)}", 'model_provider = "tether"', "[model_providers.tether]"]
        lines += [f"{name} = {json.dumps(value)}" for name, value in provider.items()]
        (folder / "config.toml").write_text("\n".join(lines))

    def arguments(self, path):
        return {"cmd": f"echo {CONTENT} > {path}"}

    def check(self, turn):
        kinds = [event["type"] for event in turn.events()]
        assert kinds[-1] == "turn.completed" and not {"error", "turn.failed"} & set(kinds), turn.output[-4000:]


class OpenCode(Agent):
    """opencode, by the Chat Completions API."""

    tool = "write"
    # It would put a question among its arguments in quotation marks.
    reads_stdin = True
    command = ["opencode", "run", "--format", "json", "--auto", "--model", "tether/model"]

    def configure(self):
        folder = self.home / ".config" / "opencode"
        folder.mkdir(parents=True)
        options = {"baseURL": f"{self.url}/v1", "apiKey": self.key}
        models = {"model": {"id": self.model, "name": self.model}}
        provider = {"npm": "@ai-sdk/openai-compatible", "name": "Tether", "options": options, "models": models}
        settings = {"provider": {"tether": provider}, "autoupdate": False, "share": "disabled"}
        (folder / "opencode.json").write_text(json.dumps(settings))
        self.environment |= {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"}

    def arguments(self, path):
        return {"filePath": str(path), "content": CONTENT}

    def check(self, turn):
        events = turn.events()
        assert not [event for event in events if event["type"] == "error"], turn.output[-4000:]
        assert events[-1]["type"] == "step_finish", turn.output[-4000:]


class QwenCode(Agent):
    """qwen-code, by the Chat Completions API."""

    tool = "write_file"
    command = ["qwen", "--yolo", "--auth-type", "openai", "--output-format", "stream-json"]

    def configure(self):
        self.environment |= {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": self.key,
            "OPENAI_MODEL": self.model,
            "QWEN_TELEMETRY_ENABLED": "false",
        }

    def arguments(self, path):
        return {"file_path": str(path), "content": CONTENT}

    def check(self, turn):
        last = turn.events()[-1]
        assert (last["type"], last["is_error"]) == ("result", False), turn.output[-4000:]


AGENTS = {"claude code": ClaudeCode, "codex": Codex, "opencode": OpenCode, "qwen-code": QwenCode}
