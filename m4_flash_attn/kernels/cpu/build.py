"""Compile the C++ kernels once, keep the library, load it.

    sources + flags + processor  --sha256-->  ~/.cache/llm-inference-lab/kernels/<hash>-<compiler>-<content>.so

The functions stand behind `extern "C"` and take pointers: no torch headers, so the build takes seconds, not minutes.
A changed source or flag has another hash, so nothing stale is ever loaded. Nothing runs to find the file: the compiler
is known by its file. Where there is none, what any compiler made of these sources for this processor is right.

The file's name ends with the hash of its content: half a file, which would crash the process that uses it, or one that
was tampered with is not loaded but built again. Nor is one that another user could have put there.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from m0_basics.loading.model_cache import cache_dir

Command = tuple[str, ...]

SOURCES = Path(__file__).parent     # of m4's own kernels; another package's are built against the headers here
# Not -ffast-math: it assumes that there are no infinities, makes denormals zero for the whole process, reorders sums.
# What is computed is what is written, also where the compiler has several versions of a loop: it contracts nothing.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
          "-ffp-contract=off")
_NATIVE = ("-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native",)
# torch brings OpenMP's library and has loaded it: the kernels run on the same threads.
_OPENMP = ("-Xpreprocessor", "-fopenmp", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-fopenmp",)
_TIMEOUT_S = 300


class BuildError(RuntimeError):
    """The kernels are not available; the message says why and what to do."""


def find_compiler() -> Command:
    """The C++ compiler: what CXX says, with its arguments, or the first of g++, clang++, c++.

    Raises BuildError where there is none.
    """
    wanted = os.environ.get("CXX", "")
    try:
        commands = [shlex.split(wanted)] if wanted.strip() else [["g++"], ["clang++"], ["c++"]]
    except ValueError as error:
        raise BuildError(f"CXX={wanted} is not a command: {error}") from error
    for name, *arguments in commands:
        if path := shutil.which(name):
            return (path, *arguments)
    raise BuildError(f"CXX={wanted} does not exist; name a C++ compiler, or unset CXX" if wanted.strip() else
                     "no C++ compiler was found; install one (g++ or clang++), or set CXX")


def describe() -> str:
    """The kernels' file, and on how many threads they run, in one line. Raises BuildError where there can be none."""
    path, stem, compiler = _locate(Target(SOURCES))
    if path is not None:
        return f"{path} (built, {_threads(bool(library().kernels_have_threads()))})"
    flags = _all_flags(compiler, None)
    return f"{shlex.join((*compiler, *flags))} -> {stem}-*.so (not built yet, {_threads(_has_threads(flags))})"


@dataclass(frozen=True)
class Target:
    """What is built: all .cpp files of a folder, and for which processor."""

    sources: Path
    include: tuple[Path, ...] = ()              # folders of headers from elsewhere
    processor: tuple[str, ...] | None = None    # the compiler's flags for it; None: this machine's


def library(processor: tuple[str, ...] | None = None, sources: Path | None = None,
            include: tuple[Path, ...] = ()) -> ctypes.CDLL:
    """The compiled kernels, built where this was not done before. Raises BuildError.

    `processor`: the compiler's flags for the processor to build for, as ("-march=x86-64-v3",); this machine's if None.
    `sources`: the folder whose .cpp files become the library, m4's if None; they find headers there and in `include`.
    """
    loaded = _load(os.environ.get("CXX"), Target(sources or SOURCES, include, processor))
    if isinstance(loaded, str):
        raise BuildError(loaded)
    return loaded


@cache
def _load(cxx: str | None, target: Target) -> ctypes.CDLL | str:
    """The library, or why there is none: what failed once is not tried again for the next part that asks.

    `cxx`, the variable, is there for the cache alone.
    """
    try:
        path, stem, compiler = _locate(target)
        path = path or _build(compiler, target, stem)
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"the kernels cannot be built: {error}"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return f"the kernels cannot be loaded ({error}); delete {path} to build them again"


def _locate(target: Target) -> tuple[Path | None, Path, Command]:
    """The library's file if it is built, what its name begins with, and the compiler.

    Without a compiler: the newest file that loads, and no command. Raises BuildError where there is neither; and where
    CXX names a compiler that does not exist: that is a mistake.
    """
    stem = cache_dir() / "kernels" / _fingerprint(target)
    try:
        compiler = find_compiler()
    except BuildError:
        usable = next(filter(_loads, _built(stem)), None)
        if usable is None or os.environ.get("CXX", "").strip():
            raise
        return usable, stem, ()
    stem = stem.with_name(f"{stem.name}-{_identity(compiler)}")
    return next(_built(stem), None), stem, compiler


def _built(stem: Path) -> Iterator[Path]:
    """The files that begin with `stem`, are whole and belong to whom code may be run for; the newest first."""
    found = sorted(stem.parent.glob(f"{stem.name}-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    ours = (os.getuid(), 0)
    return (path for path in found if path.stat().st_uid in ours and path.stem.endswith(_content_hash(path)))


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _loads(path: Path) -> bool:
    """A compiler of another system, or with other libraries, may have made it."""
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True


def _fingerprint(target: Target) -> str:
    """What decides over the machine code's meaning: sources, flags, processor."""
    processor = _NATIVE if target.processor is None else target.processor
    digest = hashlib.sha256(repr((_FLAGS, processor, _OPENMP, platform.machine(), _processor())).encode())
    headers = [header for folder in target.include for header in sorted(folder.glob("*.hpp"))]
    for source in [*sorted(target.sources.glob("*.[ch]pp")), *headers]:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _identity(compiler: Command) -> str:
    """A new version is a new file. Behind a wrapper it goes unnoticed; the old library is right, if not as fast."""
    file = Path(compiler[0]).resolve()
    status = file.stat()
    words = str(file), status.st_size, status.st_mtime_ns, compiler[1:]
    return hashlib.sha256(repr(words).encode()).hexdigest()[:8]


def _processor() -> str:
    """What `native` stands for: a cache folder may be shared by machines with other processors."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build(compiler: Command, target: Target, stem: Path) -> Path:
    """With a notice, and another one where there will be no threads. Returns the file."""
    print("building the CPU kernels (once, some seconds) ...", file=sys.stderr, flush=True)
    flags = _all_flags(compiler, target.processor)
    path = _compile(compiler, (*flags, *(f"-I{folder}" for folder in target.include)), target.sources, stem)
    if not _has_threads(flags):
        print(f"{shlex.join(compiler)} has no OpenMP: the kernels will use one thread. To change that, install OpenMP "
              f"(libomp) or set CXX, and delete {path}", file=sys.stderr, flush=True)
    return path


@cache
def _all_flags(compiler: Command, processor: tuple[str, ...] | None) -> tuple[str, ...]:
    """With everything that the processor can do, and threads where the compiler has OpenMP."""
    if processor is None:
        processor = _NATIVE if _accepts(compiler, _NATIVE) else ()
    return (*_FLAGS, *processor, *(_OPENMP if _accepts(compiler, _OPENMP) else ()))


def _has_threads(flags: tuple[str, ...]) -> bool:
    return "-fopenmp" in flags


def _threads(has_threads: bool) -> str:
    return "several threads" if has_threads else "one thread: the compiler has no OpenMP"


def _accepts(compiler: Command, flags: tuple[str, ...]) -> bool:
    """Whether a small program compiles with the flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *flags, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(Path(folder) / "probe.so")]
        return _run(command, b'extern "C" int f() { return 1; }\n').returncode == 0


def _run(command: list[str], text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """A command of the compiler's. Raises BuildError where it cannot run, or does not end."""
    try:
        return subprocess.run(command, input=text, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not finish within {_TIMEOUT_S} s") from error
    except OSError as error:
        raise BuildError(f"the kernels cannot be built: {error}") from error


def _check(compiler: Command, arguments: list[str]) -> None:
    done = _run([*compiler, *arguments])
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(compiler)} failed:\n{done.stderr.decode(errors='replace').strip()[-2000:]}")


def _compile(compiler: Command, flags: tuple[str, ...], sources: Path, stem: Path) -> Path:
    """In a folder of its own first: somebody else may be building, or be stopped half-way. Returns the file."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stem.parent, prefix="building-") as folder:
        partial, files = Path(folder) / "kernels.so", sorted(sources.glob("*.cpp"))
        objects = [str(Path(folder) / f"{file.stem}.o") for file in files]

        def compile_one(file: Path, to: str) -> None:
            _check(compiler, [*flags, "-c", str(file), "-o", to])

        with ThreadPoolExecutor(os.cpu_count()) as pool:        # the compiler itself uses one core
            list(pool.map(compile_one, files, objects))
        _check(compiler, [*flags, "-shared", *objects, "-o", str(partial)])
        with partial.open("rb") as file:
            os.fsync(file.fileno())         # the name must not reach the disk before the content does
        return partial.replace(stem.with_name(f"{stem.name}-{_content_hash(partial)}.so"))
