"""Runs inside a peer's own interpreter: serves workloads with vLLM or llama.cpp, one JSON line per order.

    python peer_worker.py '{"engine": "vllm", "model": "...", ...}'
    -> {"ready": {"version": ..., "startup_s": ...}}
    <- {"requests": [{"prompt_token_ids": [...], "output_len": 8, "arrival_time": 0.0}, ...]}
    -> {"duration_s": ..., "requests": [{"token_ids": [...], "token_times": [...]}, ...]}

Nothing of the lab is imported: the interpreter may be another Python, with other libraries. An engine that prints
does not disturb the lines, because standard output is turned into standard error for all but this protocol.
"""
from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class VLLM:
    """vLLM's offline engine, driven step by step as its `LLM.generate` does, so that tokens can be timed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import vllm
        from vllm.sampling_params import RequestOutputKind
        self.version = f"vllm {vllm.__version__}"
        self._params, self._kind = vllm.SamplingParams, RequestOutputKind.DELTA
        # The prefix cache is off: rounds repeat the same prompts, and would be served from it.
        llm = vllm.LLM(settings["model"], dtype=settings["dtype"], max_model_len=settings["max_model_len"],
                       max_num_seqs=settings["max_num_seqs"],
                       max_num_batched_tokens=settings.get("max_num_batched_tokens", 2048),
                       enable_prefix_caching=False, skip_tokenizer_init=settings["skip_tokenizer_init"])
        self._engine = llm.llm_engine
        self._runs = 0

    def serve(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Times are seconds since the start of this call."""
        self._runs += 1
        answers: list[dict[str, Any]] = [{"token_ids": [], "token_times": []} for _ in requests]
        added, start = 0, time.perf_counter()
        while added < len(requests) or self._engine.has_unfinished_requests():
            while added < len(requests) and requests[added]["arrival_time"] <= time.perf_counter() - start:
                self._add(added, requests[added])
                added += 1
            if not self._engine.has_unfinished_requests():
                time.sleep(max(0.0, requests[added]["arrival_time"] - (time.perf_counter() - start)))
                continue
            outputs = self._engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                answer = answers[int(output.request_id.split("-")[1])]
                if output.outputs[0].token_ids:
                    answer["token_ids"] += output.outputs[0].token_ids
                    answer["token_times"].append(now)
        return {"duration_s": time.perf_counter() - start, "requests": answers}

    def _add(self, index: int, request: dict[str, Any]) -> None:
        params = self._params(temperature=0, max_tokens=request["output_len"], ignore_eos=True, output_kind=self._kind)
        self._engine.add_request(f"{self._runs}-{index}", {"prompt_token_ids": request["prompt_token_ids"]}, params)


class LlamaCpp:
    """llama.cpp through llama-cpp-python: one request after the other."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._llm = llama_cpp.Llama(settings["gguf"], n_ctx=settings["max_model_len"], n_threads=settings["threads"],
                                    n_threads_batch=settings["threads"], verbose=False)

    def serve(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Times are seconds since the start of this call."""
        start, answers = time.perf_counter(), []
        for request in requests:
            time.sleep(max(0.0, request["arrival_time"] - (time.perf_counter() - start)))
            token_ids: list[int] = []
            token_times = []
            pending = request["prompt_token_ids"]
            self._llm.reset()
            for _ in range(request["output_len"]):
                self._llm.eval(pending)
                pending = [int(self._llm.sample(temp=0.0))]
                token_ids += pending
                token_times.append(time.perf_counter() - start)
            answers.append({"token_ids": token_ids, "token_times": token_times})
        return {"duration_s": time.perf_counter() - start, "requests": answers}


def main() -> None:
    """Answer orders until standard input ends."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")
        lines.flush()

    settings = json.loads(sys.argv[1])
    start = time.perf_counter()
    engine = VLLM(settings) if settings["engine"] == "vllm" else LlamaCpp(settings)
    answer({"ready": {"version": engine.version, "startup_s": time.perf_counter() - start}})
    for line in sys.stdin:
        answer(engine.serve(json.loads(line)["requests"]))


if __name__ == "__main__":
    # This file's folder comes first on the path, and its modules would hide others of the same name.
    sys.path.pop(0)
    main()
