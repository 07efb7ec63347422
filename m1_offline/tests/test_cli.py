"""F1.9: the command line, most of it in this process, some as a process of its own. m0 runs the same code."""
from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import m0_basics
import m1_offline
from m0_basics.cli import main
from m0_basics.sampling_params import SamplingParams
from m0_basics.testing.conformance import greedy
from m0_basics.testing.fixtures import PARROT_TEXT, TinyModels
from m0_basics.testing.tiny_models import BOS
from m1_offline import LLM


@dataclasses.dataclass
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m <package> <arguments>` in this process."""

    def run(*arguments: Any, stdin: str = "", package: str = "m1_offline") -> Result:
        monkeypatch.setattr(sys, "argv", [package, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        status: Any = 0
        try:
            main(package)
        except SystemExit as ended:
            status = ended.code or 0
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def folder(tiny_model: TinyModels) -> Path:
    return tiny_model("qwen3")


def options(folder: Path) -> list[Any]:
    return ["--model", folder, "--dtype", "float32", "--max-model-len", 96]


def text_of(folder: Path, prompt: Any, params: SamplingParams, package: Any = m1_offline) -> str:
    llm = package.LLM(str(folder), dtype="float32", max_model_len=96)
    run = llm.chat if isinstance(prompt, list) else llm.generate
    return run(prompt, params, use_tqdm=False)[0].outputs[0].text


class TestGenerate:
    """F1.9: one prompt."""

    @pytest.mark.parametrize("package", [m0_basics, m1_offline])
    def test_text_goes_to_stdout_and_numbers_to_stderr(self, command: Command, folder: Path, package: Any) -> None:
        """F1.9: greedy and up to 256 tokens by default; the text is what the library gives."""
        expected = text_of(folder, "the cat", greedy(96, ignore_eos=False), package)
        result = command("generate", "the cat", *options(folder), package=package.__name__)
        assert (result.status, result.out) == (0, expected + "\n")
        assert result.err.startswith("TTFT ")
        assert "tokens/s | peak memory" in result.err
        assert "command to first token" in result.err

    def test_the_end_of_the_text(self, command: Command, tiny_model: TinyModels) -> None:
        model = ("--model", tiny_model("parrot_eos"), "--no-stats")
        assert command("generate", BOS, *model) == Result(0, PARROT_TEXT + "\n", "")
        assert command("generate", BOS, *model, "--stop", "😀", "--stop", "zz").out == "aé中\n"
        assert command("generate", BOS, *model, "--stop", "😀", "--include-stop-str-in-output").out == "aé中😀\n"
        assert command("generate", BOS, *model, "--max-tokens", 4).out == "aé\ufffd\n"

    def test_sampling_flags_reach_the_sampler(self, command: Command, folder: Path) -> None:
        """F1.9: numbers, lists and JSON; --seed is the request's."""
        params = SamplingParams(temperature=1.5, top_k=9, seed=-4, max_tokens=12, stop_token_ids=[5, 6],
                                logit_bias={42: -1.5, 7: 2}, ignore_eos=True, repetition_penalty=1.2)
        flags = ("--temperature", 1.5, "--top-k", 9, "--seed", -4, "--max-tokens", 12, "--stop-token-ids", 5,
                 "--stop-token-ids", 6, "--logit-bias", '{"42": -1.5, "7": 2}', "--ignore-eos", "--repetition-penalty",
                 1.2, "--no-stats")
        assert command("generate", "on the", *options(folder), *flags).out == text_of(folder, "on the", params) + "\n"

    def test_several_outputs(self, command: Command, folder: Path) -> None:
        """The first is streamed, and the user is told of the others."""
        flags = ("--n", 3, "--temperature", 1, "--seed", 1, "--max-tokens", 5)
        result = command("generate", "the", *options(folder), *flags)
        first = text_of(folder, "the", SamplingParams(seed=1, max_tokens=5))
        assert (result.status, result.out) == (0, first + "\n")
        assert "output 1 of 3" in result.err


class TestChat:
    """F1.9: one message, or a conversation on standard input."""

    def test_one_message(self, command: Command, folder: Path) -> None:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello 中"}]
        result = command("chat", "hello 中", "--system", "be brief", *options(folder), "--max-tokens", 20)
        assert (result.status, result.out) == (0, text_of(folder, messages, greedy(20, ignore_eos=False)) + "\n")

    def test_a_conversation(self, command: Command, folder: Path) -> None:
        """Each turn sees those before it; /reset forgets them; an error leaves them; the end of input ends it."""
        limit = greedy(6, ignore_eos=False)

        def user(text: str) -> dict[str, str]:
            return {"role": "user", "content": text}

        one = text_of(folder, [user("a")], limit)
        two = text_of(folder, [user("a"), {"role": "assistant", "content": one}, user("b")], limit)
        fresh = text_of(folder, [user("c")], limit)
        stdin = "\n".join(["a", "", "x" * 200, "b", "/reset", "c", "/quit", "never"])
        result = command("chat", *options(folder), "--max-tokens", 6, "--no-stats", stdin=stdin)
        assert result.status == 0
        assert result.out == f"> {one}\n> > > {two}\n> > {fresh}\n> "
        help_line, error = result.err.splitlines()
        assert "/reset" in help_line
        assert "allowed: at most 95" in error
        assert command("chat", *options(folder), "--no-stats", stdin="").out == "> "

    def test_a_model_without_a_template(self, command: Command, folder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "plain"
        copy.mkdir()
        for file in folder.iterdir():
            if file.name != "tokenizer_config.json":
                (copy / file.name).symlink_to(file)
        result = command("chat", "hello", *options(copy))
        assert (result.status, result.out) == (2, "")
        assert result.err == "error: this model has no chat template; use generate instead of chat\n"


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


class TestBadArguments:
    """F1.9: exit status 2 and, for a bad value, one line naming field, value and what is allowed."""

    @pytest.mark.parametrize(("arguments", "message"), [
        (["generate", "x", "--temperature", "-1"], "temperature=-1.0 is not valid; allowed: a number >= 0"),
        (["generate", "x", "--top-p", "0"], "top_p=0.0 is not valid; allowed: a number above 0, up to 1"),
        (["generate", "x", "--n", "2"], "n=2 is not valid; allowed: 1 where temperature is 0 (greedy outputs are all"),
        (["generate", "x", "--logit-bias", "{"], "logit_bias='{' is not valid; allowed: JSON such as {\"42\": -1.5}"),
        (["chat", "x", "--max-tokens", "0"], "max_tokens=0 is not valid; allowed: an integer >= 1 or None"),
        (["chat", "x", "--dtype", "int3"], "dtype='int3' is not valid; allowed: auto, float32, float16, bfloat16"),
        (["chat", "x", "--max-num-seqs", "0"], "max_num_seqs=0 is not valid; allowed: an integer >= 1"),
        (["chat", "x", "--model", "/nowhere"], "model='/nowhere' does not exist; allowed: smollm2-135m-instruct, a"),
        (["generate"], "generate needs one of a prompt and --prompts-file; allowed: exactly one"),
        (["generate", "x", "--prompts-file", "y"], "generate needs one of a prompt and --prompts-file; allowed: exact"),
        (["generate", "x", "--output", "y"], "output needs --prompts-file; allowed: shell redirection"),
        (["exercise", "start", "99"], "99"),
    ])
    def test_a_bad_value(self, command: Command, arguments: list[str], message: str) -> None:
        result = command(*arguments)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith("error: ")
        assert message in result.err
        assert result.err.count("\n") == 1

    def test_a_bad_prompt(self, command: Command, folder: Path) -> None:
        result = command("generate", "x" * 200, *options(folder))
        assert (result.status, result.out) == (2, "")
        assert result.err == ("error: the prompt has 200 tokens; allowed: at most 95, so that one more fits into "
                              "max_model_len=96\n")

    @pytest.mark.parametrize("arguments", [["generate", "x", "--temprature", "1"], ["generate", "x", "--top-k", "some"],
                                           ["frobnicate"], ["chat", "a", "b"], ["chat", "--max-seqs", "2"]])
    def test_an_unknown_option_or_no_number(self, command: Command, arguments: list[str]) -> None:
        result = command(*arguments)
        assert (result.status, result.out) == (2, "")
        assert next(a for a in reversed(arguments) if a.strip("-") in result.err)
        assert "Traceback" not in result.err

    def test_m0_refuses_what_it_has_no_part_for(self, command: Command, folder: Path) -> None:
        result = command("generate", "x", *options(folder), "--top-k", 5, package="m0_basics")
        assert result.status == 2
        assert result.err.startswith("error: top_k=5: GreedySampler does not support it; it supports: ")


class TestHelp:
    """F1.9, F0.1: flags come from the fields of the dataclasses, so none can be forgotten."""

    @pytest.mark.parametrize("package", [m0_basics, m1_offline])
    @pytest.mark.parametrize("name", ["generate", "chat", "bench", "divergence"])
    def test_every_option_has_a_flag_and_a_text(self, command: Command, package: Any, name: str) -> None:
        result = command(name, "--help", package=package.__name__)
        assert result.status == 0
        words = set(result.out.replace("│", " ").replace("/", " ").split())
        flags = {f"--{option.replace('_', '-')}" for option in package.LLM.config_class.options()}
        assert {"--model", "--dtype", "--max-model-len", "--max-num-seqs", "--kv-cache-dtype"} < flags
        if name in ("generate", "chat"):
            fields = {f.name for f in dataclasses.fields(SamplingParams)} - {"structured_outputs", "detokenize"}
            flags |= {f"--{field.replace('_', '-')}" for field in fields}
        assert flags <= words
        assert "Rows of the KV cache" in " ".join(result.out.split()) or package is m0_basics

    def test_commands(self, command: Command) -> None:
        for arguments in (["--help"], []):
            result = command(*arguments)
            text = result.out + result.err
            for name in ("generate", "chat", "bench", "divergence", "facts", "exercise"):
                assert f" {name} " in text
            assert "Milestone 1: a KV cache" in text

    @pytest.mark.parametrize("package", ["m0_basics", "m1_offline"])
    def test_facts(self, command: Command, package: str) -> None:
        """F1.9: JSON, with the numbers that the documents quote."""
        result = command("facts", package=package)
        assert result.status == 0
        assert "kv_bytes_per_token" in result.out
        assert any("23040" in json.dumps(value) for value in json.loads(result.out).values())

    @pytest.mark.parametrize("package", ["m0_basics", "m1_offline"])
    def test_exercise_list(self, command: Command, package: str, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LLM_LAB_WORKSPACE", str(tmp_path))
        result = command("exercise", "list", package=package)
        assert result.status == 0
        lines = result.out.splitlines()
        assert len(lines) >= 5
        for number, line in enumerate(lines, start=1):
            assert line.split()[:3] == [str(number), "not", "started"]
            file = line.split()[3].split("::")[0]
            assert (Path(__file__).parents[2] / package / file).is_file()

    def test_divergence(self, command: Command, folder: Path) -> None:
        """FX.6, F1.9: the same tokens as transformers' in float32, said in words."""
        result = command("divergence", "the cat", "--max-tokens", 4, *options(folder))
        assert result.status == 0
        assert "prompt 'the cat'" in result.out
        assert "the same 4 tokens" in result.out


class TestProcess:
    """F1.9: real processes: exit status, streams, no traceback."""

    def run(self, *arguments: Any, stdin: str = "", module: str = "m1_offline") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], input=stdin, capture_output=True,
                              encoding="utf-8", timeout=120, cwd=Path(__file__).parents[2], env=environment,
                              check=False)

    def test_generate(self, tiny_model: TinyModels) -> None:
        result = self.run("generate", BOS, "--model", tiny_model("parrot_eos"))
        assert (result.returncode, result.stdout) == (0, PARROT_TEXT + "\n")
        assert result.stderr.startswith("TTFT ")
        assert len(result.stderr.splitlines()) == 1

    def test_a_conversation_with_m0(self, tiny_model: TinyModels) -> None:
        result = self.run("chat", "--model", tiny_model("qwen3"), "--max-tokens", 3, "--no-stats",
                          stdin="hello\n/quit\n", module="m0_basics")
        assert result.returncode == 0
        assert result.stdout.startswith("> ")
        assert "Traceback" not in result.stderr

    def test_a_bad_value(self) -> None:
        result = self.run("generate", "x", "--temperature", "-1")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "error: temperature=-1.0 is not valid; allowed: a number >= 0 (0 is greedy)\n"

    def test_a_reader_that_goes_away(self, tiny_model: TinyModels) -> None:
        """`... | head -c 1`: the output breaks off, without a traceback."""
        model = tiny_model("parrot")
        shell = (f"{sys.executable} -m m1_offline generate '{BOS}' --model {model} --max-tokens 400 --no-stats "
                 "--max-model-len 500 | head -c 1")
        result = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, encoding="utf-8", timeout=120,
                                cwd=Path(__file__).parents[2], check=False)
        assert result.stdout == "a"
        assert "Traceback" not in result.stderr
