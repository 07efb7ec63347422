"""The kernels are built once; where they cannot be, the engine says so once and runs without them."""
from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from m0_basics.tools.testing.command_line import Command, options
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens, reference_greedy
from m4_flash_attn import LLM
from m4_flash_attn.kernels.cpu import build
from m4_flash_attn.kernels.cpu.build import BuildError, describe, find_compiler, library
from m4_flash_attn.kernels.cpu.linear import choose
from m4_flash_attn.tests.other_sources import OTHER_FORMAT, THREADS

pytestmark = pytest.mark.slow

NO_COMPILER = "no C++ compiler was found; install one (g++ or clang++), or set CXX"


def _owned(status: os.stat_result, uid: int) -> SimpleNamespace:
    """The status of the same file, were it that user's."""
    fields = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
    return SimpleNamespace(**fields | {"st_uid": uid})


def forget() -> None:
    """As in a new process."""
    build._load.cache_clear()
    build._all_flags.cache_clear()
    choose.cache_clear()


@pytest.fixture(autouse=True)
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, and in it the folder of built kernels."""
    monkeypatch.setenv("LLM_LAB_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "kernels"
    forget()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small kernel in the place of the real ones: it compiles in no time."""
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    file = tmp_path / "sources" / "answer.cpp"
    file.parent.mkdir()
    file.write_text('extern "C" int answer() { return 42; }\n')
    (file.parent / "threads.cpp").write_text(THREADS)
    return file


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was compiled."""
    seen: list[Path] = []
    original = build._compile

    def watched(compiler: build.Command, flags: tuple[str, ...], sources: Path, stem: Path) -> Path:
        seen.append(stem)
        seen[-1] = original(compiler, flags, sources, stem)
        return seen[-1]

    monkeypatch.setattr(build, "_compile", watched)
    return seen


def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def compiler_script(tmp_path: Path, text: str) -> str:
    """A compiler that knows no flag, and then runs `text`."""
    file = tmp_path / "compiler"
    file.write_text(f'#!/bin/sh\ncase "$*" in *probe.so*) exit 1;; esac\n{text}\n')
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def test_built_once(source: Path, kernels: Path, compilations: list[Path],
                    capfd: pytest.CaptureFixture[str]) -> None:
    """Neither in this process nor in the next is it built again; the notice comes once."""
    assert "(not built yet, several threads)" in describe()
    assert library().answer() == 42
    forget()
    assert library().answer() == 42
    assert library() is library()
    assert len(compilations) == 1
    assert list(kernels.iterdir()) == compilations
    assert capfd.readouterr().err.count("building the CPU kernels") == 1
    assert str(compilations[0]) in describe()
    assert "(built, several threads)" in describe()


def test_another_source_or_flag_is_another_file(source: Path, kernels: Path, compilations: list[Path]) -> None:
    library()
    source.write_text('extern "C" int answer() { return 43; }\n')
    forget()
    assert library().answer() == 43
    (source.parent / "some.hpp").write_text("// headers count too\n")
    forget()
    library()
    assert library(("-O1",)).answer() == 43
    assert len(set(compilations)) == len(compilations) == len(list(kernels.iterdir())) == 4


def test_what_does_not_compile_is_said_and_not_tried_again(source: Path, kernels: Path,
                                                           compilations: list[Path]) -> None:
    """With the compiler's words; a part that asks later is not kept waiting."""
    source.write_text("this is no C++\n")
    for _ in range(3):
        with pytest.raises(BuildError, match=r"failed:\n.*answer\.cpp:1"):
            library()
    assert len(compilations) == 1
    assert list(kernels.iterdir()) == []


def test_interrupted(source: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file is not taken for a library, and does not stay."""
    original = subprocess.run

    def interrupted(command: list[str], *arguments: Any, **settings: Any) -> Any:
        if str(source) in command:
            Path(command[-1]).write_text("half")
            raise KeyboardInterrupt
        return original(command, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(build.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            library()
    assert list(kernels.iterdir()) == []
    assert library().answer() == 42


def test_two_at_once(source: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compile, neither sees the other's half, one file remains."""
    both = Barrier(2, timeout=60)
    original = build._compile

    def together(*arguments: Any) -> Path:
        both.wait()
        return original(*arguments)

    monkeypatch.setattr(build, "_compile", together)
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(lambda _: build._load.__wrapped__(None, build.Target(build.SOURCES)), range(2)))
    assert all(isinstance(kernel, ctypes.CDLL) and kernel.answer() == 42 for kernel in loaded)
    assert len(list(kernels.iterdir())) == 1


def test_a_compiler_that_never_ends(source: Path, kernels: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler_script(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(build, "_TIMEOUT_S", 0.5)
    with pytest.raises(BuildError, match=r"compiler did not finish within 0\.5 s"):
        library()
    assert list(kernels.iterdir()) == []


def test_a_compiler_that_fails(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler_script(tmp_path, "echo out of memory >&2; exit 1"))
    with pytest.raises(BuildError, match=r"compiler failed:\nout of memory"):
        library()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="false failed"):
        library()


def test_no_compiler(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX=no-such-compiler does not exist; name a C"):
        library()
    monkeypatch.setenv("CXX", "g++ 'unfinished")
    with pytest.raises(BuildError, match="'unfinished is not a command: No closing quotation"):
        library()
    without_compiler(monkeypatch, tmp_path)
    with pytest.raises(BuildError) as error:
        library()
    assert str(error.value) == NO_COMPILER


def test_what_is_built_needs_no_compiler(source: Path, kernels: Path, tmp_path: Path, compilations: list[Path],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Any compiler's library of these sources for this processor; another source's is no help."""
    library()
    without_compiler(monkeypatch, tmp_path)
    forget()
    assert library().answer() == 42
    assert describe() == f"{compilations[0]} (built, several threads)"
    forget()
    with pytest.raises(BuildError, match="compiler was found"):
        library(("-O1",))
    source.write_text('extern "C" int answer() { return 43; }\n')
    forget()
    with pytest.raises(BuildError, match="compiler was found"):
        library()
    assert len(compilations) == 1


def test_a_wrong_cxx_is_a_mistake_even_so(source: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="CXX=no-such-compiler does not exist"):
        library()


def test_nothing_runs_where_it_is_built(source: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask a compiler for its version takes longer than to load the library."""
    library()
    forget()
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert library().answer() == 42


def test_another_compiler_builds_again(source: Path, kernels: Path, tmp_path: Path, compilations: list[Path],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The same name, another file: what an upgrade looks like."""
    real, wrapper = find_compiler()[0], tmp_path / "compiler"
    for text in (f'exec {real} "$@"\n', f'# newer\nexec {real} "$@"\n'):
        wrapper.write_text(f"#!/bin/sh\n{text}")
        wrapper.chmod(0o755)
        for _ in range(2):
            monkeypatch.setenv("CXX", str(wrapper))
            forget()
            assert library().answer() == 42
    assert len(set(compilations)) == len(compilations) == 2


def test_a_compiler_with_arguments(source: Path, kernels: Path, compilations: list[Path],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CXX="ccache g++": they come before ours, and count."""
    real = find_compiler()[0]
    source.write_text('extern "C" int answer() { return ANSWER; }\n')
    for answer in (7, 8):
        monkeypatch.setenv("CXX", f"/usr/bin/env '{real}' -DANSWER={answer}")
        assert find_compiler() == ("/usr/bin/env", real, f"-DANSWER={answer}")
        assert library().answer() == answer
    assert len(set(compilations)) == 2


def test_a_compiler_without_openmp(source: Path, kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capfd: pytest.CaptureFixture[str]) -> None:
    """One thread, and it is said: when it is built, and by `env`."""
    real, wrapper = find_compiler()[0], tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    assert describe().endswith("(not built yet, one thread: the compiler has no OpenMP)")
    assert library().answer() == 42
    notice = capfd.readouterr().err
    assert notice.count("has no OpenMP: the kernels will use one thread.") == 1
    [file] = kernels.iterdir()
    assert f"delete {file}" in notice
    assert describe() == f"{file} (built, one thread: the compiler has no OpenMP)"


def test_the_real_kernels_say_whether_they_have_threads() -> None:
    """OpenMP's functions are declared, not included: what loads has found them."""
    assert "several threads" in describe()
    threads = (build.SOURCES / "threads.hpp").read_text()
    assert "#include" not in threads
    assert library().kernels_have_threads() == 1


def test_a_file_that_cannot_run_as_a_compiler(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "compiler"
    file.write_bytes(b"\x00\x01")
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))
    with pytest.raises(BuildError, match="the kernels cannot be built: "):
        library()


def test_no_place_for_the_kernels(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(BuildError, match="the kernels cannot be built: "):
        library()


def test_half_a_library_is_built_again(source: Path, kernels: Path, compilations: list[Path]) -> None:
    """To load it would be a bus error, not an exception: the process would be gone. A changed one is no better."""
    library()
    whole = compilations[0].read_bytes()
    for damage in (whole[:len(whole) // 2], b"", whole[:-1] + b"x"):
        compilations[0].unlink()                # what is loaded keeps its own
        compilations[0].write_bytes(damage)
        forget()
        assert library().answer() == 42
    assert len(compilations) == 4
    assert [path.read_bytes() for path in kernels.iterdir()] == [whole]


def test_a_library_that_another_user_has_put_there(source: Path, kernels: Path, compilations: list[Path],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may lie where others can write. Root's is fine: it may do all else, too."""
    library()
    target, stat = build.Target(build.SOURCES), Path.stat
    for uid, expected in ((0, compilations[0]), (os.getuid(), compilations[0]), (os.getuid() + 1, None)):
        monkeypatch.setattr(Path, "stat", lambda self, uid=uid, **kind: _owned(stat(self, **kind), uid))
        assert build._locate(target)[0] == expected


def test_what_is_no_library_says_so(source: Path, kernels: Path) -> None:
    """Made by a compiler that is none, and whole."""
    library()
    [file] = kernels.iterdir()
    text = b"not a library"
    stem = file.name.rsplit("-", 1)[0]
    file.unlink()
    wrong = file.with_name(f"{stem}-{hashlib.sha256(text).hexdigest()[:32]}.so")
    wrong.write_bytes(text)
    forget()
    with pytest.raises(BuildError, match=f"cannot be loaded .*delete {wrong} to build them again"):
        library()


def test_another_packages_sources_are_built_against_these_headers(source: Path, kernels: Path, tmp_path: Path,
                                                                  compilations: list[Path]) -> None:
    """A library of its own, which a change of either package builds again."""
    folder, header = tmp_path / "other", source.parent / "shared.hpp"
    folder.mkdir()
    (folder / "answer.cpp").write_text('#include "shared.hpp"\nextern "C" int answer() { return ANSWER + OWN; }\n')
    header.write_text("#define ANSWER 40\n#include <own.hpp>\n")
    (folder / "own.hpp").write_text("#define OWN 3\n")
    include = (source.parent, folder)
    assert library(sources=folder, include=include).answer() == 43
    assert library().answer() == 42
    forget()
    header.write_text("#define ANSWER 50\n#include <own.hpp>\n")
    assert library(sources=folder, include=include).answer() == 53
    assert len(set(compilations)) == len(compilations) == 3


def test_the_real_headers_serve_other_sources(tmp_path: Path) -> None:
    """A format of another package: few rows read it directly, many have it unpacked first; the same sums."""
    (tmp_path / "int8.cpp").write_text(OTHER_FORMAT)
    kernels = library(sources=tmp_path, include=(build.SOURCES,))
    assert kernels.layers_compile() == 1
    columns, depth, scale, panel = 70, 333, 0.25, kernels.panel()
    weight = torch.randint(-100, 100, (columns, depth), dtype=torch.int8)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -columns % panel))
    packed = padded.view(-1, panel, depth).transpose(1, 2).contiguous()
    x = torch.randint(-8, 8, (300, depth)).float()              # whole numbers: every sum is exact
    for rows in (1, 2, 3, 4, 7, 300):
        y = torch.empty(rows, columns)
        kernels.int8_linear(ctypes.c_void_p(packed.data_ptr()), ctypes.c_float(scale), columns, depth,
                            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), rows)
        assert torch.equal(y, x[:rows] @ weight.float().T * scale), rows


def test_without_a_compiler_the_engine_runs_on_sdpa(tiny_model: TinyModels, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    """F4.1: one warning that says what is missing; the same tokens."""
    folder = tiny_model("qwen3")
    expected = reference_greedy(folder, PROMPTS, 16)
    without_compiler(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        llm = LLM(str(folder), dtype="float32", max_model_len=96)
    assert llm.attention_backend == "sdpa"
    assert [r.getMessage() for r in caplog.records] == [
        f"attention backend sdpa is used, which is slower; cpu: {NO_COMPILER}"]
    assert_same_tokens(ids_of(llm.generate(PROMPTS, greedy(16), use_tqdm=False)), expected)


def test_a_broken_compiler_is_named_in_the_warning(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture, compilations: list[Path]) -> None:
    monkeypatch.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING):
        llm = LLM(str(tiny_model("llama")), dtype="float32", max_model_len=96)
    assert llm.attention_backend == "sdpa"
    assert len(caplog.records) == 1
    assert "false failed" in caplog.text
    assert len(compilations) == 1, "tried once, by the first of three parts that asked"


def test_the_env_command_says_that_there_is_no_compiler(tiny_model: TinyModels, tmp_path: Path, command: Command,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch, tmp_path)
    result = command("env", *options(tiny_model("qwen3")), package="m4_flash_attn")
    assert result.status == 0
    assert f"C++ kernels: {NO_COMPILER}" in result.out
    assert result.out.count("chosen") == 1
