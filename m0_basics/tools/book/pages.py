"""The pages of the book in one language: which document becomes which page, and where its links lead.

    m3_paged_kv/README.md       m3/index.md         with chapter notes around it
    m3_paged_kv/INTERVIEW.md    m3/interview.md
    notebooks/03_paged_kv.ipynb m3/notebook.md
    a file of code              code/m3_paged_kv/scheduler.py.md, where some page links it
"""
from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from m0_basics.config import ConfigError

from .chapter import around, read_chapter, reading_minutes
from .notebook import notebook_page
from .render import Heading, render
from .terms import Term, link_terms, read_terms

ROOT = Path(__file__).parents[3]
SUFFIX = {"en": "", "zh-CN": ".zh-CN"}
TITLES = {
    "en": {"home": "Start here", "changes": "What changes", "notebook": "Notebook",
           "questions": "Interview questions", "interview": "Interview", "glossary": "Glossary",
           "road": "The whole road", "more": "About the lab", "contributing": "Contributing", "changelog": "Changes"},
    "zh-CN": {"home": "从这里开始", "changes": "改了什么", "notebook": "notebook",
              "questions": "面试题", "interview": "面试", "glossary": "术语表", "road": "整条路", "more": "关于本项目",
              "contributing": "参与贡献", "changelog": "变更记录"},
}
ACROSS = {"en": "zh/", "zh-CN": "../"}       # from the first page of one language to that of the other
_PICTURES = (".png", ".svg", ".gif", ".jpg")
_CODE = {".py": "python", ".cpp": "cpp", ".hpp": "cpp", ".toml": "toml", ".json": "json", ".tsv": "text", "": "text",
         ".txt": "text"}
_EXERCISES = re.compile(r"^\| \d+ \| `[^`]+::", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """One page: its source, relative to the repository, its place in the site, and its title in the sidebar."""

    source: str
    place: str                  # m3/index.md
    title: str
    section: str = ""           # the sidebar's group; "" is the top


@dataclass
class Site:
    """The pages of one language, written to `docs` as HTML with their headings."""

    lang: str
    docs: Path
    root: Path = ROOT
    pages: list[Page] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pages = find_pages(self.root, self.lang)
        self.by_source = {page.source: page for page in self.pages}
        glossary = self.root / f"GLOSSARY{SUFFIX[self.lang]}.md"
        self.terms: list[Term] = read_terms(glossary) if glossary.is_file() else []

    def write(self) -> None:
        """All pages, and the files of code that they link."""
        shutil.rmtree(self.docs, ignore_errors=True)
        self.docs.mkdir(parents=True)
        for page in self.pages:
            self._write_page(page)
        written = set[str]()
        while missing := sorted({p.source for p in self.by_source.values()} - {p.source for p in self.pages} - written):
            for source in missing:
                self._write_code(self.by_source[source])
                written.add(source)

    def nav(self) -> list[dict[str, object]]:
        """The sidebar."""
        groups: dict[str, list[dict[str, object]]] = {}
        top: list[dict[str, object]] = []
        for page in self.pages:
            entry: dict[str, object] = {page.title: page.place}
            if not page.section:
                top.append(entry)
            elif page.section in groups:
                groups[page.section].append(entry)
            else:
                groups[page.section] = [entry]
                top.append({page.section: groups[page.section]})
        return top

    def text_of(self, page: Page) -> str:
        """A page's Markdown, chapter notes included."""
        file = self.root / page.source
        if file.suffix == ".ipynb":
            name = file.stem
            return (notebook_page(file, self.docs / "pictures", f"{up(page.place)}pictures", self.lang)
                    or f"# {name}\n")
        text = file.read_text(encoding="utf-8")
        folder = file.parent
        if file.name.startswith("README") and re.fullmatch(r"m\d_\w+", folder.name) and (
                chapter := read_chapter(folder, self.lang)):
            english = (folder / "README.md").read_text(encoding="utf-8")
            number = folder.name[1]
            notebooks = [p.read_text(encoding="utf-8") for p in (self.root / "notebooks").glob(f"0{number}_*.py")]
            minutes = reading_minutes(text, *notebooks)
            text = around(text, chapter, self.lang, minutes, len(_EXERCISES.findall(english)))
        return text

    def _write_page(self, page: Page) -> None:
        html, headings = render(self.text_of(page), self._follow(page))
        if not page.source.startswith("GLOSSARY"):
            html = link_terms(html, self.terms, f"{up(page.place)}glossary.html")
        self._save(page, html, headings)

    def _write_code(self, page: Page) -> None:
        file = self.root / page.source
        text = file.read_text(encoding="utf-8")
        shown = f"````{_CODE[file.suffix]}\n{text}\n````\n" if text.strip() else ""
        if file.name == "__init__.py" and all(isinstance(line, ast.Expr) for line in ast.parse(text).body):
            shown += _beside(file)
        html, headings = render(f"# `{page.source}`\n\n{shown}", self._follow(page))
        self._save(page, html, headings, in_search=False)

    def _save(self, page: Page, html: str, headings: list[Heading], in_search: bool = True) -> None:
        title = headings[0].text if headings and page.place != "index.md" else page.title     # several are "Notebook"
        meta: dict[str, object] = {"title": title, "headings": [[h.level, h.id, h.text] for h in headings]}
        if not in_search:
            meta["search"] = {"exclude": True}
        file = self.docs / page.place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"---\n{json.dumps(meta, ensure_ascii=False)}\n---\n{html}", encoding="utf-8")

    def _follow(self, page: Page) -> Callable[[str], str]:
        """Targets of links as the page's document writes them -> as the site has them."""
        here = (self.root / page.source).parent

        def follow(target: str) -> str:
            path, mark, fragment = target.partition("#")
            if not path or "://" in path or path.startswith(("mailto:", "data:")) or (
                    path.startswith((".", "pictures")) and "pictures/" in path and page.source.endswith(".ipynb")):
                return target
            file = Path(os.path.normpath(here / path))
            if file.is_dir():
                file = file / "README.md" if (file / "README.md").is_file() else file / "__init__.py"
            if not file.is_file() or not file.is_relative_to(self.root):
                self.problems.append(f"{page.source}: {target} leads nowhere")
                return target
            return self._address(page, file.relative_to(self.root).as_posix()) + mark + fragment

        return follow

    def _address(self, page: Page, source: str) -> str:
        suffix = Path(source).suffix
        if suffix in _PICTURES:
            copy = self.docs / "pictures" / source
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / source, copy)
            return f"{up(page.place)}pictures/{source}"
        if source in self.by_source:
            return up(page.place) + self.by_source[source].place.removesuffix(".md") + ".html"
        if (other := self._other_language(source)) is not None:
            return up(page.place) + other
        if suffix not in _CODE:
            raise ConfigError(f"{page.source} links {source}, which is no document, picture or code")
        self.by_source[source] = Page(source, f"code/{source}.md", source)
        return f"{up(page.place)}code/{source}.html"

    def _other_language(self, source: str) -> str | None:
        """Where a document of the other language is, seen from this one's root: English at the top, Chinese in zh/."""
        other = "zh-CN" if self.lang == "en" else "en"
        for page in find_pages(self.root, other):
            if page.source == source:
                return ACROSS[self.lang] + page.place.removesuffix(".md") + ".html"
        return None


def _beside(init: Path) -> str:
    """What a package holds, for a link to its folder that ends at an `__init__.py` with a sentence or nothing in it."""
    files = sorted(file for file in init.parent.iterdir() if file.suffix in _CODE and file.is_file() and file != init)
    return "\n" + "\n".join(f"- [`{file.name}`]({file.name})" for file in files)


def find_pages(root: Path, lang: str) -> list[Page]:
    """The pages of a language in the order of reading. Notebooks, and what is not translated, are in both."""
    suffix, titles = SUFFIX[lang], TITLES[lang]
    pages = [Page(f"README{suffix}.md", "index.md", titles["home"])]
    for folder in sorted(root.glob("m[0-7]_*")):
        if not (folder / f"README{suffix}.md").is_file():
            continue
        short, name = folder.name[:2], folder.name
        section = f"{short} · {chapter_name(name)}"
        candidates = [(f"{name}/README{suffix}.md", "index.md", "chapter"),
                      (f"{name}/tools/CHANGES.md", "changes.md", "changes"),
                      *((f"notebooks/{file.name}", "notebook.md", "notebook")
                        for file in sorted((root / "notebooks").glob(f"0{short[1]}_*.ipynb"))),
                      (f"{name}/INTERVIEW{suffix}.md", "interview.md", "questions")]
        pages += [Page(source, f"{short}/{place}", titles.get(title, section), section)
                  for source, place, title in candidates if (root / source).is_file()]
    pages += [Page(f"notebooks/{file.name}", "road.md", titles["road"])
              for file in sorted((root / "notebooks").glob("08_*.ipynb"))]
    for file in sorted((root / "interview").glob("*.md"), key=lambda p: (not p.name.startswith("README"), p.name)):
        if file.name.endswith(".zh-CN.md") is (lang == "zh-CN"):
            place = file.name.removesuffix(".md").removesuffix(".zh-CN").replace("README", "index")
            pages.append(Page(f"interview/{file.name}", f"interview/{place}.md", first_heading(file),
                              titles["interview"]))
    for source, place, title, section in ((f"GLOSSARY{suffix}.md", "glossary.md", "glossary", ""),
                                          ("CONTRIBUTING.md", "contributing.md", "contributing", "more"),
                                          ("CHANGELOG.md", "changelog.md", "changelog", "more")):
        if (root / source).is_file():
            pages.append(Page(source, place, titles[title], titles[section] if section else ""))
    return pages


def chapter_name(package: str) -> str:
    """"paged kv" of m3_paged_kv."""
    return package[3:].replace("_", " ")


def first_heading(file: Path) -> str:
    """The title of a document."""
    match = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return re.sub(r"[`*]", "", match[1]) if match else file.stem


def up(place: str) -> str:
    """The way from a page back to the site's root."""
    return "../" * place.count("/")
