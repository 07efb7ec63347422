"""F4.4, F4.7: the Triton kernels without a GPU: their values in the interpreter, their machine code by the compiler.

Whether a kernel is interpreted is decided when its module is imported, so each half runs in a process of its own.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
# Triton is made for Linux; where it exists, `make setup` installs it.
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None and sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.slow,
]


def run(file: str, interpret: bool, cache: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(TESTS / file)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("file", "interpret"), [("interpreted_kernels.py", True), ("compiled_kernels.py", False)])
def test_in_a_process_of_its_own(file: str, interpret: bool, pytestconfig: pytest.Config) -> None:
    """What was compiled is kept: Triton's cache goes by the sources, and compiling takes minutes."""
    output = run(file, interpret, pytestconfig.rootpath / ".cache" / "triton")
    assert re.search(r"\b\d+ passed", output)
    assert "skipped" not in output
