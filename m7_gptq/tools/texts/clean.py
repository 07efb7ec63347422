"""How the texts beside this file were made: public-domain books, taken from source distributions and cleaned.

    pip download --no-deps --no-binary sentencepiece sentencepiece==0.2.0
    pip download --no-deps --no-binary wordcloud wordcloud==1.9.6
    python -m m7_gptq.tools.texts.clean FOLDER_OF_THE_ARCHIVES

What the sites that spread them added is dropped: headers, licences, names, annotations. Lines that were broken to a
width are joined to paragraphs, one a line.
"""
from __future__ import annotations

import itertools
import re
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
ARCHIVES = {
    "alice": ("wordcloud-1.9.6.tar.gz", "wordcloud-1.9.6/examples/alice.txt"),
    "botchan": ("sentencepiece-0.2.0.tar.gz", "sentencepiece-0.2.0/test/botchan.txt"),
    "call_to_arms": ("wordcloud-1.9.6.tar.gz", "wordcloud-1.9.6/examples/wc_cn/CalltoArms.txt"),
}
# Botchan by shares of its length: its end is for reporting alone.
BOTCHAN = {"botchan_calibration": (0.0, 0.55), "botchan_dev": (0.55, 0.67), "botchan_test": (0.67, 1.0)}
_CHINESE_BYTES = 45_000                     # the stories until then, whole paragraphs


def alice(raw: str) -> list[str]:
    """Paragraphs between the headers; verses, which are indented, keep their lines."""
    body = raw[raw.index("CHAPTER I."):raw.index("THE END")]
    paragraphs = list[str]()
    for block in re.split(r"\n\s*\n", body.replace("\r", "")):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        if not lines or set(block) <= set("* \n"):
            continue
        paragraphs += lines if block.startswith("  ") else [" ".join(lines)]
    return paragraphs


def botchan(raw: str) -> list[str]:
    """The file has no empty lines: a line well short of the full width ends its paragraph."""
    body = raw.replace("\r", "")
    body = body[body.index("BOTCHAN (MASTER DARLING)\nCHAPTER I"):body.index("--(THE END)--")]
    body = re.sub(r" ?\[(?:[A-Z]|\d+)\]|\[Footnote[^\]]*\]", "", body)       # the transcriber's
    paragraphs, lines = list[str](), list[str]()
    for line in body.splitlines()[1:]:
        if not line.strip():
            continue
        lines.append(line.strip())
        if len(line.strip()) < 60:
            paragraphs.append(" ".join(lines))
            lines = []
    return [*paragraphs, *([" ".join(lines)] if lines else [])]


def call_to_arms(raw: str) -> list[str]:
    """The stories alone: the notes behind each of them are a later editor's."""
    body = re.sub(r"\s*_分节阅读_\d+\s*", "", raw.replace("\r", ""))      # page breaks, in the middle of sentences
    paragraphs, kept, in_notes = list[str](), 0, False
    for line in body.splitlines():
        text = re.sub(r"[①-⑳⑴-⒇]", "", line).strip(" \u3000")
        if re.match(r"□|注释", text):
            in_notes = True
        elif in_notes and text and len(text) < 12 and not re.search(r"[。，”：<>]", text) and not set(text) <= {"-"}:
            in_notes = False                # the title of the next story
        if in_notes or not text or set(text) <= {"-"} or text.startswith("迅："):
            continue
        kept += len(text.encode())
        if kept > _CHINESE_BYTES:
            break
        paragraphs.append(text)
    return paragraphs


def read(folder: Path, name: str) -> str:
    """One text as its archive has it."""
    archive, member = ARCHIVES[name]
    with tarfile.open(folder / archive) as opened:
        file = opened.extractfile(member)
        assert file is not None
        return file.read().decode("utf-8-sig")


def make(folder: Path) -> dict[str, str]:
    """Every cleaned text by the name of its file."""
    made = {"alice": "\n".join(alice(read(folder, "alice")))}
    book = botchan(read(folder, "botchan"))
    ends = list(itertools.accumulate(len(paragraph) for paragraph in book))
    for name, (first, last) in BOTCHAN.items():
        made[name] = "\n".join(text for text, end in zip(book, ends, strict=True)
                               if first < end / ends[-1] <= last)
    made["call_to_arms"] = "\n".join(call_to_arms(read(folder, "call_to_arms")))
    return {name: text + "\n" for name, text in made.items()}


if __name__ == "__main__":
    for name, text in make(Path(sys.argv[1])).items():
        (HERE / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text.encode()):,} bytes, {text.count(chr(10)):,} paragraphs")
