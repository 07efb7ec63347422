"""The book is built from the documents as they are: no link leads nowhere, answers stay hidden, terms are explained."""
from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import m0_basics
from m0_basics.config import ConfigError
from m0_basics.tools.book.build import build
from m0_basics.tools.book.chapter import LANGUAGES, around, read_chapter, reading_minutes
from m0_basics.tools.book.hook import nested
from m0_basics.tools.book.notebook import notebook_page
from m0_basics.tools.book.pages import SUFFIX, Site, find_pages
from m0_basics.tools.book.render import render
from m0_basics.tools.book.terms import ABBREVIATION, Term, link_terms, read_terms
from m0_basics.tools.documents.quotes import FENCE, INLINE_CODE

pytest.importorskip("mkdocs")
pytest.importorskip("material")
ROOT = Path(m0_basics.__file__).parents[1]
# Abbreviations that need no explanation here: units, names, formats and states that everybody knows or the text names.
KNOWN = set(re.findall(r"\w+", """
H12 H22 U11 U12 PPT CPU GPU GB KB MB TB GFLOP MFLOP TFLOP PFLOP JSON URL HTTP UTF OS PR RFC CVE CI NVIDIA AMD IEEE OCP
AI GCC README OR AND SD RPC OSDI SOSP EMNLP NMT WMT15 ICLR GPT BERT EPS FFFD SWE RTX OK TODO PCI
PCIE MR TRL LPC BLAS PDF SSD ATOM SWIFT BRECQ LDLQ QEP SGMV BGMV B300 H20 L40S GB10 MI350 L4 L1 L2
L3 V0 V1 V2 A16 W2 W3 W4 W8 E8 KV4 Q3 Q4 Q8 F16C A3B SWAPPED WAITING RUNNING PREFILL DECODE FINISHED
NO YES M1 M2 M3 M4 N K FP32 IDE GC CVPR NLP CC
"""))


class Links(HTMLParser):
    """The addresses and names of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.targets += [value for name in ("href", "src") if (value := found.get(name))]
        self.names |= {value for value in (found.get("id"),) if value}


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("site") / "book").parent


@pytest.mark.slow
def test_every_address_within_the_book_leads_somewhere(book: Path) -> None:
    pages = {file: Links(file.read_text(encoding="utf-8")) for file in book.rglob("*.html")}
    assert len(pages) > 60
    wrong = []
    for file, page in pages.items():
        for target in set(page.targets):
            address, _, fragment = unquote(target).partition("#")
            if re.match(r"[a-z]+:|//", address):
                assert address.startswith(("https:", "http:", "data:")), target
                continue
            there = (file.parent / address).resolve() if address else file      # a folder is no page on a disk
            if not there.is_file() or (fragment and there in pages and fragment not in pages[there].names
                                       and not fragment.startswith("__")):
                wrong.append(f"{file.relative_to(book)}: {target}")
    assert wrong == []


@pytest.mark.slow
def test_pages_hold_what_a_reader_needs(book: Path) -> None:
    """Both languages; answers folded; chapter notes; a search that needs no network; next and previous."""
    for folder, before, three, text, words in (
            (book, "Before you begin", "Three things to take away", "(a, 1) b-c", ["a", "1", "b", "c"]),
            (book / "zh", "需要先会", "记住三件事", "a-b：抢占GPU", ["a", "b", "抢", "占", "GPU"])):
        chapter = (folder / "m3/index.html").read_text(encoding="utf-8")
        assert before in chapter and three in chapter and "md-footer__link--next" in chapter
        assert 'class="term" href="../glossary.html#' in chapter
        questions = (folder / "m3/interview.html").read_text(encoding="utf-8")
        assert questions.count("<details>") == 2 * len(set(re.findall(r'id="(m3-q\d\d)--', questions))) > 50
        assert "<!-- fact" not in questions
        index = (folder / "search/search_index.js").read_text(encoding="utf-8")
        assert index.startswith("var __index = ") and "m3/interview.html#m3-q01" in index
        search = json.loads(index.removeprefix("var __index = "))
        assert not any(entry["location"].startswith("code/") for entry in search["docs"])
        assert search["config"]["pipeline"] == []
        cut = re.split(search["config"]["separator"], text)
        assert [word for word in cut if word] == words
    home = (book / "index.html").read_text(encoding="utf-8")
    assert "https://unpkg" not in home and "fonts.googleapis" not in home
    notebook = (book / "m3/notebook.html").read_text(encoding="utf-8")
    assert 'src="../pictures/03_paged_kv-' in notebook and 'class="printed"' in notebook
    assert notebook.count('<details class="output">') > 10
    assert "<title>The paged KV cache: memory in blocks - LLM inference lab</title>" in notebook


@pytest.mark.slow
def test_the_other_language_is_one_link_away(book: Path) -> None:
    """To the same page; without a server's site map, which a browser would look for."""
    pages = {file.relative_to(book).as_posix(): file.read_text(encoding="utf-8") for file in book.rglob("*.html")}
    for name, text in pages.items():
        same = name.removeprefix("zh/")
        for lang, page in (("en", same), ("zh", f"zh/{same}")):
            link = re.search(rf'<a href="([^"]+)" hreflang="{lang}"', text)
            assert link is not None, name
            there = (book / name).parent.joinpath(link[1]).resolve().relative_to(book.resolve()).as_posix()
            assert there == (page if page in pages else page.removesuffix(same) + "index.html"), name
        assert 'rel="alternate"' not in text


def test_markdown_is_github_s() -> None:
    text = ("# A `b`\n\ntext\n- list at once\n\n1. one\n\n   ```python\n   x = 1\n   ```\n\n"
            f"| a | b |\n|--|--:|\n| 1 | {'word ' * 10}|\n\n"
            "<details>\n<summary>S</summary>\n\n**in** [link](x.md#y) <img src=\"p.png\">\n\n</details>\n\n## A b\n\n"
            "`a_b/c.py::D` [![x](q.png)](y)\n")
    html, headings = render(text, lambda target: f"/{target}")
    assert [(h.level, h.id, h.text) for h in headings] == [(1, "a-b", "A b"), (2, "a-b-1", "A b")]
    assert "<li>list at once</li>" in html and '<div class="wide"><table>' in html and "<strong>in</strong>" in html
    assert "<td>1</td>" in html and '<td class="prose" style="text-align:right">word' in html
    assert 'href="/x.md#y"' in html and 'src="/p.png"' in html and '<pre class="highlight">' in html
    assert '<a class="picture" href="/p.png"><img src="/p.png"></a>' in html and html.count('class="picture"') == 1
    assert "<code>a_<wbr>b/<wbr>c.<wbr>py::<wbr>D</code>" in html and "x = 1" not in html and "<wbr>" not in html.split(
        "<pre")[1].split("</pre>")[0]
    assert nested([[1, "a", "A"], [3, "b", "B"], [2, "c", "C"]])[0]["children"][1]["id"] == "c"


def test_notebooks_become_pages(tmp_path: Path) -> None:
    def code(source: str, *outputs: dict[str, object], **metadata: object) -> dict[str, object]:
        return {"cell_type": "code", "source": source, "outputs": list(outputs), "metadata": metadata}
    cells = [{"cell_type": "markdown", "source": ["# T\n", "text"]},
             code("print(1)", {"output_type": "stream", "text": "1\n"},
                  {"output_type": "stream", "text": ["2\n", "3"]}),
             code("plot()", {"output_type": "display_data",
                             "data": {"image/png": "iVBORw==", "text/plain": "<Figure>"}}),
             code("'a'", {"output_type": "execute_result", "data": {"text/plain": "'```'"}}), code(" "),
             code("show()", {"output_type": "execute_result", "data": {
                 "text/html": "<div><b>TTFT</b>\n\n&lt;end</div>", "text/plain": "<HTML object>"}}),
             code('REPOSITORY = ""\ninstall()'), code("x = 1", jupyter={"outputs_hidden": True}),
             code("guess()", {"output_type": "stream", "text": "42\n"}, jupyter={"outputs_hidden": True}),
             {"cell_type": "markdown", "source": "[Open in Colab](https://colab.research.google.com/github/)"},
             {"cell_type": "markdown", "source": "[Open in Colab](https://colab.research.google.com/github/a/b)"}]
    file = tmp_path / "n.ipynb"
    file.write_text(json.dumps({"cells": cells}))
    text = notebook_page(file, tmp_path / "p", "../p")
    assert text.startswith("# T\ntext\n\n```python\nprint(1)\n```\n\n<div class=\"printed\">\n\n```text\n1\n2\n3\n```")
    assert "![what the cell above draws](../p/n-2-0.png)" in text
    assert (tmp_path / "p/n-2-0.png").read_bytes()[:2] == b"\x89P"
    assert "````text\n'```'\n````" in text and "Figure" not in text and "install()" not in text
    assert text.count("Open in Colab") == 1 and "/github/a/b)" in text     # without an address it leads to no notebook
    html, _ = render(text, lambda target: target)
    drawn = '<figure class="drawn">\n<div><b>TTFT</b>\n&lt;end</div>\n</figure>'
    assert drawn in html and "HTML object" not in html
    [folded] = re.findall(r'<details class="output">(.*?)</details>', html, flags=re.DOTALL)
    assert "<summary>What it prints</summary>" in folded and '<div class="printed">' in folded
    assert re.sub(r"<[^>]+>", "", folded).split() == ["What", "it", "prints", "42"]
    assert "<summary>运行结果</summary>" in notebook_page(file, tmp_path / "p", "../p", "zh-CN")
    assert drawn in link_terms(html, [Term("TTFT", "Time.")], "g.html")     # what a notebook drew is no prose


def test_terms_are_linked_once_and_in_prose_only() -> None:
    terms = [Term("TTFT", "Time to [first](x) token. More."), Term("ITL, TPOT", "Between."), Term("Batch", "Together.")]
    page = "<h2>TTFT</h2><p><code>TTFT</code> TTFTs, TTFT; a batch of TPOT and ITL, xITL</p>"
    html = link_terms(page, terms, "g.html")
    assert html == ('<h2>TTFT</h2><p><code>TTFT</code> <a class="term" href="g.html#ttft" title="Time to first token.">'
                    'TTFT</a>s, TTFT; a <a class="term" href="g.html#batch" title="Together.">batch</a> of '
                    '<a class="term" href="g.html#itl-tpot" title="Between.">TPOT</a> and ITL, xITL</p>')


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_abbreviation_is_in_the_glossary(lang: str) -> None:
    """Of the READMEs and the interview pages, in prose."""
    terms = read_terms(ROOT / f"GLOSSARY{SUFFIX[lang]}.md")
    explained = {part for term in terms for name in term.spellings for part in [name, *re.split(r"[ -]", name)]} | KNOWN
    unknown = dict[str, str]()
    for page in find_pages(ROOT, lang):
        if re.match(r"m\d_.*(README|INTERVIEW)|README", page.source):
            text = (ROOT / page.source).read_text(encoding="utf-8")
            text = INLINE_CODE.sub(" ", FENCE.sub(" ", text))
            text = re.sub(r"\]\([^)]*\)|<[^>]+>", " ", text)
            unknown |= {m[0].removesuffix("s"): page.source for m in ABBREVIATION.finditer(text)
                        if m[0].removesuffix("s") not in explained}
    assert unknown == {}


def test_the_glossaries_have_the_same_entries() -> None:
    one, other = (read_terms(ROOT / f"GLOSSARY{SUFFIX[lang]}.md") for lang in LANGUAGES)
    assert [term.name for term in one] == [term.name for term in other] and len(one) > 90
    assert all(term.brief for term in one + other)


def test_chapter_notes(tmp_path: Path) -> None:
    for folder in sorted(ROOT.glob("m[0-6]_*")):
        assert all(read_chapter(folder, lang) for lang in LANGUAGES)
    assert read_chapter(tmp_path, "en") is None
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/chapter.toml").write_text('[en]\nprerequisites = "p"\nable = ["a"]\ntakeaways = ["1", "2"]\n')
    with pytest.raises(ConfigError, match="2 takeaways; allowed: three"):
        read_chapter(tmp_path, "en")
    with pytest.raises(ConfigError, match="is not valid"):
        read_chapter(tmp_path, "zh-CN")
    chapter = read_chapter(ROOT / "m0_basics", "en")
    assert chapter is not None
    page = around("# Title\n\ntext\n", chapter, "en", 30, 8)
    assert page.startswith("# Title\n\n<div class=\"chapter\">") and "30 minutes to read, 8 exercises" in page
    assert page.index("text") < page.index("Three things")
    assert reading_minutes("word " * 1500) == 10 and reading_minutes("字" * 3000) == 10 and reading_minutes("") == 5


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "README.md").write_text("# T\n\n[a](gone.md) [b](code.py) [c](https://x.org) [d](#here) [e](part/)\n")
    (root / "part").mkdir()
    (root / "part/__init__.py").write_text('"""Words."""\n')
    (root / "part/inner.py").write_text("y = 2\n")
    (root / "code.py").write_text("x = 1\n")
    site = Site("en", tmp_path / "docs", root)
    site.write()
    assert site.problems == ["README.md: gone.md leads nowhere"]
    assert (tmp_path / "docs/code/code.py.md").is_file() and 'href="code/code.py.html"' in (
        tmp_path / "docs/index.md").read_text()
    folder = (tmp_path / "docs/code/part/__init__.py.md").read_text()
    assert 'href="../../code/part/inner.py.html"' in folder and "<strong>" not in folder
    assert "y" in (tmp_path / "docs/code/part/inner.py.md").read_text()
