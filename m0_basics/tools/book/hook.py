"""What the site generator calls for each page: its HTML is there already, and so are its headings."""
from __future__ import annotations

from typing import Any, cast

from mkdocs.structure.toc import get_toc


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Keep the HTML, and leave nothing to be rendered."""
    page.meta["html"] = markdown
    return ""


def on_page_content(_html: str, page: Any, **_: Any) -> str:
    """The HTML as it was written, and the table of contents that belongs to it."""
    page.toc = get_toc(cast(Any, nested(page.meta.get("headings", []))))
    return str(page.meta["html"])


def nested(headings: list[list[Any]]) -> list[dict[str, Any]]:
    """(level, id, text) in order -> a tree."""
    top: list[dict[str, Any]] = []
    path: list[dict[str, Any]] = []
    for level, name, text in headings:
        entry = {"level": level, "id": name, "name": text, "html": text, "children": []}
        while path and path[-1]["level"] >= level:
            path.pop()
        (path[-1]["children"] if path else top).append(entry)
        path.append(entry)
    return top
