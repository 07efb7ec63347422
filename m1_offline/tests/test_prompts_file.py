"""F1.9: a file of prompts in, a file of results out; a bad line is named, and the others are run."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m0_basics.tools.testing.command_line import Command, options, text_of
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import TinyModels
from m1_offline import LLM


@pytest.fixture
def folder(tiny_model: TinyModels) -> Path:
    return tiny_model("qwen3")


class TestPromptsFile:
    """F1.9: a file of prompts; a bad line is named by its number, the others run."""

    def test_lines_of_text(self, command: Command, folder: Path, tmp_path: Path) -> None:
        source, target = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
        source.write_bytes("the cat\r\n\n中 in\n".encode() + b"\xff\xfe broken\n" + b'{"prompt": "the"}\nlast')
        result = command("generate", "--prompts-file", source, "--output", target, *options(folder), "--max-tokens", 5)
        assert (result.status, result.out) == (1, "")
        rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        assert [row["line"] for row in rows] == [1, 3, 4, 5, 6]
        good = {1: "the cat", 3: "中 in", 5: '{"prompt": "the"}', 6: "last"}
        for row in rows:
            if row["line"] in good:
                assert row["outputs"][0]["text"] == text_of(folder, good[row["line"]], greedy(5, ignore_eos=False))
                assert row["outputs"][0]["finish_reason"] == "length"
                assert len(row["outputs"][0]["token_ids"]) == 5
        assert rows[2] == {"line": 4, "error": "it is not valid UTF-8"}
        assert f"error: {source}, line 4: it is not valid UTF-8" in result.err

    def test_lines_of_json(self, command: Command, folder: Path, tmp_path: Path) -> None:
        """Every way a line may be bad, between good lines of every kind."""
        chat = [{"role": "user", "content": "the"}]
        lines: list[tuple[str, str | None]] = [
            (json.dumps({"prompt": "the cat", "max_tokens": 3}), None),
            ('{"prompt": "the', "it is not JSON"),
            (json.dumps({"text": "the"}), "allowed: an object with one of prompt, prompt_token_ids, messages"),
            (json.dumps({"prompt": "a", "messages": chat}), "allowed: an object with one of"),
            (json.dumps([1, 2]), "allowed: an object with one of"),
            (json.dumps("just text"), None),
            (json.dumps({"prompt": "a", "temprature": 1}), "unknown sampling parameter temprature; allowed: "),
            (json.dumps({"prompt": "a", "temperature": -1}), "temperature=-1 is not valid; allowed: a number >= 0"),
            (json.dumps({"prompt": "a", "stop": 5}), "stop=5 is not valid; allowed: None, text"),
            (json.dumps({"prompt": "a", "ignore_eos": "no"}), "ignore_eos='no' is not valid; allowed: True or False"),
            (json.dumps({"prompt": "a", "logit_bias": {"x": 1}}), "logit_bias={'x': 1} is not valid"),
            (json.dumps({"prompt": "a", "logit_bias": {"900": 1}}), "900 is not valid; allowed: 0 to 287"),
            (json.dumps({"prompt": "a", "logit_bias": {"17": 100}}), None),
            (json.dumps({"prompt_token_ids": [3, 4]}), None),
            (json.dumps({"prompt_token_ids": [3, 288]}), "288 is not valid; allowed: 0 to 287"),
            (json.dumps({"prompt_token_ids": "abc"}), "allowed: text, a list of token ids"),
            (json.dumps({"prompt": "x" * 200}), "200 tokens; allowed: at most 95"),
            ('{"prompt": "half \\ud83d"}', "half a character"),
            (json.dumps({"prompt": ""}), "the prompt is empty"),
            (json.dumps({"prompt": None}), "NoneType"),
            (json.dumps({"prompt": "a", "n": 100, "temperature": 1}), "n=100 is not valid; allowed: at most"),
            (json.dumps({"messages": chat}), None),
            (json.dumps({"messages": [{"role": "user"}]}), "allowed: a dict with role and content"),
            (json.dumps({"messages": []}), "messages is empty"),
            (json.dumps({"messages": "hello"}), "allowed: a list of dicts with role and content"),
            (json.dumps({"messages": 5}), "allowed: a list of dicts with role and content"),
            (json.dumps({"messages": [{"role": "user", "content": 5}]}), "the chat template refuses these messages"),
            (json.dumps({"prompt": "the", "n": 2, "temperature": 1, "seed": 1}), None),
        ]
        source = tmp_path / "prompts.jsonl"
        source.write_text("\n".join(line for line, _ in lines), encoding="utf-8")
        result = command("generate", "--prompts-file", source, *options(folder), "--max-tokens", 4)
        assert result.status == 1
        rows = [json.loads(line) for line in result.out.splitlines()]
        assert [row["line"] for row in rows] == list(range(1, len(lines) + 1))
        for row, (_, error) in zip(rows, lines, strict=True):
            assert ("error" in row) == (error is not None), row
            if error is not None:
                assert error in row["error"]
                assert f"error: {source}, line {row['line']}: {row['error']}" in result.err
        outputs = {row["line"]: row["outputs"] for row in rows if "outputs" in row}
        assert [len(outputs[line][0]["token_ids"]) for line in (1, 6, 13, 14, 22)] == [3, 4, 4, 4, 4]
        assert outputs[13][0]["token_ids"] == [17] * 4
        assert outputs[22][0]["text"] == text_of(folder, chat, greedy(4, ignore_eos=False))
        assert len(outputs[28]) == 2

    def test_only_good_lines(self, command: Command, folder: Path, tmp_path: Path) -> None:
        source = tmp_path / "prompts.txt"
        source.write_text("the\nin\n", encoding="utf-8")
        result = command("generate", "--prompts-file", source, *options(folder), "--max-tokens", 2)
        assert result.status == 0
        assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["the", "in"]

    def test_only_bad_lines_load_no_model(self, command: Command, tmp_path: Path) -> None:
        source = tmp_path / "prompts.jsonl"
        source.write_text("{\n[]\n", encoding="utf-8")
        result = command("generate", "--prompts-file", source, "--model", "/nowhere")
        assert result.status == 1
        assert [json.loads(line)["line"] for line in result.out.splitlines()] == [1, 2]

    def test_an_output_that_cannot_be_written_is_found_before_anything_runs(
            self, command: Command, tmp_path: Path) -> None:
        """The model does not exist either: that would be the first error if it had been looked for."""
        source = tmp_path / "prompts.txt"
        source.write_text("the\n", encoding="utf-8")
        for target, reason in ((tmp_path / "missing" / "out.jsonl", "No such file or directory"),
                               (tmp_path, "Is a directory")):
            result = command("generate", "--prompts-file", source, "--output", target, "--model", "/nowhere")
            assert result.status == 2
            assert result.err == f"error: output={str(target)!r} cannot be written: {reason}; nothing was run\n"
        result = command("generate", "--prompts-file", tmp_path / "none.txt", "--model", "/nowhere")
        assert (result.status, result.err) == (
            2, f"error: prompts_file={str(tmp_path / 'none.txt')!r} cannot be read: No such file or directory\n")

    def test_an_output_that_goes_away_meanwhile_loses_nothing(
            self, command: Command, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The results follow on standard output, and the status says that something went wrong."""
        source, target = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
        source.write_text("the\nin\n", encoding="utf-8")
        generate = LLM.generate

        def generate_and_break(self: LLM, *arguments: Any, **settings: Any) -> Any:
            outputs = generate(self, *arguments, **settings)
            target.unlink()
            target.mkdir()
            return outputs

        monkeypatch.setattr(LLM, "generate", generate_and_break)
        result = command("generate", "--prompts-file", source, "--output", target, *options(folder), "--max-tokens", 3)
        assert result.status == 1
        assert [json.loads(line)["line"] for line in result.out.splitlines()] == [1, 2]
        assert "cannot be written: Is a directory; the results follow on standard output" in result.err

    def test_earlier_results_stay_until_there_are_new_ones(self, command: Command, tmp_path: Path) -> None:
        source, target = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
        source.write_text("the\n", encoding="utf-8")
        target.write_text("precious\n", encoding="utf-8")
        result = command("generate", "--prompts-file", source, "--output", target, "--model", "/nowhere")
        assert result.status == 2
        assert target.read_text(encoding="utf-8") == "precious\n"


def test_the_prompts_are_not_overwritten(command: Command, folder: Path, tmp_path: Path) -> None:
    """F1.9: the output file has to be another one."""
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n")
    result = command("generate", "--prompts-file", file, "--output", file, *options(folder))
    assert result.status == 2
    assert "allowed: another file than the prompts" in result.err
    assert file.read_text() == "the cat\n"


def test_log_probabilities_and_times_are_written(command: Command, folder: Path, tmp_path: Path) -> None:
    """F1.7, F1.9: what was asked for arrives; TPOT is (latency - TTFT) / (output tokens - 1)."""
    file = tmp_path / "prompts.txt"
    file.write_text("the cat\n")
    result = command("generate", "--prompts-file", file, "--logprobs", 2, "--prompt-logprobs", 1, "--max-tokens", 4,
                     "--ignore-eos", *options(folder))
    assert result.status == 0
    row = json.loads(result.out)
    (output,) = row["outputs"]
    chosen = [step[str(i)]["logprob"] for i, step in zip(output["token_ids"], output["logprobs"], strict=True)]
    assert sum(chosen) == pytest.approx(output["cumulative_logprob"])
    assert row["prompt_logprobs"][0] is None
    assert len(row["prompt_logprobs"]) == row["num_prompt_tokens"]
    times = row["metrics"]
    assert 0 < times["ttft_ms"] < times["e2el_ms"]
    assert times["tpot_ms"] == pytest.approx((times["e2el_ms"] - times["ttft_ms"]) / 3)
