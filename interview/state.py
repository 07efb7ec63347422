"""What the learner has done, in one JSON file: answers with their scores, exercises on the clock, notebooks read.

    $LLM_LAB_STATE, or $XDG_STATE_HOME/llm-inference-lab/interview.json, or ~/.local/state/...; `--state` wins

The file is replaced as a whole, never half written. One that cannot be read is kept under another name and a new
one is begun: nothing that was answered is thrown away silently.
"""
from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError

VERSION = 1
STATE_VARIABLE = "LLM_LAB_STATE"


@dataclass(frozen=True)
class Answer:
    """One answered question: when (UTC, ISO 8601), and the points that it got."""

    id: str
    at: str
    got: float
    of: float


@dataclass
class State:
    """Everything that is kept. `repaired` names the damaged file that was put aside, if there was one."""

    path: Path
    answers: list[Answer] = field(default_factory=list)
    started: dict[str, str] = field(default_factory=dict)       # coding task -> when its clock began
    notebooks: list[str] = field(default_factory=list)
    repaired: Path | None = None

    def add(self, question_id: str, got: float, of: float) -> None:
        """Keep an answer's score, at once."""
        self.answers.append(Answer(question_id, now(), got, of))
        self.save()

    def last(self) -> dict[str, Answer]:
        """The newest answer to each question."""
        return {answer.id: answer for answer in self.answers}

    def save(self) -> None:
        data = {"version": VERSION, "answers": [asdict(a) for a in self.answers], "started": self.started,
                "notebooks": self.notebooks}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
            new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            raise ConfigError(f"state={str(self.path)!r} cannot be written: {error.strerror}; "
                              "allowed: a file in a folder of your own (--state)") from error


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def default_path() -> Path:
    """Where the state lies if the user says nothing."""
    if given := os.environ.get(STATE_VARIABLE):
        return Path(given)
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "llm-inference-lab" / "interview.json"


def load_state(path: Path | None = None) -> State:
    """The state at `path`. Raises ConfigError for a file of a later version; a damaged one is put aside."""
    path = path or default_path()
    if not path.exists():
        return State(path)
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        version = data["version"]
        if isinstance(version, int) and version > VERSION:
            raise ConfigError(f"{path} has version {version}; allowed: up to {VERSION}. Update the lab, or name "
                              "another file with --state")
        answers = [Answer(str(a["id"]), str(a["at"]), float(a["got"]), float(a["of"])) for a in data["answers"]]
        started = {str(k): str(v) for k, v in dict(data.get("started", {})).items()}
        return State(path, answers, started, [str(n) for n in data.get("notebooks", [])])
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return State(path, repaired=_put_aside(path))


def _put_aside(path: Path) -> Path:
    """Rename a file that cannot be read; return its new name."""
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not aside.exists():
            try:
                path.rename(aside)
            except OSError as error:
                raise ConfigError(f"state={str(path)!r} cannot be read or moved: {error.strerror}; "
                                  "allowed: a file of your own (--state)") from error
            return aside
    raise ConfigError(f"{path.parent} has a thousand damaged state files; remove them, or name another with --state")
