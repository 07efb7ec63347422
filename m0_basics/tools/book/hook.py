"""What the site generator calls for each page: its HTML is there already, and so are its headings."""
from __future__ import annotations

import re
from typing import Any, cast

from mkdocs.structure.toc import get_toc

from m0_basics.tools.book.pages import up


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Keep the HTML, and leave nothing to be rendered."""
    page.meta["html"] = markdown
    return ""


def on_page_content(_html: str, page: Any, **_: Any) -> str:
    """The HTML as it was written, and the table of contents that belongs to it."""
    page.toc = get_toc(cast(Any, nested(page.meta.get("headings", []))))
    return str(page.meta["html"])


def on_post_page(output: str, page: Any, config: Any, **_: Any) -> str:
    """The switch of languages leads to the same page in the other one, or to its first where it lacks this page.

    It is a link and nothing else: the theme would ask a server for a site map for each `<link rel="alternate">`.
    """
    output = re.sub(r'\s*<link rel="alternate"[^>]*>', "", output)
    for language in config.extra["alternate"]:
        there = page.url if page.file.src_uri in language["pages"] else "index.html"
        output = output.replace(f'href="{language["link"]}"', f'href="{up(page.url)}{language["root"]}{there}"')
    return output


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
