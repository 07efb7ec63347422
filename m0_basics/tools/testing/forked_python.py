"""A Python that has imported the slow libraries already: a process of its own for a test, in a moment.

Exercises are graded in processes in which no module of the lab has been imported. In a new process the imports of
torch, transformers and pytest take longer than the tests. Here one server process imports the libraries, and none
of the lab's modules; each command then runs in a fork of it.

This file is also the server's script, so it imports the standard library only.
"""
from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PRELOADED = ("torch", "numpy", "hypothesis.strategies", "pytest", "typer.testing", "gguf", "safetensors.torch",
             "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
             "transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3")


class ForkedPython:
    """`with ForkedPython() as python: python.run(["-m", "pytest", "tests"], folder, os.environ)`. Needs `os.fork`."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._server.communicate()              # the end of its input ends it

    def run(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str],
            ) -> subprocess.CompletedProcess[str]:
        """What `python arguments` would do in `folder`: `-m module ...` or `-c code ...`. Output and errors are one."""
        assert self._server.stdin and self._server.stdout
        with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as output:
            job = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment),
                   "output": output.name}
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(list(arguments), status, output.read())


def serve() -> None:
    """Answer each line of the input, a job, with its exit status."""
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()                                 # the children's collections leave these objects alone
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(run_job(**job))            # what Python does at its end takes a second, with so much imported
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run_job(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> int:
    """In the child: become that Python; returns its exit status."""
    target = os.open(output, os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, source in ((0, nothing), (1, target), (2, target)):
        os.dup2(source, stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, folder)
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    status: Any = 0
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()                     # temporary folders are given back
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status)


if __name__ == "__main__":
    serve()
