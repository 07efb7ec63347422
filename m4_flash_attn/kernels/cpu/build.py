"""Compile the C++ kernels once, keep the library, load it.

    source + flags + compiler + machine  --sha256-->  ~/.cache/llm-inference-lab/kernels/<hash>.so

The functions stand behind `extern "C"` and take pointers: no torch headers, so the build takes seconds, not minutes.
A changed source or flag has another hash, so nothing stale is ever loaded.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from m0_basics.gguf import cache_dir

SOURCES = Path(__file__).parent
# Reordering sums lets loops run in vector registers. Not -ffast-math as a whole: it assumes that there are no
# infinities, and linking with it makes denormals zero for the whole process.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fassociative-math",
          "-fno-signed-zeros", "-ffp-contract=fast")
_TIMEOUT_S = 120


class BuildError(RuntimeError):
    """The kernels are not available; the message says why and what to do."""


def find_compiler() -> str:
    """The C++ compiler: what CXX names, or the first of g++, clang++, c++. Raises BuildError where there is none."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    raise BuildError(f"CXX={wanted} does not exist; name a C++ compiler, or unset CXX" if wanted else
                     "no C++ compiler was found; install one (g++ or clang++), or set CXX")


def describe() -> str:
    """Compiler, flags and file of the kernels, in one line. Raises BuildError where there is no compiler."""
    compiler = find_compiler()
    flags = _all_flags(compiler, None)
    path = _path(compiler, flags)
    return f"{compiler} {' '.join(flags)} -> {path} ({'built' if path.exists() else 'not built yet'})"


def library(processor: tuple[str, ...] | None = None) -> ctypes.CDLL:
    """The compiled kernels, built where this was not done before. Raises BuildError.

    `processor`: the compiler's flags for the processor to build for, as ("-march=x86-64-v3",); this machine's if None.
    """
    loaded = _load(find_compiler(), processor)
    if isinstance(loaded, str):
        raise BuildError(loaded)
    return loaded


@cache
def _load(compiler: str, processor: tuple[str, ...] | None) -> ctypes.CDLL | str:
    """The library, or why there is none: what failed once is not tried again for the next part that asks."""
    try:
        flags = _all_flags(compiler, processor)
        path = _path(compiler, flags)
        if not path.exists():
            print("building the CPU kernels (once, some seconds) ...", file=sys.stderr, flush=True)
            _compile(compiler, flags, path)
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the kernels cannot be built: {error}"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return f"the kernels cannot be loaded ({error}); delete {path} to build them again"


def _path(compiler: str, flags: tuple[str, ...]) -> Path:
    return cache_dir() / "kernels" / f"{_fingerprint(compiler, flags)}.so"


@cache
def _all_flags(compiler: str, processor: tuple[str, ...] | None) -> tuple[str, ...]:
    """With everything that the processor can do, and threads where the compiler has OpenMP."""
    if processor is None:
        native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        processor = (native,) if _accepts(compiler, (native,)) else ()
    # torch brings OpenMP's library and has loaded it: the kernels run on the same threads.
    openmp = ("-Xpreprocessor", "-fopenmp", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else (
        "-fopenmp",)
    return (*_FLAGS, *processor, *(openmp if _accepts(compiler, openmp) else ()))


def _accepts(compiler: str, flags: tuple[str, ...]) -> bool:
    """Whether a small program compiles with the flags."""
    source = "#ifdef _OPENMP\n#include <omp.h>\n#endif\nextern \"C\" int f() { return 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *flags, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(Path(folder) / "probe.so")]
        return _run(command, source.encode()).returncode == 0


def _run(command: list[str], text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """A command of the compiler's. Raises BuildError where it cannot run, or does not end."""
    try:
        return subprocess.run(command, input=text, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish within {_TIMEOUT_S} s") from error
    except OSError as error:
        raise BuildError(f"the kernels cannot be built: {error}") from error


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    """What decides over the machine code: sources, flags, compiler, processor."""
    version = _run([compiler, "--version"]).stdout
    digest = hashlib.sha256(repr((flags, version, platform.machine(), _processor())).encode())
    for source in sorted(SOURCES.glob("*.[ch]pp")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """What `native` stands for: a cache folder may be shared by machines with other processors."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """In a folder of its own first: somebody else may be building, or be stopped half-way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
        partial = Path(folder) / path.name
        done = _run([compiler, *flags, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(partial)])
        if done.returncode != 0:
            raise BuildError(f"{compiler} failed:\n{done.stderr.decode(errors='replace').strip()[-2000:]}")
        partial.replace(path)
