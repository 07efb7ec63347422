"""Time to the first token by the share of a prompt that is known, and on the three traces.

Every prompt of a share is new but for its beginning, which one request has brought into the cache before.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from m0_basics.tools.bench import BenchRequest, EngineContender, Series, Workload, line_plot

from .traces import TRACES, make_trace

SHARES = (0.0, 0.5, 0.8, 0.95)


def by_share(contenders: Sequence[EngineContender], length: int, rounds: int, vocab_size: int,
             shares: Sequence[float] = SHARES) -> list[dict[str, Any]]:
    """For each share: by contender the median TTFT in ms, and the first contender's over each one's, round by round."""
    rng, entries = random.Random("ttft"), []

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(min(100, vocab_size - 1), vocab_size) for _ in range(number))

    for share in shares:
        known = tokens(int(length * share))
        times: dict[str, list[float]] = {c.name: [] for c in contenders}
        for number in range(-1, rounds):                    # round -1 brings the beginning into the cache
            prompt = BenchRequest(known + tokens(length - len(known)), 1)
            for contender in contenders:
                run = contender.run(Workload("one prompt", (prompt,)))
                if number >= 0:
                    times[contender.name].append(1e3 * (run.records[0].ttft or 0.0))
        base = times[contenders[0].name]
        entries.append({"share": share, "length": length, "contenders": {
            name: {"ttft_ms": median(own), "gain": median(b / o for b, o in zip(base, own, strict=True))}
            for name, own in times.items()}})
    return entries


def on_traces(contenders: Sequence[EngineContender], num_visits: int, rounds: int, vocab_size: int,
              longest: int) -> list[dict[str, Any]]:
    """For each trace, its visits one after the other: median TTFT in ms, the share of prompt tokens found."""
    entries = []
    for name in TRACES:
        ttfts: dict[str, list[float]] = {c.name: [] for c in contenders}    # the median of each round's visits
        shares: dict[str, list[float]] = {c.name: [] for c in contenders}
        for number in range(rounds):
            visits = make_trace(name, num_visits, seed=number)
            prompts = [[t % vocab_size for t in visit.prompt[:longest - 1]] for visit in visits]
            for contender in contenders:
                own, found = list[float](), 0
                for prompt in prompts:
                    [output] = contender.llm.generate([{"prompt_token_ids": prompt}], _params(), use_tqdm=False)
                    metrics = output.metrics
                    assert metrics is not None
                    assert metrics.first_token_time is not None
                    own.append(1e3 * (metrics.first_token_time - metrics.arrival_time))
                    found += output.num_cached_tokens
                ttfts[contender.name].append(median(own))
                shares[contender.name].append(found / sum(map(len, prompts)))
        base = ttfts[contenders[0].name]
        entries.append({"trace": name, "num_visits": num_visits, "contenders": {
            c.name: {"ttft_ms": median(ttfts[c.name]),
                     "gain": median(b / o for b, o in zip(base, ttfts[c.name], strict=True)),
                     "hit_share": median(shares[c.name])} for c in contenders}})
    return entries


def _params() -> Any:
    from m0_basics.sampling_params import SamplingParams
    return SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def draw(entries: Sequence[dict[str, Any]], path: Path) -> Path:
    """TTFT over the share that is known."""
    names = list(entries[0]["contenders"])
    lines = {name: Series([100 * e["share"] for e in entries], [e["contenders"][name]["ttft_ms"] for e in entries])
             for name in names}
    return line_plot(lines, path, title=f"A prompt of {entries[0]['length']:,} tokens, more and more of it known",
                     log_y=True, xlabel="% of the prompt known", ylabel="time to the first token, ms", unit=" ms")
