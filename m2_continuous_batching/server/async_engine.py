"""The engine for a server: it steps in a thread of its own, and coroutines wait for what comes out.

    coroutines   add, abort  -->  queue of commands  -->  engine thread:  commands, step, commands, step, ...
    coroutines   <--  newest state of each request   <--  (a mailbox that holds one output, never a list)

Nothing but the engine thread changes the engine, so the engine needs no lock. An output holds everything that its
request has produced so far: a consumer that is slow misses intermediate states and nothing else.
"""
from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError, check_int
from m0_basics.input_processor import Prompt
from m0_basics.loading.tokenizer import Message
from m0_basics.outputs import RequestOutput
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams

from ..engine import engine_of
from ..policies import SchedulingParams
from ..structured_output import StructuredSampler
from .admission import check_room, check_size, is_chat, num_chars, num_chars_within
from .output_stream import OutputStream
from .unavailable import EngineDeadError, EngineStoppedError, EngineUnavailableError
from .workers import LONG, Workers

logger = logging.getLogger(__name__)
T = TypeVar("T")
SHUTDOWN = "shutdown"               # the stop_reason of a request that the end of the engine cut off
_STOP_COST = 8                      # a character of a stop string takes as long as so many of a prompt
_JOIN_S = 5.0                       # longest that the end waits for a step that is under way


class AsyncLLMEngine:
    """`async for output in engine.generate(prompt, params)` over the engine of any `LLM` from this milestone on."""

    def __init__(self, llm: BaseLLM, max_queued_requests: int | None = None, max_compile_s: float = 10.0) -> None:
        """From `start` on the LLM belongs to this object.

        `max_queued_requests`: how many outputs may wait for a place (a request has `best_of` of them).
        `max_compile_s`: how long a request waits for its constraint to be compiled.
        """
        check_int("max_queued_requests", max_queued_requests, 0, optional=True)
        self.llm = llm
        self._engine = engine_of(llm)
        self.max_queued_requests = max_queued_requests
        self.max_compile_s = max_compile_s
        self.workers = Workers()
        self._streams: dict[str, OutputStream] = {}         # owned by the engine thread
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._gate = threading.Lock()                       # no command gets into the queue once the thread has ended
        self._thread: threading.Thread | None = None
        self._accepting = False
        self._stopping = False
        self._step_began: float | None = None               # None while there is nothing to do
        self._ended: EngineUnavailableError | None = EngineStoppedError("the engine was not started")

    @property
    def is_healthy(self) -> bool:
        """Whether requests are served: started, and neither dead nor stopped."""
        return self._ended is None

    @property
    def num_open_requests(self) -> int:
        """Requests whose last output has not come yet."""
        return len(self._streams)

    @property
    def step_age(self) -> float:
        """Seconds since the step that is under way began, with the commands before it; 0 where none is."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def max_prompts(self) -> int | None:
        """Outputs that run and wait at the most, None for any number: one request can not have more prompts."""
        if self.max_queued_requests is None:
            return None
        return self._engine.scheduler.queues.max_num_seqs + self.max_queued_requests

    def start(self) -> None:
        """Start the engine's thread. An engine is started once."""
        assert self._thread is None, "an engine is started once"
        self._ended, self._accepting = None, True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let the open ones run for `drain_s` seconds, abort the rest, end the thread.

        A step that does not end is left behind after some seconds, and everybody who waits is told.
        """
        self._accepting = False
        deadline = time.monotonic() + drain_s
        while self._streams and self.is_healthy and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self.is_healthy:
            self._post(self._stop)
        deadline = time.monotonic() + _JOIN_S
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        if self.is_healthy:
            self._stopping = True           # should it ever end
            logger.error("a step has not ended within %.0f s: it is left behind", _JOIN_S)
            self._end(EngineStoppedError("the engine has shut down"))
        self.workers.close()

    @property
    def is_working(self) -> bool:
        """Whether a thread of this object works on after the end."""
        return self.workers.is_busy or (self._thread is not None and self._thread.is_alive())

    async def generate(self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None,
                       scheduling_params: SchedulingParams | None = None, *, add_special_tokens: bool | None = None,
                       request_id: str | None = None,
                       template_options: Mapping[str, Any] | None = None) -> AsyncIterator[RequestOutput]:
        """Yield the request's state as it grows; the last one is finished. A list of messages is a chat.

        `template_options`: what `Tokenizer.apply_chat_template` takes beside them, such as `continue_final_message`.

        Raises ConfigError for a request that cannot be run, EngineUnavailableError where the engine takes or runs
        none. Closing the iterator, or cancelling the task that iterates, aborts the request.
        """
        params = sampling_params or self.llm.default_sampling_params
        [stream] = await self.add_requests([prompt], params, scheduling_params, stream=params.best_of == params.n,
                                           add_special_tokens=add_special_tokens, request_id=request_id,
                                           template_options=template_options)
        try:
            while not stream.finished:
                yield await stream.next()
        finally:
            stream.close()

    async def add_requests(self, prompts: Sequence[Prompt | Sequence[Message]], params: SamplingParams,
                           scheduling_params: SchedulingParams | None = None, *, stream: bool,
                           add_special_tokens: bool | None = None, request_id: str | None = None,
                           template_options: Mapping[str, Any] | None = None,
                           cache_salt: str = "") -> list[OutputStream]:
        """Queue all of the prompts or, where one of them is refused, none; close every stream that is returned.

        `stream`: whether a request reports after each step, or at its end only. `request_id` is for a single prompt.
        `add_special_tokens`: None adds them to a text, and not to a chat, whose template writes its own.
        `template_options`: what `Tokenizer.apply_chat_template` takes beside the messages of a chat. Requests of
        different `cache_salt` share nothing, in whatever an engine keeps of them.
        """
        assert request_id is None or len(prompts) == 1
        self._check_accepting()
        check_size(len(prompts), params, self.max_prompts)

        def process() -> list[Request]:
            self._engine.output_processor.prepare(params)
            return [self._process(prompt, params, stream, add_special_tokens, template_options or {}, cache_salt)
                    for prompt in prompts]

        size = sum(map(num_chars, prompts)) + num_chars_within(template_options or {}, LONG)
        size += _STOP_COST * sum(map(len, params.stop or ()))
        requests = await self.workers.run(process, size)
        # What takes long is done here, once, and kept: neither the engine nor other prompts wait for it.
        takes_long = params.structured_outputs is not None or bool(params.bad_words)
        if takes_long and not await self.workers.check(lambda: self._check_compiled(params)):
            await self.workers.compile(lambda: self._engine.sampler.check(params), self.max_compile_s)
        if request_id is not None:
            requests[0].request_id = request_id
        streams = [OutputStream(request, self.abort) for request in requests]
        try:
            await asyncio.wrap_future(self._post(lambda: self._add(streams, scheduling_params)))
        except asyncio.CancelledError:
            for output_stream in streams:
                output_stream.close()       # in the queue behind the command that adds them
            raise
        return streams

    def abort(self, request_id: str) -> None:
        """Free what a request holds; its stream gets a last output. An unknown id is ignored. Never blocks."""
        if self.is_healthy:
            try:
                self._post(lambda: self._abort(request_id))
            except EngineUnavailableError:
                return                      # it has just ended, and nothing runs any more

    def _process(self, prompt: Any, params: SamplingParams, stream: bool, add_special_tokens: bool | None,
                 template_options: Mapping[str, Any], cache_salt: str) -> Request:
        special = not is_chat(prompt) if add_special_tokens is None else add_special_tokens
        if is_chat(prompt):
            prompt = self.llm.get_tokenizer().apply_chat_template(prompt, **template_options)
        if cache_salt:
            kind = "prompt" if isinstance(prompt, str) else "prompt_token_ids"
            prompt = {**(prompt if isinstance(prompt, Mapping) else {kind: prompt}), "cache_salt": cache_salt}
        return self.llm.input_processor.process(prompt, params, stream, special)

    def _check_compiled(self, params: SamplingParams) -> bool:
        """Check what needs no compiler. False: `params` have a constraint that is still to be compiled."""
        sampler = self._engine.sampler
        if params.structured_outputs is not None and not (isinstance(sampler, StructuredSampler)
                                                          and sampler.is_compiled(params)):
            return False
        sampler.check(params)
        return True

    def _check_accepting(self) -> None:
        if self._ended is not None:
            raise self._ended
        if not self._accepting:
            raise EngineStoppedError("the engine is shutting down")

    def _post(self, command: Callable[[], T]) -> Future[T]:
        """Let the engine thread run `command` before its next step."""
        future: Future[T] = Future()
        with self._gate:
            if self._ended is not None:
                raise self._ended
            self._commands.put((command, future))
        return future

    # From here on: the engine thread.

    def _run(self) -> None:
        engine = self._engine
        try:
            while not self._stopping:
                idle = not engine.has_unfinished_requests()
                self._step_began = None if idle else time.monotonic()
                self._run_commands(wait=idle)
                if not self._stopping:
                    for output in engine.step():
                        self._deliver(output)
        except BaseException as error:
            logger.critical("the engine has failed", exc_info=error)
            self._end(EngineDeadError(f"the engine has failed: {type(error).__name__}: {error}"))
        else:
            self._end(EngineStoppedError("the engine has shut down"))

    def _run_commands(self, wait: bool) -> None:
        """Run everything in the queue; `wait` for a first command where there is nothing else to do."""
        while not self._stopping:
            try:
                command, future = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            self._step_began = self._step_began or time.monotonic()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command())
                except Exception as error:
                    if not isinstance(error, (ConfigError, EngineUnavailableError)):
                        logger.error("a command has failed", exc_info=error)
                    future.set_exception(error)

    def _add(self, streams: list[OutputStream], params: SchedulingParams | None) -> None:
        engine = self._engine
        self._check_accepting()
        check_room(streams, self._streams.values(), engine.scheduler.queues.max_num_seqs, self.max_queued_requests)
        for stream in streams:
            engine.check_request(stream.request, params)
        for stream in streams:
            engine.add_request(stream.request, params)
            self._streams[stream.request.request_id] = stream

    def _abort(self, request_id: str, reason: str | None = None) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            for sequence in stream.request.sequences:
                if not sequence.is_finished:
                    sequence.stop_reason = reason
            self._engine.abort_request(request_id)
            self._deliver(self._engine.output_processor.make_output(stream.request))

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        if output.finished:
            del self._streams[output.request_id]
        try:
            stream.put(output)
        except RuntimeError:                # the consumer's event loop is closed: nobody will ever read this
            if self._streams.pop(output.request_id, None) is not None:
                self._engine.abort_request(output.request_id)

    def _stop(self) -> None:
        for request_id in list(self._streams):
            self._abort(request_id, SHUTDOWN)
        self._stopping = True

    def _end(self, error: EngineUnavailableError) -> None:
        """Nothing runs any more: tell everybody who waits."""
        with self._gate:
            self._ended = error
        while not self._commands.empty():
            _, future = self._commands.get()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for stream in list(self._streams.values()):
            try:
                stream.put(error)
            except RuntimeError:
                logger.info("request %s has no consumer any more", stream.request.request_id)
        self._streams.clear()
