"""F7.1, F7.2: m7 behaves as every engine of this repository does, on packed weights and on plain ones.

The reference is transformers on the dequantised weights: in float32, with activations as they are, greedy tokens are
the same. The models are random, so nothing hides behind a likely next word.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from m0_basics.base_llm import BaseLLM
from m0_basics.tools.testing.bad_input_conformance import BadInputConformance
from m0_basics.tools.testing.conformance import (
    PROMPTS,
    AbortConformance,
    Conformance,
    GreedyConformance,
    StopConformance,
    StreamingConformance,
    ids_of,
)
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.sampling_conformance import SamplingConformance
from m0_basics.tools.testing.tiny_models import FAMILIES_UNDER_TEST
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m7_gptq import LLM

from .packed_models import PackedModel, pack_gguf, pack_gptq, use_cache

ROOM: dict[str, Any] = {"max_model_len": 512, "block_size": 8, "num_blocks": 256}
TINY: dict[str, Any] = {"max_model_len": 96, "num_blocks": 13}


class PackedConformance(Conformance):
    """Over packed forms of the tiny models; what transformers sees is their plain twin."""

    llm_class = LLM
    packing: ClassVar[dict[str, Any]] = {}              # of `pack_gptq`; a file where "kind" is named

    @pytest.fixture(autouse=True)
    def _provide_models(self, tiny_model: TinyModels, packed_models: dict[Any, PackedModel],
                        tmp_path_factory: pytest.TempPathFactory) -> None:
        def get(variant: str) -> PackedModel:
            key = (variant, *sorted(self.packing.items()))
            if key not in packed_models:
                make = pack_gguf if "kind" in self.packing else pack_gptq
                packed_models[key] = make(tmp_path_factory.mktemp("packed") / variant, tiny_model(variant),
                                          **self.packing)
            return packed_models[key]

        self.packed = get
        self.tiny_model = lambda variant: get(variant).plain

    def make(self, variant: str = "qwen3", **options: Any) -> BaseLLM:
        return LLM(str(self.packed(variant).packed), **{"dtype": "float32", **self.options, **options})


@pytest.fixture(scope="session")
def packed_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Any, PackedModel]]:
    """What has been packed so far, and a cache folder for the settings of files."""
    with pytest.MonkeyPatch.context() as patch:
        use_cache(tmp_path_factory.mktemp("cache") / "own", patch)
        yield {}


class TestFourBits(PackedConformance, GreedyConformance, StopConformance, StreamingConformance, AbortConformance,
                   SamplingConformance, BadInputConformance):
    """The whole suite, with budgets that cut every prompt, in the order of activations. Tiny memory: swapped."""

    packing: ClassVar = {"bits": 4, "desc_act": True}
    options: ClassVar = {**ROOM, "max_num_batched_tokens": 7}
    tiny_memory_options: ClassVar = TINY

    @pytest.mark.parametrize("settings", [{"swap_space": 0}, {}, {"async_scheduling": True},
                                          {"enable_prefix_caching": False}],
                             ids=["recomputed", "swapped", "prepared ahead", "nothing cached"])
    def test_preempted_sequences(self, settings: dict[str, Any]) -> None:
        collector = MetricsCollector()
        llm = self.make(plugins=[collector], **self.tiny_memory_options, **settings)
        for _ in range(2):                                  # the second time much of it is known
            assert_same_tokens(ids_of(self.run(llm, PROMPTS)), self.reference(PROMPTS))
        assert collector.totals.num_preemptions > 0


class TestEightBits(PackedConformance, GreedyConformance):
    """Format 2, symmetric; steps are chosen ahead."""

    packing: ClassVar = {"bits": 8, "sym": True, "version": 2}
    options: ClassVar = {**ROOM, "async_scheduling": True}
    tiny_memory_options: ClassVar = {**TINY, "swap_space": 0}


class TestFile(PackedConformance, GreedyConformance):
    """GGUF's blocks with minimums; guesses ahead."""

    several_tokens_a_step = True
    packing: ClassVar = {"kind": "Q4_1"}
    options: ClassVar = {**ROOM, "speculative_method": "suffix", "adaptive_drafts": False}
    tiny_memory_options: ClassVar = TINY

    @pytest.mark.parametrize("variant", [name for name in FAMILIES_UNDER_TEST if name != "llama3_rope"])
    def test_tokens_equal_transformers(self, variant: str) -> None:
        """Scaled rotary tables are the settings' business, and tested with milestone 0's reader."""
        super().test_tokens_equal_transformers(variant)


class TestSelfDraft(PackedConformance, GreedyConformance, StopConformance):
    """The packed weights draft, and their values check."""

    several_tokens_a_step = True
    packing: ClassVar = {"bits": 4, "group_size": 32}
    options: ClassVar = {**ROOM, "speculative_method": "self", "adaptive_drafts": False, "num_speculative_tokens": 4}
    tiny_memory_options: ClassVar = TINY


class TestPlain(GreedyConformance, AbortConformance):
    """A model whose weights are not packed runs as it does in m6."""

    llm_class = LLM
    options: ClassVar = {**ROOM, "max_num_batched_tokens": 7}
    tiny_memory_options: ClassVar = TINY


class TestReadable(PackedConformance, GreedyConformance):
    """No kernels: milestone 0's layers, dequantised at each use."""

    packing: ClassVar = {"bits": 3, "group_size": 16}
    options: ClassVar = {**ROOM, "fused_layers": False, "attention_backend": "sdpa"}
    tiny_memory_options: ClassVar = TINY


def test_the_plain_twin_is_another_model(tiny_model: TinyModels, tmp_path: Path) -> None:
    """Were rounding to lose nothing, the suite above would show nothing."""
    from m0_basics.tools.testing.parity import reference_greedy
    model = pack_gptq(tmp_path / "m", tiny_model("qwen3"))
    assert reference_greedy(model.plain, PROMPTS, 16) != reference_greedy(tiny_model("qwen3"), PROMPTS, 16)
