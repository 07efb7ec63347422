"""An executed notebook -> Markdown, its pictures as files beside the page."""
from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any


def notebook_page(file: Path, pictures: Path, prefix: str) -> str:
    """The cells in order: text, code, and what the code printed and drew. Pictures are written to `pictures`.

    `prefix` is the address of that folder as the page sees it.
    """
    notebook: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    parts = []
    for number, cell in enumerate(notebook["cells"]):
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(_fenced(source, "python"))
            parts += [_output(output, pictures, prefix, f"{file.stem}-{number}-{i}")
                      for i, output in enumerate(cell["outputs"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _output(output: dict[str, Any], pictures: Path, prefix: str, name: str) -> str:
    """One output of a cell: its picture, else its HTML table, else its text."""
    if output["output_type"] == "stream":
        return _printed(_text(output["text"]))
    data = output.get("data", {})
    if "image/png" in data:
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / f"{name}.png").write_bytes(base64.b64decode(data["image/png"]))
        return f"![what the cell above draws]({prefix}/{name}.png)"
    if "text/markdown" in data:
        return _text(data["text/markdown"])
    return _printed(_text(data.get("text/plain", "")))


def _printed(text: str) -> str:
    return f'<div class="printed">\n\n{_fenced(text.rstrip(), "text")}\n\n</div>' if text.strip() else ""


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)
