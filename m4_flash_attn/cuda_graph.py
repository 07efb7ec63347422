"""CUDA graphs for decode: a step's launches are recorded once and replayed by a single call.

    eager   CPU  launch launch launch launch ...      GPU  kernel .. kernel .. kernel .. kernel
    graph   CPU  replay                               GPU  kernel kernel kernel kernel

A decode step is hundreds of kernels of some microseconds each, about as long as it takes to launch one. A recording
holds addresses and grids, so the inputs are copied to buffers that stay where they are, and there is a recording for
each of several batch sizes. A batch between two sizes is padded with rows that store nothing (slot -1) and see nothing
(length 0).

B sequences in the step, which is as many tokens.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m0_basics.model_runner import ModelInputs, ModelRunner, Runner

from .config import EngineConfig
from .metadata import FlashMetadata

Run = Callable[[], None]
_STEP = 16
_WARM_UPS = 2           # kernels are compiled, and libraries allocate what they keep, before anything is recorded


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes with a recording: 1, 2, 4, 8, then every 16, and the largest batch there can be."""
    sizes = {1, 2, 4, 8, *range(_STEP, max_num_seqs, _STEP)}
    return [*sorted(size for size in sizes if size < max_num_seqs), max_num_seqs]


class DecodeBuffers:
    """Inputs and output of the recordings: tensors whose addresses never change. At first every row is padding."""

    def __init__(self, max_num_seqs: int, block_size: int, max_model_len: int, vocab_size: int,
                 device: torch.device) -> None:
        self.block_size, self.max_model_len = block_size, max_model_len

        def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.input_ids = filled(0, max_num_seqs, dtype=torch.int64)
        self.positions = filled(0, max_num_seqs, dtype=torch.int64)
        self.seq_lens = filled(0, max_num_seqs)
        self.slot_mapping = filled(-1, max_num_seqs)
        self.block_table = filled(-1, max_num_seqs, -(-max_model_len // block_size))
        self.query_starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.logits = filled(0, max_num_seqs, vocab_size, dtype=torch.float32)

    def metadata(self, size: int) -> FlashMetadata:
        """For a recording of `size` rows: views of the buffers, and the longest that a sequence can ever be."""
        return FlashMetadata(list(range(size + 1)), self.seq_lens[:size], self.block_table[:size],
                             self.slot_mapping[:size], 1, self.query_starts[:size + 1], self.block_size,
                             self.max_model_len, size)

    def fill(self, inputs: ModelInputs, size: int) -> None:
        """Copy a step of B <= size decodes to the first B rows; rows B to size - 1 become padding.

        Ids and positions of padding are what an earlier step left there: valid numbers, whatever they are.
        """
        metadata, count = inputs.metadata, len(inputs.scheduled)
        assert isinstance(metadata, FlashMetadata)
        self.input_ids[:count] = inputs.input_ids
        self.positions[:count] = inputs.positions
        self.seq_lens[:count] = metadata.seq_lens
        self.slot_mapping[:count] = metadata.slot_mapping
        self.block_table[:count, :metadata.block_table.shape[1]] = metadata.block_table
        if count < size:
            self.seq_lens[count:size] = 0
            self.slot_mapping[count:size] = -1


class CudaCapture:
    """Records launches on the current GPU. All recordings share one pool of memory: only one of them ever runs."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Run and record `run`; returns what replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):         # not the default one: nothing may be recorded there
            for _ in range(_WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph.replay


class GraphRunner(Runner):
    """Replays a recording where a step consists of decodes alone; all other steps go to the runner it is put around.

    The attention backend takes `FlashMetadata`, stores nothing for slot -1 and reads no length on the host.
    """

    def __init__(self, runner: ModelRunner, block_size: int, max_num_seqs: int, max_model_len: int,
                 capture: Callable[[Run], Run] | None = None) -> None:
        """Records all sizes at once. `capture` makes the recordings: CUDA graphs, where it is None."""
        self.runner, self.model, self.backend = runner, runner.model, runner.backend
        self.sizes = graph_sizes(max_num_seqs)
        self.buffers = DecodeBuffers(max_num_seqs, block_size, max_model_len, self.model.spec.vocab_size,
                                     self.model.device)
        capture = CudaCapture() if capture is None else capture
        # The largest first: the others find all the memory that they need in its pool.
        self._replays = {size: self._record(size, capture) for size in reversed(self.sizes)}

    def prepare_inputs(self, scheduled: list[ScheduledSequence]) -> ModelInputs:
        return self.runner.prepare_inputs(scheduled)

    def execute_model(self, scheduled: list[ScheduledSequence]) -> Tensor:
        return self.execute(self.prepare_inputs(scheduled))

    @torch.inference_mode()
    def execute(self, inputs: ModelInputs) -> Tensor:
        """Logits [R, vocab] of prepared inputs; of a replayed step, the first rows of the buffer."""
        if not self.fits(inputs):
            return self.runner.execute(inputs)
        size = self.sizes[bisect_left(self.sizes, len(inputs.scheduled))]
        self.buffers.fill(inputs, size)
        self._replays[size]()
        return self.buffers.logits[:len(inputs.scheduled)]

    def fits(self, inputs: ModelInputs) -> bool:
        """Whether the step is one new token per sequence, each the newest, and nothing but logits is asked for."""
        metadata, num_sequences = inputs.metadata, len(inputs.scheduled)
        return (isinstance(metadata, FlashMetadata) and metadata.max_query_len == 1
                and num_sequences <= self.sizes[-1] and len(inputs.sampled) == num_sequences
                and all(s.sequence.sampling_params.prompt_logprobs is None for s in inputs.scheduled))

    @torch.inference_mode()
    def _record(self, size: int, capture: Callable[[Run], Run]) -> Run:
        buffers, metadata = self.buffers, self.buffers.metadata(size)

        def run() -> None:
            hidden = self.model(buffers.input_ids[:size], buffers.positions[:size], self.backend, metadata)
            # Into a buffer that all sizes share: a tensor of its own for each would hold on to the pool's memory.
            buffers.logits[:size] = self.model.compute_logits(hidden)

        return capture(run)


def with_graphs(runner: ModelRunner, config: EngineConfig) -> Runner:
    """The runner with recordings of its decode steps, where the model is on a GPU."""
    if runner.model.device.type != "cuda":
        return runner
    limits = config.scheduler_config
    return GraphRunner(runner, config.cache_config.block_size, limits.max_num_seqs, limits.longest)
