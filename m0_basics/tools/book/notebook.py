"""An executed notebook -> Markdown, its pictures as files beside the page."""
from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from ..colab import COLAB, VARIABLE

# Before the repository has an address, this link leads to no notebook: a book without a network can do without it.
_NO_ADDRESS = f"[Open in Colab]({COLAB})"
_FOLDED = {"en": "What it prints", "zh-CN": "运行结果"}


def notebook_page(file: Path, pictures: Path, prefix: str, lang: str = "en") -> str:
    """The cells in order: text, code, and what the code printed and drew. Pictures are written to `pictures`.

    `prefix` is the address of that folder as the page sees it. Outputs that Jupyter shows folded are folded here: they
    answer a question that stands before them.
    """
    notebook: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    parts = []
    for number, cell in enumerate(notebook["cells"]):
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace(_NO_ADDRESS, ""))
        elif cell["cell_type"] == "code" and source.strip() and not VARIABLE.search(source):    # that one installs
            parts.append(_fenced(source, "python"))
            outputs = [_output(output, pictures, prefix, f"{file.stem}-{number}-{i}")
                       for i, output in enumerate(_joined(cell["outputs"]))]
            if any(outputs) and cell.get("metadata", {}).get("jupyter", {}).get("outputs_hidden"):
                outputs = [f'<details class="output">\n<summary>{_FOLDED[lang]}</summary>', *outputs, "</details>"]
            parts += outputs
    return "\n\n".join(part for part in parts if part) + "\n"


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was printed bit by bit, as one output."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if joined and output["output_type"] == joined[-1]["output_type"] == "stream":
            joined[-1] = {**joined[-1], "text": _text(joined[-1]["text"]) + _text(output["text"])}
        else:
            joined.append(output)
    return joined


def _output(output: dict[str, Any], pictures: Path, prefix: str, name: str) -> str:
    """One output of a cell: its picture, else its Markdown, else its HTML, else its text.

    HTML stays as it is, unescaped: the notebooks are this repository's own.
    """
    if output["output_type"] == "stream":
        return _printed(_text(output["text"]))
    data = output.get("data", {})
    if "image/png" in data:
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / f"{name}.png").write_bytes(base64.b64decode(data["image/png"]))
        return f"![what the cell above draws]({prefix}/{name}.png)"
    if "text/markdown" in data:
        return _text(data["text/markdown"])
    if "text/html" in data:
        html = re.sub(r"\n\s*\n", "\n", _text(data["text/html"]).strip())     # a blank line would end it in Markdown
        return f'<figure class="drawn">\n{html}\n</figure>'
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
