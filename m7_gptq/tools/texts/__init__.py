"""Public-domain prose for calibration and evaluation; PROVENANCE.md says where it is from. No two texts overlap."""
from __future__ import annotations

from pathlib import Path

from m0_basics.config import reject

# "dev" is for choices among methods and settings, "test" for reporting alone. "chinese": unlike all calibration text.
EVALUATION = {"dev": "botchan_dev", "test": "botchan_test", "chinese": "call_to_arms"}
CALIBRATION = ("alice", "botchan_calibration")


def calibration_text() -> str:
    """English prose of two books, about 280 kB."""
    return "".join(_read(name) for name in CALIBRATION)


def evaluation_text(split: str = "test") -> str:
    """Held-out prose: "dev", "test" or "chinese". Raises ConfigError for another name."""
    if split not in EVALUATION:
        raise reject("split", split, ", ".join(EVALUATION))
    return _read(EVALUATION[split])


def _read(name: str) -> str:
    return (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8")
