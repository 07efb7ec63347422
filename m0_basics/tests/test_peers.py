"""Peers: transformers gives m0's tokens in each of its ways, and a peer's own interpreter is spoken to (FX.2).

The interpreter is this one with stand-ins for vLLM and llama-cpp-python on its path: the real worker script runs,
on engines whose answers are known.
"""
import json
import os
import sys
import textwrap
import time
from dataclasses import replace

import psutil
import pytest

from m0_basics import LLM
from m0_basics.config import ConfigError
from m0_basics.tools.bench import PEERS, BenchError, BenchRequest, EngineContender, Workload, compare, make_peers
from m0_basics.tools.bench.subprocess_peers import SubprocessPeer, engines_of, peer_environment

pytestmark = pytest.mark.slow

WORK = Workload("mixed", tuple(BenchRequest(tuple(range(3 + i, 8 + 4 * i)), 2 + 3 * i) for i in range(4)))


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=128)


@pytest.mark.parametrize("name", ["transformers", "transformers-no-cache", "transformers-static",
                                  "transformers-continuous"])
def test_transformers_gives_the_same_tokens(llm, name):
    (peer,) = make_peers([name], [], llm, 128)
    comparison = compare([EngineContender("m0", llm), peer], WORK, rounds=2)
    assert comparison[name].identical_requests == len(WORK.requests)
    result = peer.run(WORK)
    for record, request in zip(result.records, WORK.requests, strict=True):
        times = record.token_times
        assert len(times) == request.output_len
        assert list(times) == sorted(times)
        assert times[0] > 0
        assert times[-1] == record.finish_time <= result.metrics.duration_s


@pytest.mark.parametrize("name", ["transformers", "transformers-static", "transformers-continuous"])
def test_transformers_waits_for_arrivals(llm, name):
    """The second request comes when the first should be done long since, on this machine as it is now."""
    first, second = BenchRequest((3, 4, 5), 2), BenchRequest((6, 7), 2)
    (peer,) = make_peers([name], [], llm, 128)
    peer.warm_up(Workload("warm-up", (first, second)))
    gap = 0.1 + 10 * peer.run(Workload("alone", (first,))).records[0].finish_time
    records = peer.run(Workload("late", (first, replace(second, arrival_time=gap)))).records
    assert records[0].finish_time < gap < records[1].token_times[0]


def test_end_of_sequence_is_ignored(tiny_model):
    """The parrot ends after seven characters in eleven bytes; told to ignore that, every peer goes on."""
    parrot = LLM(str(tiny_model("parrot_eos")), dtype="float32", max_model_len=128)
    start = parrot.get_tokenizer().encode("<|im_start|>")
    work = Workload("parrot", (BenchRequest(tuple(start), 20),))
    peers = make_peers(["transformers", "transformers-continuous"], [], parrot, 128)
    comparison = compare([EngineContender("m0", parrot), *peers], work, rounds=1)
    (ids,) = EngineContender("m0", parrot).run(work).token_ids
    assert parrot.spec.eos_token_ids[0] in ids[:-1]
    assert [c.identical_requests for c in comparison.contenders] == [1, 1, 1]


def test_transformers_peers_share_one_copy_of_the_weights(llm):
    first, second = make_peers(["transformers", "transformers-static"], [], llm, 128)
    assert first.source is second.source


def test_unknown_and_missing_peers(llm):
    with pytest.raises(ConfigError) as caught:
        make_peers(["tgi"], [], llm, 128)
    assert all(name in str(caught.value) for name in ("'tgi'", *PEERS))
    with pytest.raises(ConfigError, match=r"peer vllm needs --peer-python PATH.*import vllm"):
        make_peers(["vllm"], [], llm, 128)


# Stand-ins with the few names that the worker uses. The next token is the last one plus one.
VLLM = '''
    import sys
    __version__ = "0.test"
    print("noise on standard output")
    class SamplingParams:
        def __init__(self, **options):
            assert options["temperature"] == 0 and options["ignore_eos"] and options["output_kind"] == "delta"
            self.max_tokens = options["max_tokens"]
    class Output:
        def __init__(self, request_id, token_ids):
            self.request_id, self.outputs = request_id, [type("Completion", (), {"token_ids": token_ids})]
    class Engine:
        def __init__(self):
            self.running = {}
        def add_request(self, request_id, prompt, params):
            assert request_id not in self.running
            self.running[request_id] = [prompt["prompt_token_ids"][-1], params.max_tokens]
        def has_unfinished_requests(self):
            return bool(self.running)
        def step(self):
            print("more noise")
            outputs = []
            for request_id, state in list(self.running.items()):
                if state[0] == 66:
                    print("first line", "last words", sep="\\n", file=sys.stderr)
                    raise SystemExit(3)
                outputs.append(Output(request_id, [state[0] + 1]))
                state[0], state[1] = state[0] + 1, state[1] - 1
                if not state[1]:
                    del self.running[request_id]
            return outputs
    class LLM:
        def __init__(self, model, **options):
            if options["max_model_len"] > 1000:
                raise ValueError("the cache does not fit")
            assert options["dtype"] == "float32", options
            self.llm_engine, self.caches, self.resets = Engine(), options["enable_prefix_caching"], 0
        def reset_prefix_cache(self):
            assert self.caches
            self.resets += 1
            return self.resets < 3
'''
LLAMA_CPP = '''
    __version__ = "0.test"
    class Llama:
        def __init__(self, file, n_ctx, n_threads, n_threads_batch, verbose):
            assert file.endswith(".gguf") and n_threads == n_threads_batch
            self.seen = None
        def reset(self):
            self.seen = []
        def eval(self, tokens):
            self.seen += tokens
        def sample(self, temp):
            assert temp == 0
            return self.seen[-1] + len(self.seen)
'''


def interpreter(folder, **modules):
    """An executable that is this Python with stand-ins on its path, and with nothing else but the standard library."""
    for name, source in modules.items():
        package = folder / "modules" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(textwrap.dedent(source))
        (package / "sampling_params.py").write_text("class RequestOutputKind:\n    DELTA = 'delta'\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder / "modules"}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return python


def counting(request):
    """What the stand-in of vLLM answers."""
    return tuple(request.prompt_token_ids[-1] + 1 + i for i in range(request.output_len))


def wait_until_stopped(pid):
    """A signal arrives a moment after it is sent."""
    deadline = time.monotonic() + 10
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_peer_in_its_own_interpreter(llm, tmp_path):
    python = interpreter(tmp_path, vllm=VLLM)
    assert engines_of(python) == ["vllm"]
    (peer,) = make_peers([], [python], llm, 128)
    with peer:
        assert peer.name == "vllm"
        assert peer.note.startswith("vllm 0.test; start-up ")
        assert peer.pid != os.getpid()
        wait_until_stopped(peer.pid)                                            # it takes no core from the others
        seen = []
        comparison = compare([EngineContender("m0", llm), peer], WORK, rounds=2,
                             on_result=lambda number, c, result: seen.append((c.name, result)))
        assert [name for name, _ in seen] == ["m0", "vllm"] * 2
        for name, result in seen:
            if name == "vllm":
                assert result.token_ids == tuple(counting(r) for r in WORK.requests)
                assert all(len(r.token_times) == len(ids) for r, ids in zip(result.records, result.token_ids,
                                                                            strict=True))
                assert result.metrics.memory.rss_bytes > 0
        assert comparison["vllm"].identical_requests == 0       # counting is not what the model does
        late = Workload("late", (BenchRequest((3,), 2), BenchRequest((5,), 2, 0.3)))
        records = peer.run(late).records
        assert records[0].finish_time <= records[1].token_times[0]
        assert records[1].token_times[0] >= 0.3
    assert peer._process.returncode == 0


def test_an_interpreter_with_both_gives_both(llm, tiny_model, tmp_path, monkeypatch):
    python = interpreter(tmp_path, vllm=VLLM, llama_cpp=LLAMA_CPP)
    with pytest.raises(ConfigError, match="GGUF"):              # the tiny model is a folder
        make_peers([], [python], llm, 128)
    monkeypatch.setattr("m0_basics.tools.bench.peers.default_model_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr("m0_basics.tools.bench.peers.resolve_model", lambda model, dtype: tiny_model("qwen3"))
    monkeypatch.setattr("m0_basics.tools.bench.peers.DEFAULT_MODEL", llm.config.model_config.model.lower())
    peers = make_peers(["llama.cpp"], [python, python], llm, 128)
    try:
        assert [p.name for p in peers] == ["vllm", "llama.cpp", "vllm-2", "llama.cpp-2"]
        (request,) = (BenchRequest((4, 9), 3),)
        (ids,) = peers[1].run(Workload("one", (request,))).token_ids
        assert ids == (9 + 2, 11 + 3, 14 + 4)                   # the prompt once, then one token at a time
        assert "model.gguf" in peers[1].note
    finally:
        for peer in peers:
            peer.close()


def test_a_peer_that_cannot_start(llm, tmp_path):
    python = interpreter(tmp_path, vllm=VLLM)
    with pytest.raises(ConfigError, match=r"peer vllm .*did not start.*the cache does not fit"):
        make_peers([], [python], llm, 2000)


def test_a_peer_that_dies_at_work(llm, tmp_path):
    (peer,) = make_peers([], [interpreter(tmp_path, vllm=VLLM)], llm, 128)
    with peer:
        with pytest.raises(BenchError, match=r"vllm has ended: .*first line \| last words"):
            peer.run(Workload("fatal", (BenchRequest((66,), 2),)))
        with pytest.raises(BenchError, match="vllm has ended"):
            peer.run(WORK)


def test_a_peer_whose_prefix_cache_is_emptied_before_each_run(llm, tmp_path):
    (peer,) = make_peers([], [interpreter(tmp_path, vllm=VLLM)], llm, 128, settings={"enable_prefix_caching": True})
    with peer:
        for _ in range(2):
            assert peer.run(WORK).token_ids == tuple(counting(r) for r in WORK.requests)
        with pytest.raises(BenchError, match="the prefix cache could not be emptied"):
            peer.run(WORK)


def test_a_peer_that_answers_too_little(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(textwrap.dedent("""
        import json, sys
        settings = json.loads(sys.argv[1])
        print(json.dumps({"ready": {"version": settings["engine"], "startup_s": 0.0}}), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps({"duration_s": 1.0, "requests": []}), flush=True)
    """))
    with SubprocessPeer("lazy", sys.executable, {"engine": "x 1"}, worker=worker) as peer:
        assert peer.note.startswith("x 1")
        with pytest.raises(BenchError, match="answered 0 of 4 requests"):
            peer.run(WORK)


def test_a_silent_peer_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("import time; time.sleep(60)")
    monkeypatch.setattr("m0_basics.tools.bench.subprocess_peers._START_TIMEOUT", 0.5)
    with pytest.raises(ConfigError, match=r"peer silent .*exit status -9, nothing on standard error"):
        SubprocessPeer("silent", sys.executable, {}, worker=worker)


@pytest.mark.parametrize("what", ["missing", "not executable", "no python", "no engine"])
def test_unusable_interpreters(llm, tmp_path, what):
    python = tmp_path / "python"
    if what == "not executable":
        python.write_text("")
    elif what == "no python":
        python.write_text("#!/bin/sh\nexit 1\n")
        python.chmod(0o755)
    elif what == "no engine":
        python = interpreter(tmp_path)
    message = "allowed: an interpreter that can import one of vllm, llama_cpp" if what == "no engine" else (
        "does not run as a Python interpreter")
    with pytest.raises(ConfigError, match=message) as caught:
        make_peers([], [python], llm, 128)
    assert str(python) in str(caught.value)


def test_environment_of_peers_can_be_overruled(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert peer_environment()["VLLM_CPU_KVCACHE_SPACE"] == "2"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert peer_environment()["VLLM_CPU_KVCACHE_SPACE"] == "7"
    json.dumps(peer_environment())
