"""What a user could pick instead, as contenders: transformers in this process, vLLM and llama.cpp in their own."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from m0_basics.base_llm import BaseLLM
from m0_basics.config import DEFAULT_MODEL, ConfigError, reject
from m0_basics.loading.loader import default_model_file, resolve_device, resolve_dtype, resolve_model

from .contender import Contender
from .subprocess_peers import ENGINES, SubprocessPeer, engines_of
from .transformers_peers import TransformersContinuous, TransformersGenerate, TransformersModel

STATIC_BATCH_SIZE = 16
# Peer -> how it is made from the loaded weights.
TRANSFORMERS_PEERS: dict[str, Callable[[str, TransformersModel], Contender]] = {
    "transformers": lambda name, source: TransformersGenerate(name, source, note="generate, one request at a time"),
    "transformers-no-cache": lambda name, source: TransformersGenerate(
        name, source, use_cache=False, note="generate(use_cache=False), one request at a time"),
    "transformers-static": lambda name, source: TransformersGenerate(
        name, source, batch_size=STATIC_BATCH_SIZE,
        note=f"generate, left-padded batches of {STATIC_BATCH_SIZE}"),
    "transformers-continuous": lambda name, source: TransformersContinuous(
        name, source, note="continuous batching, its cache sized to the workload"),
}
PEERS = (*TRANSFORMERS_PEERS, *ENGINES)


def make_peers(names: Sequence[str], peer_python: Sequence[Path], llm: BaseLLM, max_model_len: int,
               dtype: str | None = None, settings: Mapping[str, Any] | None = None) -> list[Contender]:
    """Contenders that run `llm`'s model on its device, in `dtype` or, where that is None, in its precision.

    With "auto" they take what is fast for them, which need not be what is fast for `llm`. `settings` go to those that
    run in an interpreter of their own (see peer_worker.py).

    `names` are of PEERS; "vllm" and "llama.cpp" need an interpreter that has them among `peer_python`, and every
    peer that such an interpreter has takes part. `max_model_len` sizes the peers' caches, in tokens. Raises
    ConfigError for what cannot run here; peers that had started by then are closed.
    """
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in PEERS:
            raise reject("peer", name, ", ".join(PEERS))
    found = [(engine, python) for python in peer_python for engine in engines_of(python)]
    for name in wanted:
        if name in ENGINES and name not in [engine for engine, _ in found]:
            raise ConfigError(f"peer {name} needs --peer-python PATH, an interpreter that can import {ENGINES[name]}")
    model = llm.config.model_config.model
    device = resolve_device(llm.config.model_config.device)
    precision = resolve_dtype(dtype or str(llm.config.model_config.dtype), device)
    peers: list[Contender] = []
    try:
        if in_process := [name for name in wanted if name in TRANSFORMERS_PEERS]:
            source = TransformersModel(resolve_model(model, precision), precision, device)
            peers += [TRANSFORMERS_PEERS[name](name, source) for name in in_process]
        for number, (engine, python) in enumerate(found):
            same = [e for e, _ in found[:number]].count(engine)
            name = f"{engine}-{same + 1}" if same else engine
            peers.append(_start(name, engine, python, model, precision, max_model_len, settings or {}))
    except BaseException:
        for peer in peers:
            peer.close()
        raise
    return peers


def _start(name: str, engine: str, python: Path, model: str, dtype: torch.dtype, max_model_len: int,
           more: Mapping[str, Any]) -> Contender:
    settings: dict[str, Any] = {"engine": engine, "max_model_len": max_model_len, **more}
    if engine == "llama.cpp":
        file = default_model_file() if model.lower() == DEFAULT_MODEL else Path(model).expanduser()
        if file.suffix != ".gguf":
            raise reject("model", model, "a GGUF file or the default model, where llama.cpp is a peer")
        settings |= {"gguf": str(file), "threads": torch.get_num_threads()}
        return SubprocessPeer(name, python, settings, note=f"one request at a time, the packed weights of {file.name}")
    folder = resolve_model(model, dtype)
    settings |= {"model": str(folder), "dtype": str(dtype).removeprefix("torch."), "max_num_seqs": 64,
                 "skip_tokenizer_init": not (folder / "tokenizer.json").is_file()}
    return SubprocessPeer(name, python, settings)
