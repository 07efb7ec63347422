"""F2.12: the asynchronous engine gives what the offline one gives, frees what nobody waits for, and fails aloud."""
from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing
from itertools import pairwise
from types import SimpleNamespace

import pytest

from m0_basics import ConfigError, SamplingParams
from m0_basics.tools.testing.parity import mixed_length_prompts
from m2_continuous_batching import LLM, SchedulingParams
from m2_continuous_batching.server import async_engine
from m2_continuous_batching.server.app import running
from m2_continuous_batching.server.async_engine import AsyncLLMEngine
from m2_continuous_batching.server.output_stream import OutputStream
from m2_continuous_batching.server.unavailable import EngineDeadError, EngineStoppedError, QueueFullError
from m2_continuous_batching.tests.recorder import Recorder

OPTIONS = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 3}
PROMPTS = mixed_length_prompts(260, 6, seed=3)
MESSAGES = [{"role": "user", "content": "on the 中"}]
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


@pytest.fixture(params=[False, True], ids=["", "async_scheduling"])
def make(request, tiny_model):
    """Over both engine loops."""
    def make_engine(step_s: float = 0.0, max_queued_requests: int | None = None, **options):
        recorder = Recorder(step_s)
        llm = LLM(str(tiny_model("qwen3")), plugins=[recorder],
                  **({"async_scheduling": request.param} | OPTIONS | options))
        return AsyncLLMEngine(llm, max_queued_requests), recorder
    return make_engine


def greedy(max_tokens=16, **settings):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **settings)


async def last(outputs):
    async for output in outputs:
        final = output
    return final


async def until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.005)


def assert_empty(engine):
    scheduler = engine.llm.engine.scheduler
    assert not scheduler.queues.has_unfinished_requests()
    assert scheduler.kv_cache_manager.usage == 0
    assert engine.num_open_requests == 0


def test_outputs_equal_the_offline_engine(make):
    """Twice as many requests as places; chats, one of which goes on, and text, among token ids."""
    engine, recorder = make()
    prompts = [*PROMPTS, "the one"]
    begun, on = [*MESSAGES, {"role": "assistant", "content": "a"}], {"add_generation_prompt": False,
                                                                     "continue_final_message": True}
    expected = [*engine.llm.generate(prompts, greedy(), use_tqdm=False),
                *engine.llm.chat(MESSAGES, greedy(), use_tqdm=False),
                *engine.llm.chat(begun, greedy(), use_tqdm=False, **on)]
    recorder.threads.clear()

    async def run():
        async with running(engine):
            return await asyncio.gather(*(last(engine.generate(p, greedy())) for p in [*prompts, MESSAGES]),
                                        last(engine.generate(begun, greedy(), template_options=on)))

    outputs = asyncio.run(run())
    assert [o.prompt_token_ids for o in outputs] == [o.prompt_token_ids for o in expected]
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in expected]
    assert [t.name for t in recorder.threads] == ["engine"], "only one thread steps, and it is not this one"
    assert_empty(engine)


def test_outputs_are_cumulative_and_reach_the_end(make):
    engine, _ = make()

    async def run():
        async with running(engine):
            return [o async for o in engine.generate(PROMPTS[0], greedy(), request_id="mine")]

    outputs = asyncio.run(run())
    whole = outputs[-1].outputs[0].token_ids
    assert all(whole[:len(o.outputs[0].token_ids)] == o.outputs[0].token_ids for o in outputs)
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {o.request_id for o in outputs} == {"mine"}


def test_a_bad_request_is_refused_and_nothing_is_queued(make):
    engine, recorder = make()

    async def run():
        async with running(engine):
            bad = [("", greedy(), None), ([1] * 300, greedy(), None), ([9999], greedy(), None),
                   ("x", greedy(), SchedulingParams(sla_class="gold"))]
            for prompt, params, scheduling in bad:
                with pytest.raises(ConfigError, match="allowed"):
                    await last(engine.generate(prompt, params, scheduling))
            with pytest.raises(ConfigError):        # the second of three: the first is not run either
                await engine.add_requests([PROMPTS[0], [9999], PROMPTS[1]], greedy(), stream=True)

    asyncio.run(run())
    assert recorder.steps == []
    assert_empty(engine)


def test_an_id_that_is_taken_is_refused(make):
    engine, _ = make()

    async def run():
        async with running(engine):
            first = engine.generate(PROMPTS[0], LONG, request_id="a")
            await anext(first)
            with pytest.raises(ConfigError, match="request_id"):
                await anext(engine.generate(PROMPTS[1], greedy(), request_id="a"))
            output = await last(first)
            assert len(output.outputs[0].token_ids) == 200, "the first one goes on"

    asyncio.run(run())


@pytest.mark.parametrize("how", ["close", "cancel", "cancel before the first token", "abort"])
def test_a_request_that_nobody_waits_for_is_freed(make, how):
    """Long before its 200 tokens; the others' tokens stay as they are."""
    engine, recorder = make(step_s=0.005)
    expected = engine.llm.generate(PROMPTS[1], greedy(), use_tqdm=False)[0].outputs[0].token_ids
    recorder.completed.clear()
    recorder.steps.clear()

    async def run():
        async with running(engine):
            if how == "close":
                async with aclosing(engine.generate(PROMPTS[0], LONG)) as outputs:
                    await anext(outputs)
            elif how == "abort":
                outputs = engine.generate(PROMPTS[0], LONG, request_id="a")
                await anext(outputs)
                engine.abort("a")
                assert (await last(outputs)).outputs[0].finish_reason == "abort"
                engine.abort("a")
                engine.abort("never seen")
            else:
                task = asyncio.create_task(last(engine.generate(PROMPTS[0], LONG)))
                await (asyncio.sleep(0) if "before" in how else until(lambda: recorder.steps[3:]))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            output = await last(engine.generate(PROMPTS[1], greedy()))
            assert output.outputs[0].token_ids == expected
            await until(lambda: not engine.num_open_requests)
            assert engine.is_healthy

    asyncio.run(run())
    assert_empty(engine)
    reasons = [r.sequences[0].status.finish_reason for r in recorder.completed]
    assert sorted(reasons) == (["length"] if "before" in how else ["abort", "length"])


def test_cancelling_while_the_request_is_on_its_way_leaves_nothing(make):
    """The engine is in a step that is held, so the command that adds the request waits in the queue."""
    engine, recorder = make()
    recorder.hold_after = 0

    async def run():
        async with running(engine):
            busy = asyncio.create_task(last(engine.generate(PROMPTS[0], greedy(4, ignore_eos=True))))
            await until(recorder.held.is_set)
            task = asyncio.create_task(engine.add_requests([PROMPTS[1]], LONG, stream=True))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            recorder.go.set()
            await busy
            await until(lambda: not engine.num_open_requests)

    asyncio.run(run())
    assert_empty(engine)


def test_a_slow_consumer_sees_the_newest_state_only(make):
    """While it sleeps, nothing piles up: one state waits, the last one."""
    engine, _ = make()

    async def run():
        async with running(engine):
            [stream] = await engine.add_requests([PROMPTS[0]], LONG, stream=True)
            await until(lambda: not engine.num_open_requests)
            output = await stream.next()
            assert output.finished
            assert stream.finished
            assert len(output.outputs[0].token_ids) == 200
            stream.close()

    asyncio.run(run())


def test_the_event_loop_runs_while_the_engine_steps(make):
    """A step that is held goes on when the loop says so, which it cannot while a step stops it."""
    engine, recorder = make()
    recorder.hold_after = 2

    async def run():
        async with running(engine):
            task = asyncio.create_task(last(engine.generate(PROMPTS[0], greedy(4, ignore_eos=True))))
            await until(recorder.held.is_set)
            assert not task.done()
            recorder.go.set()
            return await task

    assert len(asyncio.run(run()).outputs[0].token_ids) == 4


def test_a_grammar_that_takes_long_to_compile_delays_nobody_else(make, monkeypatch):
    """F2.11, F2.12: one stream runs on, another begins and ends, while the grammar of a third is compiled."""
    engine, _ = make()
    grammars = engine.llm.engine.sampler.grammars
    compile_alone, compiling, may_go_on = grammars._compile_alone, threading.Event(), threading.Event()
    compiled_in = []

    def slow(kind, text):
        compiled_in.append(threading.current_thread().name)
        compiling.set()
        assert may_go_on.wait(120), "nobody else came forward"
        return compile_alone(kind, text)

    monkeypatch.setattr(grammars, "_compile_alone", slow)
    choice = SamplingParams(structured_outputs={"choice": ["yes", "no"]}, max_tokens=50)

    async def run():
        async with running(engine):
            early = engine.generate(PROMPTS[0], LONG)
            await anext(early)
            constrained = asyncio.create_task(last(engine.generate(PROMPTS[1], choice)))
            await until(compiling.is_set)
            assert len((await last(early)).outputs[0].token_ids) == 200
            assert (await last(engine.generate(PROMPTS[2], greedy()))).finished
            assert not constrained.done()
            may_go_on.set()
            return (await constrained).outputs[0].text

    assert asyncio.run(run()) in ("yes", "no")
    assert len(compiled_in) == 1, "the engine finds it compiled"
    assert compiled_in != ["engine"]


def test_full_queue(make):
    """Three may run and two wait; the sixth is refused, and there is room again afterwards."""
    engine, _ = make(step_s=0.005, max_queued_requests=2)

    async def run():
        async with running(engine):
            streams = await engine.add_requests([PROMPTS[0]] * 5, LONG, stream=False)
            with pytest.raises(QueueFullError, match="max_queued_requests=2"):
                await engine.add_requests([PROMPTS[0]], greedy(), stream=False)
            with pytest.raises(ConfigError, match="6 prompts in one request; allowed: at most 5"):
                await engine.add_requests([PROMPTS[0]] * 6, greedy(), stream=False)
            for stream in streams:
                stream.close()
            assert (await last(engine.generate(PROMPTS[0], greedy()))).finished

    asyncio.run(run())


def test_the_death_of_the_engine_reaches_everybody(make):
    """Running, waiting and new requests get the error; health turns red. Nothing hangs."""
    engine, recorder = make(step_s=0.002)

    async def run():
        engine.start()
        tasks = [asyncio.create_task(last(engine.generate(p, LONG))) for p in PROMPTS]
        await until(lambda: len(recorder.steps) > 4)
        assert engine.is_healthy
        recorder.fail_with = MemoryError("gone")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not engine.is_healthy
        with pytest.raises(EngineDeadError, match="gone"):
            await last(engine.generate(PROMPTS[0], greedy()))
        engine.abort("any")
        await engine.shutdown()
        return results

    results = asyncio.run(run())
    assert [type(r) for r in results] == [EngineDeadError] * len(PROMPTS)
    assert all("MemoryError: gone" in str(r) for r in results)


@pytest.mark.slow
def test_shutdown_drains_and_then_aborts(make, monkeypatch):
    """A short request ends as usual, a long one is cut off, and no new one is taken."""
    engine, recorder = make()
    late = [0.0]
    monkeypatch.setattr(async_engine, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))

    def time_is_up(request):        # as soon as the short one has ended, and the long one cannot
        late[0] = 100.0
        recorder.step_s = 0.05

    recorder.on_request_completion = time_is_up
    recorder.hold_after = 0

    async def run():
        engine.start()
        both_wait = threading.Event()
        engine._post(lambda: both_wait.wait(120))       # so that both are open before the first step
        short = asyncio.create_task(last(engine.generate(PROMPTS[0], greedy(8, ignore_eos=True))))
        long = asyncio.create_task(last(engine.generate(PROMPTS[1], LONG)))
        await until(lambda: engine._commands.qsize() == 2)
        both_wait.set()
        await until(lambda: engine.num_open_requests == 2)
        ending = asyncio.create_task(engine.shutdown(drain_s=90.0))
        await asyncio.sleep(0)
        recorder.go.set()
        with pytest.raises(EngineStoppedError):
            await last(engine.generate(PROMPTS[2], greedy()))
        await ending
        return (await short).outputs[0], (await long).outputs[0]

    short, long = asyncio.run(run())
    assert (short.finish_reason, len(short.token_ids)) == ("length", 8)
    assert (long.finish_reason, long.stop_reason) == ("abort", "shutdown")
    assert not engine.is_healthy
    assert_empty(engine)


def test_before_the_start_requests_are_refused(make):
    engine, _ = make()

    async def run():
        with pytest.raises(EngineStoppedError, match="not started"):
            await last(engine.generate(PROMPTS[0], greedy()))
        await engine.shutdown()

    asyncio.run(run())


def test_a_consumer_whose_loop_is_gone_is_forgotten(make):
    """Its request is aborted at the next token, and the engine goes on."""
    engine, _ = make(step_s=0.01)
    engine.start()
    kept: list[OutputStream] = []

    async def leave():
        kept.extend(await engine.add_requests([PROMPTS[0]], LONG, stream=True))

    async def use():
        assert (await last(engine.generate(PROMPTS[1], greedy()))).finished
        await until(lambda: not engine.num_open_requests)
        await engine.shutdown()

    asyncio.run(leave())
    asyncio.run(use())
    assert kept[0].request.sequences[0].status.finish_reason == "abort"
    assert_empty(engine)


def test_a_long_prompt_delays_a_running_stream_by_one_step_at_most(make):
    """F2.12: between two tokens of a stream that runs lies at most one step that did not run it."""
    engine, recorder = make(max_num_seqs=6)
    recorder.hold_after = 6

    async def run():
        async with running(engine):
            streams = [asyncio.create_task(last(engine.generate(p, greedy(60, ignore_eos=True))))
                       for p in PROMPTS[:2]]
            await until(recorder.held.is_set)
            long = [asyncio.create_task(last(engine.generate([7 + i] * 200, greedy(20, ignore_eos=True))))
                    for i in range(4)]
            await asyncio.sleep(0)
            recorder.go.set()
            return await asyncio.gather(*streams, *long)

    asyncio.run(run())
    sequences = {seq_id for step in recorder.steps for seq_id, _ in step}
    prefills = [i for i, step in enumerate(recorder.steps) if max(tokens for _, tokens in step) == 200]
    assert len(sequences) == 6
    interrupted = 0
    for seq_id in sequences:
        ran = [i for i, step in enumerate(recorder.steps) if seq_id in dict(step)]
        gaps = [later - earlier - 1 for earlier, later in pairwise(ran)]
        assert max(gaps) <= 1
        interrupted += sum(gaps)
    assert prefills
    assert interrupted > 0, "some stream was running when a long prompt came"
