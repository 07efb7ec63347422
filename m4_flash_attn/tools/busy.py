"""How fast the engine is beside processes that never rest: `python -m m4_flash_attn.tools.busy`.

Laptops are busy. One row per workload: quiet, beside one busy process, and beside as many as there are cores; with all
threads, and with one, which is what the others have to be worth. Speed varies beside busy processes: medians.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench.workloads import get_workload

from ..llm import LLM

WORKLOADS = ("single-32", "ragged-16:prompt_max=64,output_max=32", "ragged-64:prompt_max=64,output_max=32")


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """That many processes beside this one, which compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def output_throughput(llm: LLM, workload: str, rounds: int) -> float:
    """Output tokens per second, the median of the rounds."""
    requests = get_workload(workload).requests
    prompts = [{"prompt_token_ids": list(r.prompt_token_ids)} for r in requests]
    params = [SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True) for r in requests]
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        rates.append(sum(len(out.outputs[0].token_ids) for out in outputs) / (time.perf_counter() - start))
    return median(rates)


def table(llm: LLM, workloads: Sequence[str] = WORKLOADS, rounds: int = 3) -> str:
    """A line per workload, columns by threads and busy processes, as markdown."""
    cores = torch.get_num_threads()
    columns = [(threads, busy) for busy in sorted({0, 1, cores}) for threads in sorted({1, cores})]
    lines = ["| workload | " + " | ".join(f"{threads} threads, {busy} busy" for threads, busy in columns) + " |",
             "|---" + "|--:" * len(columns) + "|"]
    for workload in workloads:
        cells = []
        for threads, busy in columns:
            torch.set_num_threads(threads)
            with busy_processes(busy):
                cells.append(f"{output_throughput(llm, workload, rounds):.1f}")
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    torch.set_num_threads(cores)
    return "\n".join(lines)


def main() -> None:
    """Measure the default model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    llm = LLM(dtype=options.dtype, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=64)
    print(table(llm, rounds=options.rounds))


if __name__ == "__main__":
    main()
