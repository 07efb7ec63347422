"""The offline engine: one prefill for all outputs of a request, and nothing left behind however a request ends."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from m0_basics.config import ConfigError
from m0_basics.outputs import RequestOutput
from m0_basics.request import Sequence, SequenceStatus
from m0_basics.sampler import SamplerOutput
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.cli.run_stats import RunStats
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import PARROT_TEXT, TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens, reference_greedy, reference_logits
from m0_basics.tools.testing.tiny_models import BOS
from m1_offline import LLM, BeamSearchParams
from m1_offline.engine import OfflineEngine

NUM_ROWS = 4


class Lab:
    """An engine over a tiny model, and what is watched in it."""

    def __init__(self, folder: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.folder = folder
        self.llm = LLM(str(folder), **{"dtype": "float32", "max_num_seqs": NUM_ROWS, "max_model_len": 128, **options})
        assert isinstance(self.llm.engine, OfflineEngine)
        self.engine = self.llm.engine
        self.monkeypatch = monkeypatch
        self.tokens_run: list[int] = []             # per step
        execute = self.engine.runner.execute_model

        def count(scheduled: list[Any]) -> Tensor:
            self.tokens_run.append(sum(s.num_tokens for s in scheduled))
            return execute(scheduled)

        monkeypatch.setattr(self.engine.runner, "execute_model", count)

    def run(self, prompts: Any, params: Any) -> list[RequestOutput]:
        return self.llm.generate(prompts, params, use_tqdm=False)

    def add(self, prompt: Any, params: SamplingParams) -> Any:
        request = self.llm.input_processor.process(prompt, params)
        self.engine.add_request(request)
        return request

    def is_empty(self) -> bool:
        """All rows are free, no text state is kept, no mailbox is left."""
        return (self.engine.rows.num_free == NUM_ROWS and not self.engine.has_unfinished_requests()
                and not self.engine.output_processor._states and not self.llm._mailboxes)

    def serves(self) -> None:
        """The engine is as new: right tokens for good prompts, four outputs side by side."""
        assert self.is_empty()
        assert_same_tokens(ids_of(self.run(PROMPTS, greedy())), reference_greedy(self.folder, PROMPTS, 16))
        assert len(self.run(PROMPTS[0], sampled(n=NUM_ROWS))[0].outputs) == NUM_ROWS
        assert self.is_empty()


@pytest.fixture
def lab(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(tiny_model("qwen3"), monkeypatch)


def sampled(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 3, "temperature": 1.5, "max_tokens": 6, "ignore_eos": True, **settings})


class TestSeveralOutputs:
    """F1.4."""

    def test_the_prompt_is_run_once(self, lab: Lab) -> None:
        """F1.4: n outputs cost one prefill and n tokens a step, not n prefills."""
        prompt = [9] * 20
        for n in (1, 3, 4):
            lab.tokens_run.clear()
            lab.run(prompt, sampled(n=n))
            assert lab.tokens_run == [20] + [n] * 5

    def test_outputs_that_end_early_free_their_rows(self, lab: Lab) -> None:
        """F1.4: a finished output leaves the step and the cache, while the others go on."""
        full = [part.token_ids for part in lab.run(PROMPTS[2], sampled(n=4, max_tokens=40))[0].outputs]
        stop = next(t for t in full[1] if sum(t in ids for ids in full) < 4)
        expected = [ids[:ids.index(stop) + 1] if stop in ids else ids for ids in full]
        lab.tokens_run.clear()
        request = lab.add(PROMPTS[2], sampled(n=4, max_tokens=40, stop_token_ids=[stop]))
        free = []
        while lab.engine.has_unfinished_requests():
            lab.engine.step()
            free.append(lab.engine.rows.num_free)
        assert [s.output_token_ids for s in request.sequences] == expected
        assert lab.tokens_run[1:] == [sum(len(ids) > step for ids in expected) for step in range(1, 40)]
        assert free == [sum(len(ids) <= step for ids in expected) for step in range(1, 41)]

    def test_the_forks_equal_outputs_run_alone(self, lab: Lab) -> None:
        """F1.4: output i of n is what the same seed and index give from a cache of their own: logits say so."""
        outputs = lab.run(PROMPTS[1], sampled(n=3, logprobs=3))[0].outputs
        assert len({tuple(part.token_ids) for part in outputs}) == 3
        for part in outputs:
            rows = reference_logits(lab.folder, [*PROMPTS[1], *part.token_ids])[len(PROMPTS[1]) - 1:-1].log_softmax(-1)
            for row, entry in zip(rows, part.logprobs, strict=True):
                for token, logprob in entry.items():
                    assert logprob.logprob == pytest.approx(row[token].item(), abs=1e-3)

    def test_more_outputs_than_rows(self, lab: Lab) -> None:
        for settings, message in (({"n": 5}, r"prompts\[1\]: n=5 is not valid; allowed: at most max_num_seqs=4"),
                                  ({"n": 2, "best_of": 9}, "best_of=9 is not valid; allowed: at most max_num_seqs=4")):
            with pytest.raises(ConfigError, match=message):
                lab.run(PROMPTS[:2], [sampled(n=4), sampled(**settings)])
            assert lab.tokens_run == [], "refused before anything is run"
        lab.serves()

    def test_best_of_streams_at_the_end(self, lab: Lab) -> None:
        """F1.4, F1.6: which outputs are best is known at the end, so nothing is handed out that might not be kept."""
        params = sampled(n=2, best_of=4)
        whole = lab.run(PROMPTS[0], params)[0].outputs
        parts = list(lab.llm.stream(PROMPTS[0], params))
        assert len(parts) == 1
        assert [(p.index, p.token_ids, p.text) for p in parts[0].outputs] == [
            (p.index, p.token_ids, p.text) for p in whole]


class TestAbort:
    """Nothing of an aborted request is left."""

    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("n", [1, 4])
    def test_running(self, lab: Lab, steps: int, n: int) -> None:
        request = lab.add(PROMPTS[0], sampled(n=n, max_tokens=50))
        for _ in range(steps):
            lab.engine.step()
        assert lab.engine.rows.num_free == NUM_ROWS - n
        lab.engine.abort_request(request.request_id)
        assert [s.status for s in request.sequences] == [SequenceStatus.FINISHED_ABORTED] * n
        assert all(len(s.output_token_ids) == steps for s in request.sequences)
        lab.serves()

    def test_waiting(self, lab: Lab) -> None:
        """It holds no row yet, and the request that runs is not disturbed."""
        running, waiting = lab.add(PROMPTS[0], greedy()), lab.add(PROMPTS[1], greedy())
        lab.engine.step()
        lab.engine.abort_request(waiting.request_id)
        assert lab.engine.rows.num_free == NUM_ROWS - 1
        while lab.engine.has_unfinished_requests():
            lab.engine.step()
        assert waiting.sequences[0].output_token_ids == []
        assert_same_tokens([running.sequences[0].output_token_ids], reference_greedy(lab.folder, PROMPTS[:1], 16))
        lab.serves()

    def test_with_one_output_finished_already(self, lab: Lab) -> None:
        """A finished output stays finished; the others are aborted."""
        full = [part.token_ids for part in lab.run(PROMPTS[2], sampled(n=2, max_tokens=40))[0].outputs]
        stop = next(t for t in full[0] if t not in full[1])
        request = lab.add(PROMPTS[2], sampled(n=2, max_tokens=40, stop_token_ids=[stop]))
        for _ in range(full[0].index(stop) + 2):
            lab.engine.step()
        lab.engine.abort_request(request.request_id)
        assert [s.status for s in request.sequences] == [SequenceStatus.FINISHED_STOPPED,
                                                         SequenceStatus.FINISHED_ABORTED]
        lab.serves()

    def test_an_iterator_that_is_dropped(self, lab: Lab) -> None:
        """F1.6: whether it was used or not, closed or forgotten."""
        used, closed, forgotten = (lab.llm.stream(prompt, greedy(50)) for prompt in PROMPTS[:3])
        next(used)
        closed.close()      # type: ignore[attr-defined]
        del used, forgotten
        lab.serves()


class TestInterleaving:
    """F1.6: several consumers share one engine; what one steps past waits for the other."""

    def test_streams_and_generate(self, lab: Lab) -> None:
        expected = reference_greedy(lab.folder, PROMPTS, 16)
        streams: list[Iterator[RequestOutput]] = [lab.llm.stream(prompt, greedy()) for prompt in PROMPTS[:3]]
        got: list[list[int]] = [[], [], []]

        def take(i: int, count: int) -> None:
            for _ in range(count):
                got[i] += next(streams[i]).outputs[0].token_ids

        take(0, 5)
        take(2, 3)          # runs the first two to their ends on the way
        assert_same_tokens(ids_of(lab.run(PROMPTS[3:], greedy())), expected[3:])
        take(1, 16)
        take(2, 13)
        take(0, 11)
        assert_same_tokens(got, expected[:3])
        assert all(next(stream, None) is None for stream in streams)
        lab.serves()

    def test_closing_one_of_two(self, lab: Lab) -> None:
        first, second = (lab.llm.stream(prompt, greedy()) for prompt in PROMPTS[:2])
        next(first)
        first.close()       # type: ignore[attr-defined]
        tokens = [i for part in second for i in part.outputs[0].token_ids]
        assert_same_tokens([tokens], reference_greedy(lab.folder, PROMPTS[1:2], 16))
        lab.serves()


class TestFailure:
    """An exception on the way leaves the LLM usable."""

    @pytest.mark.parametrize("at", [0, 4])
    @pytest.mark.parametrize("part", ["sampler", "runner", "output_processor"])
    def test_in_the_middle_of_generate(self, lab: Lab, part: str, at: int) -> None:
        owner, name = {"sampler": (type(lab.engine.sampler), "__call__"),
                       "runner": (lab.engine.runner, "execute_model"),
                       "output_processor": (lab.engine.output_processor, "process")}[part]
        original, calls = getattr(owner, name), 0

        def fail(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise RuntimeError("broken")
            return original(*args)

        lab.monkeypatch.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="broken"):
            lab.run([PROMPTS[0], PROMPTS[1]], sampled(n=4))
        lab.serves()

    def test_while_a_stream_is_open(self, lab: Lab) -> None:
        """The stream that stepped into it ends with the error; its request is gone."""
        stream = lab.llm.stream(PROMPTS[0], sampled(n=2))
        next(stream)
        original = lab.engine.sampler

        def fail(logits: Tensor, sequences: list[Sequence]) -> SamplerOutput:
            lab.engine.sampler = original
            raise RuntimeError("broken")

        lab.engine.sampler = fail       # type: ignore[assignment]
        with pytest.raises(RuntimeError, match="broken"):
            next(stream)
        lab.serves()

    def test_interrupt(self, lab: Lab) -> None:
        """Ctrl-C is an exception like any other."""
        def interrupt(*_: Any) -> Tensor:
            raise KeyboardInterrupt

        with lab.monkeypatch.context() as patch:
            patch.setattr(lab.engine.runner, "execute_model", interrupt)
            with pytest.raises(KeyboardInterrupt):
                lab.run(PROMPTS, greedy())
        lab.serves()


class TestMetrics:
    """F1.7: times on one clock."""

    def test_times_of_a_request(self, lab: Lab) -> None:
        outputs = lab.run(PROMPTS, [greedy(n) for n in (1, 5, 2, 7, 3, 4)])
        previous = 0.0
        for output, n in zip(outputs, (1, 5, 2, 7, 3, 4), strict=True):
            metrics = output.metrics
            assert metrics is not None
            times = metrics.token_times
            assert len(times) == n
            assert metrics.arrival_time <= metrics.first_scheduled_time < times[0] == metrics.first_token_time
            assert all(a < b for a, b in pairwise(times))
            assert metrics.finished_time == times[-1]
            assert metrics.first_scheduled_time >= previous, "one request after the other"
            previous = metrics.finished_time
        arrivals = [output.metrics.arrival_time for output in outputs]
        assert arrivals == sorted(arrivals)
        assert arrivals[-1] <= outputs[0].metrics.token_times[0], "all arrive before the first is run"

    def test_several_outputs_share_their_steps(self, lab: Lab) -> None:
        """One time for each token of each output; those of one step came together."""
        output = lab.run(PROMPTS[0], sampled(n=3))[0]
        times = output.metrics.token_times
        assert (len(times), len(set(times))) == (18, 6)

    def test_summary_line(self, lab: Lab) -> None:
        metrics = lab.run(PROMPTS[0], greedy(5))[0].metrics
        stats = RunStats.of(metrics)
        times = metrics.token_times
        assert stats.ttft == times[0] - metrics.arrival_time > 0
        assert stats.tokens_per_second == pytest.approx(4 / (times[-1] - times[0]))
        assert stats.output_tokens == 5
        assert stats.peak_memory > 10 ** 7
        assert stats.line().startswith(f"TTFT {stats.ttft * 1000:.0f} ms | 5 tokens, ")
        assert ", 3 prompt tokens from the cache | 5 tokens, " in RunStats.of(metrics, cached_tokens=3).line()
        one = lab.run(PROMPTS[0], greedy(1))[0].metrics
        assert RunStats.of(one).tokens_per_second is None
        assert "1 tokens, one token" in RunStats.of(one).line()


class TestLogprobs:
    """F1.3, F0.8: values equal those of transformers' logits, in plain runs and in streams."""

    def test_values_and_text(self, lab: Lab) -> None:
        output = lab.run(PROMPTS[1], greedy(8, logprobs=2, prompt_logprobs=1))[0]
        part, decode = output.outputs[0], lab.llm.get_tokenizer().decode
        rows = reference_logits(lab.folder, [*PROMPTS[1], *part.token_ids]).log_softmax(-1)
        prompt_rows, output_rows = rows[:len(PROMPTS[1]) - 1], rows[len(PROMPTS[1]) - 1:-1]
        total = 0.0
        for row, entry, token in zip(output_rows, part.logprobs, part.token_ids, strict=True):
            assert list(entry) == row.topk(2).indices.tolist()
            assert entry[token].rank == 1
            total += row[token].item()
            for i, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[i].item(), abs=1e-3)
                assert logprob.decoded_token == decode([i])
        assert part.cumulative_logprob == pytest.approx(total, abs=1e-2)
        assert output.prompt_logprobs[0] is None
        for row, entry, token in zip(prompt_rows, output.prompt_logprobs[1:], PROMPTS[1][1:], strict=True):
            assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-3)
            assert entry[token].rank == int((row > row[token]).sum()) + 1
            assert entry[token].decoded_token == decode([token])

    def test_several_outputs_share_the_prompts(self, lab: Lab) -> None:
        one, many = (lab.run(PROMPTS[1], sampled(n=n, prompt_logprobs=2))[0] for n in (1, 3))
        assert one.prompt_logprobs == many.prompt_logprobs
        assert len(many.prompt_logprobs) == len(PROMPTS[1])

    def test_in_a_stream(self, lab: Lab) -> None:
        params = sampled(logprobs=2)
        whole = lab.run(PROMPTS[0], params)[0].outputs[0]
        parts = list(lab.llm.stream(PROMPTS[0], params))
        assert [entry for part in parts for entry in part.outputs[0].logprobs] == whole.logprobs
        assert parts[-1].outputs[0].cumulative_logprob == pytest.approx(whole.cumulative_logprob)

    def test_special_tokens_are_written_out(self, tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
        """The text of a log-probability entry is that of the token itself, not of a text that leaves it out."""
        lab = Lab(tiny_model("parrot_eos"), monkeypatch)
        output = lab.run(BOS, SamplingParams(temperature=0, max_tokens=64, logprobs=0))[0].outputs[0]
        assert output.text == PARROT_TEXT
        assert output.logprobs[-1][output.token_ids[-1]].decoded_token == "<|im_end|>"


def test_no_tokens_left_over_from_a_contradiction(lab: Lab) -> None:
    """F0.5: no token could be drawn, so the request is refused, not answered with one that is not allowed."""
    with pytest.raises(ConfigError, match=r"allowed_token_ids=\[5\] is not valid; allowed: also a token that does not"):
        lab.run(PROMPTS[0], greedy(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=1))
    ids = lab.run(PROMPTS[0], greedy(4, allowed_token_ids=[5, 6], stop_token_ids=[5], min_tokens=2))[0].outputs[0]
    assert ids.token_ids[:2] == [6, 6]
    assert torch.tensor(ids.token_ids).le(6).all()


def test_an_idle_engine_has_nothing_to_do(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """F1.1: a step without requests returns nothing, and runs nothing."""
    lab = Lab(tiny_model("qwen3"), monkeypatch)
    assert lab.engine.step() == []
    assert lab.tokens_run == []


def test_beam_search_takes_one_prompt_or_several(tiny_model: TinyModels) -> None:
    """F1.4: a text is one prompt, not a list of characters."""
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=64)
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    assert len(llm.beam_search("the cat", params)) == 1
    assert llm.beam_search("the cat", params) == llm.beam_search(["the cat"], params)
