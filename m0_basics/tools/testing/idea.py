"""Running a milestone's `idea.py` as a learner does: as a file, alone."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run_idea(package: str) -> str:
    """What `python PACKAGE/idea.py` prints. Fails if an assertion of the file does; the lab cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, ROOT / package / "idea.py"], capture_output=True, text=True,
                          env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
