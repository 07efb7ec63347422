"""Results as they come, beside the file that they end up in: a run that is cut off goes on from there.

    out.jsonl.part   {"input": "9f3c...", "result": {...}}     one line for each result, in the order they came
    out.jsonl        the results in the order of the prompts, when all are there; the other file is then removed
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """Owns `<target>.part`."""

    def __init__(self, target: Path) -> None:
        """Reads what an earlier run has left. Raises OSError where the file cannot be read or written."""
        self.path = target.with_name(f"{target.name}.part")
        self._results: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    self._results[entry["input"]] = entry["result"]
                except (ValueError, KeyError, TypeError):
                    continue                    # the last line of a run that was killed while it wrote
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        if self.path.stat().st_size:
            self._file.write("\n")              # after such a line

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of an earlier run for the same input."""
        return self._results.get(key)

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Write one result, so that a kill does not lose it. Raises OSError."""
        self._file.write(json.dumps({"input": key, "result": result}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of the file; it stays, for a run that goes on."""
        try:
            self._file.close()
        except OSError:                         # what could not be written was said when it was
            return

    def remove(self) -> None:
        """All results are where they belong."""
        self.close()
        self.path.unlink(missing_ok=True)


def input_key(line: int, text: str, settings: Any) -> str:
    """What a result depends on, as a short name: the line, what stands there, and with which options it is run."""
    content = json.dumps([line, text, settings], sort_keys=True, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
