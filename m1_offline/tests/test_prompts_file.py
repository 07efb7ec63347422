"""F1.9: a file of prompts in, a file of results out; a bad line is named, and the others are run."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m0_basics.outputs import RequestOutput
from m0_basics.tools.cli import batch_file
from m0_basics.tools.testing.command_line import Command, options, text_of
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import TinyModels


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
            (json.dumps({"messages": [{"content": "x"}]}), "allowed: a dict with role and content"),
            (json.dumps({"messages": []}), "messages is empty"),
            (json.dumps({"messages": "hello"}), "allowed: a list of dicts with role and content"),
            (json.dumps({"messages": 5}), "allowed: a list of dicts with role and content"),
            (json.dumps({"messages": [{"role": "user", "content": 5}]}), "the chat template refuses these messages"),
            (json.dumps({"prompt": "the", "n": 2, "temperature": 1, "seed": 1}), None),
            (json.dumps({"messages": chat, "add_generation_prompt": False, "continue_final_message": True}), None),
            (json.dumps({"messages": chat, "continue_final_message": True}), "add_generation_prompt=True"),
            (json.dumps({"messages": chat, "chat_template_kwargs": 5}), "chat_template_kwargs=5 is not valid"),
            (json.dumps({"prompt": "the", "chat_template_kwargs": {}}), "unknown sampling parameter"),
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
        begun = "<|im_start|>user\nthe"
        assert rows[28]["prompt"] == begun
        assert outputs[29][0]["text"] == text_of(folder, begun, greedy(4, ignore_eos=False))

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
        describe = batch_file.describe

        def break_and_describe(output: RequestOutput) -> dict[str, Any]:
            if target.is_file():
                target.unlink()
                target.mkdir()
            return describe(output)

        monkeypatch.setattr(batch_file, "describe", break_and_describe)
        result = command("generate", "--prompts-file", source, "--output", target, *options(folder), "--max-tokens", 3)
        assert result.status == 1
        assert [json.loads(line)["line"] for line in result.out.splitlines()] == [1, 2]
        assert "cannot be written: Is a directory; the results follow on standard output" in result.err

    def test_a_run_that_is_cut_off_goes_on(self, command: Command, folder: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
        """F1.9: each result is on the disk when it is there. The same command runs the rest, and no line twice."""
        source, target = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
        source.write_text("the\nin\n\nan\nre\n", encoding="utf-8")
        arguments = ("generate", "--prompts-file", source, "--output", target, *options(folder), "--max-tokens", 3)
        whole = command(*arguments)
        assert whole.status == 0
        expected = [json.loads(line) for line in target.read_text().splitlines()]
        assert sorted(tmp_path.iterdir()) == [target, source]

        described: list[str | None] = []
        describe = batch_file.describe

        def describe_two(output: RequestOutput) -> dict[str, Any]:
            if len(described) == 2:
                raise KeyboardInterrupt
            described.append(output.prompt)
            return describe(output)

        monkeypatch.setattr(batch_file, "describe", describe_two)
        cut = command(*arguments)
        assert cut.status != 0
        assert "Traceback" not in cut.err
        assert f"interrupted; those that are there are in {target}.part; the same command goes on" in cut.err
        part = tmp_path / "out.jsonl.part"
        assert len(part.read_text().splitlines()) == 2
        part.write_text(part.read_text() + '{"input": "cut off in the mid')
        monkeypatch.setattr(batch_file, "describe", lambda output: (described.append(output.prompt),
                                                                    describe(output))[1])
        rest = command(*arguments)
        assert (rest.status, described) == (0, ["the", "in", "an", "re"])
        assert "2 results of an earlier run" in rest.err
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert [(r["line"], r["prompt"], r["outputs"]) for r in rows] == [
            (r["line"], r["prompt"], r["outputs"]) for r in expected]
        assert not part.exists()

    def test_another_input_does_not_go_on(self, command: Command, folder: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
        """F1.9: a line that has changed, or other options: nothing of the earlier run is taken for it."""
        source, target = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
        source.write_text("the\nin\n", encoding="utf-8")
        arguments = ("generate", "--prompts-file", source, "--output", target, *options(folder), "--max-tokens")
        finish = batch_file._Writer.finish
        monkeypatch.setattr(batch_file._Writer, "finish", lambda self: None)
        command(*arguments, 3)
        monkeypatch.setattr(batch_file._Writer, "finish", finish)
        source.write_text("an\nin\n", encoding="utf-8")
        command(*arguments, 2)
        rows = [json.loads(line) for line in target.read_text().splitlines()]
        assert [(r["prompt"], len(r["outputs"][0]["token_ids"])) for r in rows] == [("an", 2), ("in", 2)]

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
