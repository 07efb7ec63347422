"""The mechanism that keeps documents true: each check passes on good text and catches a planted error."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from m0_basics.config import ConfigError
from m0_basics.tools.analysis.microbench import run_all
from m0_basics.tools.documents import factbook
from m0_basics.tools.documents.checks import check_code_references, check_document, fact_names, update_document
from m0_basics.tools.documents.factbook import Fact, Facts, Result, merge, read_result
from m0_basics.tools.facts import FACTS

BOOK = {
    "kv.bytes": Fact(23040, "B"), "kv.total": Fact(1_677_721_600, "B"), "speed": Fact(142.51, "tokens/s"),
    "share": Fact(0.2104, "ratio"), "load": Fact(73.26, "%"), "loss": Fact(-0.25), "bound": Fact("memory"),
    "edge": Fact(0.125),
}


def document(folder: Path, text: str, name: str = "README.md") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("text", [
    "keeps 23,040<!-- fact: kv.bytes --> bytes",
    "keeps 23040<!--fact: kv.bytes--> bytes",
    "**23,040**<!-- fact: kv.bytes --> bytes, `142.5`<!-- fact: speed --> tokens",
    "1.68<!-- fact: kv.total /1e9 --> GB or 1.6<!-- fact: kv.total / 2**30 --> GiB",
    "23.0<!-- fact: kv.bytes /1000 --> kB, 46,080<!-- fact: kv.bytes *2 --> B in float32",
    "143<!-- fact: speed --> 142.5<!-- fact: speed --> 142.51<!-- fact: speed -->",
    "21 %<!-- fact: share --> 21.0%<!-- fact: share --> 0.21<!-- fact: share -->, 73.3 %<!-- fact: load -->",
    "-0.25<!-- fact: loss --> −0.3<!-- fact: loss --> and a range, 100-143<!-- fact: speed -->",
    "bound by memory<!-- fact: bound --> and by **memory**<!-- fact: bound -->",
    "0.12<!-- fact: edge --> or 0.13<!-- fact: edge -->",
    "每个 token 占 23,040<!-- fact: kv.bytes --> 字节",
    "| 23,040<!-- fact: kv.bytes --> | 143<!-- fact: speed --> |",
    "nothing is quoted",
    "```\n7<!-- fact: kv.bytes -->\n```\nand `7<!-- fact: nonsense -->`",
])
def test_true_numbers_pass(tmp_path: Path, text: str) -> None:
    assert check_document(document(tmp_path, text), BOOK) == []


@pytest.mark.parametrize(("text", "complaint"), [
    ("23,041<!-- fact: kv.bytes -->", "kv.bytes is 23,040, but the text shows 23,041"),
    ("69,120<!-- fact: kv.bytes -->", "23,040"),
    ("1.67<!-- fact: kv.total /1e9 -->", "kv.total is 1.67772, but the text shows 1.67"),
    ("1.68<!-- fact: kv.total -->", "1.67772e+09"),
    ("142.6<!-- fact: speed -->", "142.51"),
    ("142<!-- fact: speed -->", "142.51"),
    ("22 %<!-- fact: share -->", "21.04"),
    ("21<!-- fact: share -->", "0.2104"),
    ("0.25<!-- fact: loss -->", "-0.25"),
    ("compute<!-- fact: bound -->", "'memory'"),
    ("0.11<!-- fact: edge -->", "0.125"),
    ("142.5<!-- fact: spead -->", "there is no fact spead"),
    ("fast<!-- fact: speed -->", "no number stands right in front"),
    ("142.5 tokens<!-- fact: speed -->", "no number stands right in front"),
    ("1<!-- fact: speed /x -->", "factor of speed is not valid"),
])
def test_planted_errors_are_caught(tmp_path: Path, text: str, complaint: str) -> None:
    [problem] = check_document(document(tmp_path, f"line one\n\n```\ncode\n```\n{text}\n"), BOOK)
    assert problem.startswith("README.md:6: ")
    assert complaint in problem


def test_a_document_can_be_brought_up_to_date(tmp_path: Path) -> None:
    """Only the wrong numbers change, at the precision and in the style shown."""
    path = document(tmp_path, "**23,041**<!-- fact: kv.bytes --> 9.9<!-- fact: speed --> 20 %<!-- fact: share -->\n"
                              "143<!-- fact: speed --> 1.60<!-- fact: kv.total /1e9 --> GB, -1.0<!-- fact: loss -->\n"
                              "```\n1<!-- fact: speed -->\n```\n7<!-- fact: unknown --> compute<!-- fact: bound -->\n")
    assert update_document(path, BOOK) == 5
    assert path.read_text(encoding="utf-8") == (
        "**23,040**<!-- fact: kv.bytes --> 142.5<!-- fact: speed --> 21 %<!-- fact: share -->\n"
        "143<!-- fact: speed --> 1.68<!-- fact: kv.total /1e9 --> GB, -0.2<!-- fact: loss -->\n"
        "```\n1<!-- fact: speed -->\n```\n7<!-- fact: unknown --> compute<!-- fact: bound -->\n")
    assert len(check_document(path, BOOK)) == 2                     # the unknown fact and the text fact are prose


def test_names_of_facts_with_their_factors() -> None:
    text = "1<!-- fact: a --> 2<!-- fact: b /1e3 --> 3<!-- fact: b *1000 --> `4<!-- fact: c -->`"
    assert fact_names(text) == ["a", "b *0.001", "b *1000"]


def test_code_references(tmp_path: Path) -> None:
    """Classes, methods, functions, fields and constants are found; what is missing is named."""
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "code.py").write_text("LIMIT = 3\nif True:\n    class A:\n        size: int = 0\n        class B:\n"
                                     "            async def run(self): ...\ndef top(): ...\n")
    good = "`pkg/code.py::A.B.run`, `code.py::top()`, `pkg/code.py::LIMIT`, see `code.py::A.size` and `python -m pkg`"
    assert check_code_references(document(package, good), tmp_path) == []
    bad = "text\n`pkg/code.py::A.run` `pkg/gone.py::A`\n```\n`pkg/gone.py::B`\n```\n`pkg/code.py::top.inner`"
    assert check_code_references(document(package, bad), tmp_path) == [
        "README.md:2: pkg/code.py has no A.run", "README.md:2: there is no file pkg/gone.py",
        "README.md:6: pkg/code.py has no top.inner"]


def test_facts_are_computed_measured_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three sources; measuring one group leaves the other's numbers and machine alone."""
    speeds = iter([1.23456, 2.5])
    machines = iter([{"cpu": "first"}, {"cpu": "second"}, {"cpu": "third"}])
    monkeypatch.setattr(factbook, "describe_machine", lambda: next(machines))
    facts = Facts(tmp_path / "m9_package", computed={"shape": lambda: {"layers": 30, "kv": Fact(23040, "B")}},
                  measured={"slow": lambda: {"slow.speed": Fact(next(speeds), "ns")},
                            "size": lambda: {"size.bytes": Fact(12345, "B")}},
                  results={"bench.speed": Result("bench.json", "engines.1.speed", "tokens/s")})
    facts.store.parent.mkdir(parents=True)
    (facts.store.parent / "bench.json").write_text(json.dumps({"engines": [{"speed": 1}, {"speed": 7.5}]}))
    assert facts.load_measured() == {}
    assert facts.measure() == {"slow.speed": Fact(1.235, "ns"), "size.bytes": Fact(12345, "B")}
    assert facts.measure(["slow"]) == {"slow.speed": Fact(2.5, "ns")}
    assert facts.all() == {"layers": Fact(30), "kv": Fact(23040, "B"), "slow.speed": Fact(2.5, "ns"),
                           "size.bytes": Fact(12345, "B"), "bench.speed": Fact(7.5, "tokens/s")}
    assert json.loads(facts.to_json())["kv"] == {"value": 23040, "unit": "B"}
    stored = json.loads(facts.store.read_text())
    assert {name: group["machine"]["cpu"] for name, group in stored.items()} == {"slow": "third", "size": "second"}
    assert stored["slow"]["command"] == "python -m m9_package facts --measure slow"
    with pytest.raises(ConfigError, match=r"groups=\['fast'\].*allowed: slow, size"):
        facts.measure(["fast"])


def test_a_group_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    Facts(tmp_path, measured={"old": lambda: {"old.n": Fact(1)}}).measure()
    facts = Facts(tmp_path, measured={"new": lambda: {"new.n": Fact(2)}})
    facts.measure()
    assert facts.load_measured() == {"new.n": Fact(2)}


def test_a_name_has_one_fact() -> None:
    with pytest.raises(ConfigError, match="used twice: b"):
        merge({"a": Fact(1), "b": Fact(2)}, {"b": Fact(2)})


@pytest.mark.parametrize("value", [True, None, [1]])
def test_a_fact_is_a_number_or_text(value: object) -> None:
    with pytest.raises(ConfigError, match="allowed: a number or text"):
        Fact(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("file", "path", "complaint"), [
    ("gone.json", "a", "gone.json cannot be read"), ("broken.json", "a", "broken.json cannot be read"),
    ("good.json", "a.c", "nothing at 'c'"), ("good.json", "list.5", "nothing at '5'"),
    ("good.json", "a.b.c", "nothing at 'c'"), ("good.json", "a", "is not a number or text")])
def test_results_that_cannot_be_read(tmp_path: Path, file: str, path: str, complaint: str) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "good.json").write_text('{"a": {"b": 1.5}, "list": [3]}')
    (tmp_path / "results" / "broken.json").write_text('{"a"')
    assert read_result(tmp_path, "good.json", "a.b") == 1.5
    with pytest.raises(ConfigError, match=complaint):
        read_result(tmp_path, file, path)


def test_facts_of_this_milestone() -> None:
    """F0.12: numbers that the documents are known to need."""
    facts = FACTS.all()
    assert facts["smollm2.kv_bytes_per_token"] == Fact(23_040, "B")
    assert facts["smollm2.kv_bytes_per_token_wrong"] == Fact(69_120, "B")
    assert facts["qwen3_0_6b.kv_bytes_per_token"] == facts["qwen3_0_6b.kv_bytes_per_token_wrong"]
    assert facts["llama2_13b.kv_bytes.2048"] == Fact(1_677_721_600, "B")
    assert facts["smollm2.weight_bytes.bfloat16"] == Fact(269_030_016, "B")
    assert facts["qwen3_8b.h100.decode.512.b1.bound"] == Fact("memory")
    assert facts["h100.ridge.bfloat16"].value == pytest.approx(295.3, abs=0.1)


def test_stored_measurements_belong_to_the_code_as_it_is() -> None:
    """F0.3, F0.13: no benchmark was renamed, added or dropped since the numbers were stored."""
    stored = json.loads(FACTS.store.read_text(encoding="utf-8"))
    assert set(stored) == set(FACTS.measured)
    assert set(stored["microbench"]["facts"]) == set(run_all(quick=True))
    for group in stored.values():
        assert {"cpu", "torch", "threads", "gpu"} <= set(group["machine"])
        assert all(fact["value"] for fact in group["facts"].values())
