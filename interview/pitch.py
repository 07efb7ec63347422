"""Project pitches of 30 seconds, one and three minutes, filled from benchmark results: yours, or marked as not yours.

    python -m m4_flash_attn bench --output-dir my-results/m4_flash_attn
    python -m interview pitch --results my-results

Every figure carries its workload, its baseline and its machine. Where the idea did not help, the pitch says so: an
interviewer asks for it next.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m0_basics.config import ConfigError
from m0_basics.tools.documents.factbook import read_json_file

from .library import ROOT

LENGTHS = ("30s", "1min", "3min")
IDEAS = {
    "m0": ("recomputes everything", "每步全部重算"), "m1": ("a contiguous KV cache", "连续的 KV cache"),
    "m2": ("continuous batching", "continuous batching"), "m3": ("a paged KV cache", "分页 KV cache"),
    "m4": ("flash attention and fused layers", "flash attention 与层融合"),
    "m5": ("chunked prefill and speculation", "chunked prefill 与投机解码"),
    "m6": ("a prefix cache", "prefix cache"), "m7": ("4-bit weights and 8-bit activations", "4 bit 权重加 8 bit 激活"),
}
_PEERS = ("vllm", "llama.cpp", "transformers-static", "transformers")


@dataclass(frozen=True)
class Gain:
    """What a milestone did over another contender, in one run, on one workload."""

    milestone: str              # "m3"
    over: str                   # "m2", or a peer's name
    workload: str
    ratio: float                # of output tokens per second, or of its median over rounds where that is stored
    tokens_per_s: float


@dataclass(frozen=True)
class Results:
    """All benchmark results that were found."""

    gains: tuple[Gain, ...]
    machines: tuple[str, ...]
    commands: tuple[str, ...]
    own: bool                   # read from the learner's folder, and not from the repository's


def load_results(folder: Path | None = None, root: Path = ROOT) -> Results:
    """The results of every milestone: from `folder/<package>/bench.json`, or, without one, those of the repository.

    Raises ConfigError where there is none, or a file is damaged.
    """
    packages = sorted(p.name for p in root.glob("m[0-7]_*") if p.is_dir())
    files = {p: (folder / p / "bench.json" if folder else root / p / "results" / "bench.json") for p in packages}
    found = {package: read_json_file(file) for package, file in files.items() if file.is_file()}
    if not found:
        raise ConfigError(f"results={str(folder or root)!r} has no benchmark results; allowed: a folder with "
                          "<package>/bench.json, made by: python -m m4_flash_attn bench --output-dir "
                          "my-results/m4_flash_attn")
    gains, machines, commands = [], [], []
    for package, data in found.items():
        try:
            gains += _gains(package.partition("_")[0], data["comparisons"])
            machines.append(_machine(data["machine"]))
            commands.append(" ".join(str(data["command"]).split()[:4]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{files[package]} is not a benchmark's result: {error!r} is missing") from error
    return Results(tuple(gains), tuple(dict.fromkeys(machines)), tuple(commands), folder is not None)


def _gains(name: str, comparisons: Sequence[Mapping[str, Any]]) -> list[Gain]:
    """Of each workload: the milestone over the one before, and over the first peer that took part."""
    before, gains = f"m{int(name[1:]) - 1}", []
    for comparison in comparisons:
        contenders = {c["name"]: c for c in comparison["contenders"]}
        own = contenders.get(name)
        if own is None:
            continue
        others = [n for n in (before,) if n in contenders] + [p for p in _PEERS if p in contenders][:1]
        gains += [Gain(name, other, str(comparison["workload"]["name"]),
                       own["ratio"] / contenders[other]["ratio"], float(own["output_throughput"])) for other in others]
    return gains


def _machine(machine: Mapping[str, Any]) -> str:
    gpu = machine.get("gpu", "none")
    cpu = f"{machine['cpu']} ({machine['cpu_capability']}), {machine['cpu_cores']} cores"
    return cpu if gpu == "none" else str(gpu)


def pitch(results: Results, length: str, language: str, solved: Sequence[str] = ()) -> str:
    """The text to say, as Markdown. `solved`: exercises that the learner wrote, as package/file::symbol.

    The one number is the largest gain of a milestone in which the learner solved something, if there is one.
    """
    chinese = language == "zh-CN"
    steps = [g for g in results.gains if g.over == f"m{int(g.milestone[1:]) - 1}"]
    written = {name.partition("_")[0] for name in solved}
    best = max([g for g in steps if g.milestone in written] or steps, key=lambda g: g.ratio, default=None)
    parts = [_opening(chinese)]
    if best:
        parts.append(_say(best, chinese))
    if length == "1min":
        parts.append(_road(_best_of_each(steps), chinese, best=True))
    if length == "3min":
        parts.append(_road(steps, chinese))
        parts += [_peers(results.gains, chinese), _losses(steps, chinese), _correct(chinese)]
    parts.append(_mine(solved, chinese, length))
    return "\n\n".join(part for part in [*parts, _source(results, chinese)] if part)


def _opening(chinese: bool) -> str:
    if chinese:
        return ("我做的是一个分阶段的 LLM 推理引擎：每个 milestone 都能独立跑，只比前一个多一个想法，"
                "所以每个想法值多少都能单独测。")
    return ("I worked through a staged LLM inference engine: every milestone runs by itself and adds one idea to the "
            "one before, so what each idea is worth can be measured by itself.")


def _say(gain: Gain, chinese: bool) -> str:
    idea = IDEAS[gain.milestone][chinese]
    if chinese:
        return (f"一个数字：{idea}（{gain.milestone}），负载 {gain.workload}，同一次运行里输出吞吐是 {gain.over} 的 "
                f"{gain.ratio:.2f} 倍。")
    return (f"One number: with {idea} ({gain.milestone}) the output rate on {gain.workload} is {gain.ratio:.2f} times "
            f"that of {gain.over}, in one run.")


def _best_of_each(steps: Sequence[Gain]) -> list[Gain]:
    """The largest gain of each milestone; every other workload, losses too, is in the long version."""
    best: dict[str, Gain] = {}
    for gain in steps:
        if gain.milestone not in best or gain.ratio > best[gain.milestone].ratio:
            best[gain.milestone] = gain
    return list(best.values())


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"


def _road(steps: Sequence[Gain], chinese: bool, best: bool = False) -> str:
    """One line a gain. `best`: they are each milestone's largest."""
    if chinese:
        head = f"每一步{'（取收益最大的负载）' if best else ''}，同一次运行里跟前一个比："
        lines = [f"- {g.milestone}，{IDEAS[g.milestone][1]}：{g.workload} 上 {g.ratio:.2f} 倍，"
                 f"每秒 {_rate(g.tokens_per_s)} token" for g in steps]
    else:
        where = ", on the load where it gained most" if best else ""
        head = f"Each step{where}, against the one before in the same run:"
        lines = [f"- {g.milestone}, {IDEAS[g.milestone][0]}: {g.ratio:.2f} times on {g.workload}, "
                 f"{_rate(g.tokens_per_s)} tokens/s" for g in steps]
    return "\n".join([head, "", *lines])


def _peers(gains: Sequence[Gain], chinese: bool) -> str:
    found = [g for g in gains if g.over in _PEERS]
    if not found:
        return ""
    lines = "\n".join(f"- {g.milestone} / {g.over}, {g.workload}: {g.ratio:.2f}" for g in found)
    return ("跟别的引擎比，同一次运行：\n\n" if chinese else "Against other engines, in the same run:\n\n") + lines


def _losses(steps: Sequence[Gain], chinese: bool) -> str:
    lost = [g for g in steps if g.ratio < 1]
    if not lost:
        return ""
    shown = ", ".join(f"{g.milestone} {g.workload} {g.ratio:.2f}" for g in lost)
    if chinese:
        return f"也有没用的地方，主动说：{shown}。想法对的是另一种负载，或者付了代价换别的指标，我能讲清是哪一种。"
    return (f"Where it did not help, said without being asked: {shown}. There the idea serves another load, or pays "
            "for another metric, and I can say which.")


def _correct(chinese: bool) -> str:
    if chinese:
        return ("正确性：float32 下每个引擎的 greedy token 与 transformers 一致，一套 conformance 测试跑所有 "
                "milestone；两个引擎分叉时，用 divergence 命令看差了几个 ulp。")
    return ("Correctness: in float32 every engine's greedy tokens equal transformers', one conformance suite runs over "
            "all milestones, and where two engines part, a command says by how many units in the last place.")


def _mine(solved: Sequence[str], chinese: bool, length: str) -> str:
    if not solved:
        if chinese:
            return "其中哪些是我自己写的：（先做练习，`python -m m3_paged_kv exercise list`，做完会列在这里）"
        return "What I wrote myself: (solve exercises, `python -m m3_paged_kv exercise list`; they will be named here)"
    shown = list(solved if length == "3min" else solved[:4])
    rest = len(solved) - len(shown)
    names = ", ".join(f"`{name}`" for name in shown)
    if chinese:
        return f"我自己对着测试写出来的有 {len(solved)} 处：{names}" + (f"，另有 {rest} 处。" if rest else "。")
    return f"Written by me, against the tests, {len(solved)} parts: {names}" + (f" and {rest} more." if rest else ".")


def _source(results: Results, chinese: bool) -> str:
    machines = "; ".join(results.machines)
    if chinese:
        head = "数字来自你自己的运行" if results.own else "注意：这些是仓库自带的结果，不是你测的，面试时不能说成自己的"
        return f"*{head}。机器：{machines}。命令：{'；'.join(results.commands)}。*"
    head = ("Figures of your own runs" if results.own else
            "Note: these are the repository's results and not yours; do not tell them as your own")
    return f"*{head}. Machine: {machines}. Commands: {'; '.join(results.commands)}.*"
