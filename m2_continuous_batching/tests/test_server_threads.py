"""F2.12: what takes long runs in a thread aside, each kind in its own: who waits for whom, and for how long.

Most of it is the engine of the server and its workers, without HTTP.
"""
from __future__ import annotations

import asyncio
import threading
import time

import pytest

from m0_basics import ConfigError, SamplingParams
from m0_basics.loading.tokenizer import Tokenizer
from m2_continuous_batching import LLM
from m2_continuous_batching.server.app import running
from m2_continuous_batching.server.async_engine import AsyncLLMEngine
from m2_continuous_batching.server.unavailable import EngineStoppedError, QueueFullError
from m2_continuous_batching.server.workers import Workers
from m2_continuous_batching.tools.testing.server import RunningServer, wait_until

OPTIONS = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 64}


def make_engine(tiny_model, **settings):
    return AsyncLLMEngine(LLM(str(tiny_model("qwen3")), **OPTIONS), **settings)


def test_a_long_text_waits_for_long_ones_only(tiny_model, monkeypatch):
    """While a text of a megabyte is tokenised a short request begins and ends."""
    engine, begun, go_on = make_engine(tiny_model), threading.Event(), threading.Event()
    encode_batch = Tokenizer.encode_batch

    def slow(self, texts, *rest, **options):
        if len(texts[0]) > 3000:
            begun.set()
            assert go_on.wait(60)
        return encode_batch(self, texts, *rest, **options)

    monkeypatch.setattr(Tokenizer, "encode_batch", slow)
    monkeypatch.setattr("m2_continuous_batching.server.workers.LONG", 3000)
    monkeypatch.setattr(engine.llm.input_processor, "_check_length", lambda *_: None)
    short = SamplingParams(temperature=0, max_tokens=2)

    async def last(prompt):
        return [output async for output in engine.generate(prompt, short)][-1]

    async def run():
        async with running(engine):
            long = asyncio.create_task(last("the " * 1000))
            while not begun.is_set():
                await asyncio.sleep(0.005)
            assert (await last("the one")).finished
            assert not long.done()
            go_on.set()
            with pytest.raises(ConfigError, match="tokens; allowed"):
                await long

    asyncio.run(run())


def test_a_constraint_that_takes_too_long(tiny_model, monkeypatch):
    """Its request is told to come again; another one is not held up; the number of those that wait is limited."""
    engine, go_on = make_engine(tiny_model, max_compile_s=0.2), threading.Event()
    grammars = engine.llm.engine.sampler.grammars
    compile_alone = grammars._compile_alone
    monkeypatch.setattr(grammars, "_compile_alone", lambda *source: (go_on.wait(60), compile_alone(*source))[1])
    choice = SamplingParams(structured_outputs={"choice": ["yes", "no"]}, max_tokens=20)

    async def run():
        async with running(engine):
            with pytest.raises(QueueFullError, match="was not compiled within"):
                await engine.add_requests([[1]], choice, stream=False)
            [stream] = await engine.add_requests([[1]], SamplingParams(max_tokens=2), stream=False)
            assert (await stream.next()).finished
            engine.workers._num_compiling = 32
            with pytest.raises(QueueFullError, match="32 constraints"):
                await engine.add_requests([[1]], choice, stream=False)
            engine.workers._num_compiling = 0
            go_on.set()
            engine.max_compile_s = 60
            [stream] = await engine.add_requests([[1]], choice, stream=False)
            assert (await stream.next()).outputs[0].text in ("yes", "no")

    asyncio.run(run())


def test_what_is_compiled_waits_for_no_compiler(tiny_model, monkeypatch):
    """Nor do bad words: a dozen new constraints wait meanwhile, and each is compiled once, however many ask."""
    engine, begun, go_on, compiled = make_engine(tiny_model), threading.Event(), threading.Event(), []
    grammars = engine.llm.engine.sampler.grammars
    compile_alone = grammars._compile_alone

    def slow(kind, text):
        compiled.append(text)
        begun.set()
        assert go_on.wait(60)
        return compile_alone(kind, text)

    def choice(*texts):
        return SamplingParams(structured_outputs={"choice": list(texts)}, max_tokens=20)

    async def last(params):
        return [output async for output in engine.generate([1], params)][-1].outputs[0]

    async def run():
        async with running(engine):
            await last(choice("yes", "no"))
            monkeypatch.setattr(grammars, "_compile_alone", slow)
            new = [asyncio.create_task(last(choice(f"a{i % 6}"))) for i in range(12)]
            while not begun.is_set():
                await asyncio.sleep(0.005)
            async with asyncio.timeout(50):
                assert (await last(choice("yes", "no"))).text in ("yes", "no")
                assert len((await last(SamplingParams(bad_words=["the"], max_tokens=2))).token_ids) == 2
            assert not any(task.done() for task in new)
            go_on.set()
            assert [output.text for output in await asyncio.gather(*new)] == [f"a{i % 6}" for i in range(12)]

    engine.max_compile_s = 60
    asyncio.run(run())
    assert len(compiled) == 6


def test_health_fails_when_a_step_does_not_end(tiny_model):
    """And is well again after it; between requests no step is under way."""
    with RunningServer(lambda plugins: LLM(str(tiny_model("qwen3")), plugins=plugins, **OPTIONS),
                       max_step_s=0.3) as server:
        runner, go_on = server.llm.engine.runner, threading.Event()
        execute = runner.execute
        runner.execute = lambda inputs: (go_on.wait(60), execute(inputs))[1]
        waiting = threading.Thread(target=server.send, args=("/v1/completions", {"prompt": "x", "max_tokens": 1}))
        waiting.start()
        wait_until(lambda: server.send("/health")[0] == 503)
        assert "a step runs for" in server.send("/health")[1]["status"]
        go_on.set()
        waiting.join()
        wait_until(lambda: server.send("/health")[0] == 200)
        time.sleep(0.4)
        assert server.send("/health")[0] == 200
        assert server.engine.step_age == 0


def test_the_end_does_not_wait_for_a_step_that_hangs(tiny_model, monkeypatch):
    """Who waits for it is told; so is who waits for a tokenizer or a compiler that hangs."""
    monkeypatch.setattr("m2_continuous_batching.server.async_engine._JOIN_S", 0.2)
    engine, go_on = make_engine(tiny_model), threading.Event()
    runner = engine.llm.engine.runner
    execute = runner.execute
    ended = []
    runner.execute = lambda inputs: (ended.append(go_on.wait(60)), execute(inputs))[1]

    async def run():
        engine.start()
        [stream] = await engine.add_requests([[1]], SamplingParams(max_tokens=2), stream=False)
        hanging = asyncio.create_task(engine.workers.run(lambda: go_on.wait(60)))
        queued = asyncio.create_task(engine.workers.run(lambda: 1))
        await asyncio.sleep(0.05)
        await engine.shutdown()
        assert ended == []
        for waiting in (stream.next(), hanging, queued):
            with pytest.raises(EngineStoppedError):
                await waiting
        assert engine.is_working
        go_on.set()

    asyncio.run(run())
    wait_until(lambda: not engine.is_working)


def test_workers_drop_what_nobody_waits_for():
    """A client that goes away while it queues costs nothing any more."""
    workers, go_on, done = Workers(), threading.Event(), []

    async def run():
        first = asyncio.create_task(workers.run(lambda: go_on.wait(60)))
        second = asyncio.create_task(workers.run(lambda: done.append("second")))
        third = asyncio.create_task(workers.run(lambda: done.append("third")))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(first, third)
        workers.close()

    asyncio.run(run())
    assert done == ["third"]
