"""The machine that a number was measured on, in words that mean something elsewhere.

No host name, user or path: results are published.
"""
from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import psutil
import torch


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory in GiB, accelerator, and the versions that decide speed. JSON can hold it."""
    machine: dict[str, str | int | float] = {
        "cpu": cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "os": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": "none",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
                    "gpus": torch.cuda.device_count(), "cuda": str(torch.version.cuda)}
    return machine


def cpu_name() -> str:
    """The processor as it names itself; its architecture where it does not."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()
