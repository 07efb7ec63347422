"""F1.9: the command line, most of it in this process, some as a process of its own. m0 runs the same code."""
from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from m0_basics.sampling_params import SamplingParams
from m0_basics.tests.test_chat_template import THINKING, with_template
from m0_basics.tools.testing.command_line import Command, Result, options, text_of
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import PARROT_TEXT, TinyModels
from m0_basics.tools.testing.tiny_models import BOS
from m1_offline import LLM


@pytest.fixture
def folder(tiny_model: TinyModels) -> Path:
    return tiny_model("qwen3")


class TestGenerate:
    """F1.9: one prompt."""

    @pytest.mark.parametrize("package", ["m0_basics", "m1_offline"])
    def test_text_goes_to_stdout_and_numbers_to_stderr(self, command: Command, folder: Path, package: str) -> None:
        """F1.9: greedy and up to 256 tokens by default; the text is what the library gives."""
        expected = text_of(folder, "the cat", greedy(96, ignore_eos=False), package)
        result = command("generate", "the cat", *options(folder), package=package)
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

    def test_variables_of_the_template(self, command: Command, folder: Path, tmp_path: Path) -> None:
        """`LLM.chat` and the command line pass them on: the prompt is another one, and so is the answer."""
        with_template(folder, tmp_path, THINKING)
        llm = LLM(str(tmp_path / "model"), dtype="float32", max_model_len=96)
        messages, off = [{"role": "user", "content": "hello"}], {"enable_thinking": False}
        prompts, texts = [], []
        for variables in (None, off):
            text = llm.get_tokenizer().apply_chat_template(messages, chat_template_kwargs=variables)
            [output] = llm.chat(messages, greedy(12), use_tqdm=False, chat_template_kwargs=variables)
            assert output.prompt_token_ids == llm.get_tokenizer().encode(text, False)
            prompts.append(output.prompt_token_ids)
            texts.append(output.outputs[0].text)
        assert prompts[0] != prompts[1]
        assert texts[0] != texts[1]
        flags = (*options(tmp_path / "model"), "--max-tokens", 12, "--ignore-eos", "--no-stats")
        assert command("chat", "hello", *flags).out == texts[0] + "\n"
        result = command("chat", "hello", "--chat-template-kwargs", json.dumps(off), *flags)
        assert (result.status, result.out) == (0, texts[1] + "\n")

    def test_a_conversation(self, command: Command, folder: Path) -> None:
        """Each turn sees those before it; /reset forgets them; an error or an unknown command leaves them."""
        limit = greedy(6, ignore_eos=False)

        def user(text: str) -> dict[str, str]:
            return {"role": "user", "content": text}

        one = text_of(folder, [user("a")], limit)
        two = text_of(folder, [user("a"), {"role": "assistant", "content": one}, user("b")], limit)
        fresh = text_of(folder, [user("c")], limit)
        stdin = "\n".join(["a", "", "x" * 200, "/foo", "b", "/reset", "c", "/quit", "never"])
        result = command("chat", *options(folder), "--max-tokens", 6, "--no-stats", stdin=stdin)
        assert result.status == 0
        assert result.out == f"> {one}\n> > > > {two}\n> > {fresh}\n> "
        help_line, error, unknown = result.err.splitlines()
        assert "/reset" in help_line
        assert "allowed: at most 95" in error
        assert unknown == "error: /foo is no command; allowed: /reset, /quit"
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


class TestBadArguments:
    """F1.9: exit status 2 and, for a bad value, one line naming field, value and what is allowed."""

    @pytest.mark.parametrize(("arguments", "message"), [
        (["generate", "x", "--temperature", "-1"], "temperature=-1.0 is not valid; allowed: a number >= 0"),
        (["generate", "x", "--top-p", "0"], "top_p=0.0 is not valid; allowed: a number above 0, up to 1"),
        (["chat", "x", "--chat-template-kwargs", "[1]"], "chat_template_kwargs='[1]' is not valid; allowed: a JSON"),
        (["generate", "x", "--n", "2"], "n=2 is not valid; allowed: 1 where temperature is 0 (greedy outputs are all"),
        (["generate", "x", "--logit-bias", "{"], "logit_bias='{' is not valid; allowed: JSON such as {\"42\": -1.5}"),
        (["generate", "x", "--structured-outputs", "abc"], "structured_outputs='abc' is not valid; allowed: JSON such"),
        (["generate", "x", "--structured-outputs", "5"], "structured_outputs='5' is not valid; allowed: JSON such as"),
        (["generate", "x", "--structured-outputs", '{"regexp": "a"}'],
         "unknown key regexp in structured_outputs; allowed: json, regex, choice"),
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

    @pytest.mark.parametrize("package", ["m0_basics", "m1_offline"])
    @pytest.mark.parametrize("name", ["generate", "chat", "bench", "divergence"])
    def test_every_option_has_a_flag_and_a_text(self, command: Command, package: str, name: str) -> None:
        result = command(name, "--help", package=package)
        assert result.status == 0
        words = set(result.out.replace("│", " ").replace("/", " ").split())
        llm_class = importlib.import_module(package).LLM
        flags = {f"--{option.replace('_', '-')}" for option in llm_class.config_class.options()}
        assert {"--model", "--dtype", "--max-model-len", "--max-num-seqs", "--kv-cache-dtype"} < flags
        if name in ("generate", "chat"):
            fields = {f.name for f in dataclasses.fields(SamplingParams)} - {"detokenize"}
            flags |= {f"--{field.replace('_', '-')}" for field in fields}
        refused = {"--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size"}    # but for 1
        assert flags - refused <= words and not refused & words
        assert "Rows of the KV cache" in " ".join(result.out.split()) or package == "m0_basics"

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
        numbers = re.findall(r"^ *(\d+)  not started  \w", result.out, re.MULTILINE)
        files = re.findall(r"^ +(\S+\.py)::\S+ *$", result.out, re.MULTILINE)
        assert len(numbers) >= 5 and numbers == [str(n + 1) for n in range(len(files))]
        assert all((Path(__file__).parents[2] / package / file).is_file() for file in files)
        assert "\nbug 1  not planted  " in result.out and f"\n0 of {len(files)} solved\n" in result.out

    def test_divergence(self, command: Command, folder: Path) -> None:
        """FX.6, F1.9: the same tokens as transformers' in float32, said in words."""
        result = command("divergence", "the cat", "--max-tokens", 4, *options(folder))
        assert result.status == 0
        assert "prompt 'the cat'" in result.out
        assert "the same 4 tokens" in result.out


@pytest.mark.slow
class TestProcess:
    """F1.9: real processes: exit status, streams, no traceback."""

    def run(self, *arguments: Any, stdin: str = "", module: str = "m1_offline") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], input=stdin, capture_output=True,
                              encoding="utf-8", timeout=600, cwd=Path(__file__).parents[2], env=environment,
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
        result = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, encoding="utf-8", timeout=600,
                                cwd=Path(__file__).parents[2], check=False)
        assert result.stdout == "a"
        assert "Traceback" not in result.stderr
