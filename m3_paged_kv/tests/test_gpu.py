"""The same engine on a GPU. Run with `make gpu-check`; deselected elsewhere."""
import pytest
import torch

from m0_basics import SamplingParams
from m0_basics.tools.testing.tiny_models import save_tiny_model
from m3_paged_kv import LLM
from m3_paged_kv.swap import PinnedHostCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

PROMPTS = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 7, 40, 23, 12, 3, 30, 18, 9, 26)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def tokens(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("options", [{}, {"num_blocks": 9}, {"num_blocks": 9, "swap_space": 0},
                                     {"async_scheduling": True, "num_blocks": 20}])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_gpu_tokens_equal_cpu_tokens(tmp_path, family, options):
    """F3.3, F3.6, F3.8: swapped to pinned memory or recomputed, in float32 no greedy token changes."""
    folder = str(save_tiny_model(tmp_path / family, family))
    base = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
    expected = tokens(LLM(folder, device="cpu", num_blocks=256, **base))
    assert tokens(LLM(folder, device="cuda", **{"num_blocks": 256, **base, **options})) == expected


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_many_swaps_on_a_stream_of_their_own(tmp_path, monkeypatch, async_scheduling):
    """F3.6: round robin sends everybody out and in every few tokens; no token differs from an unlimited pool's."""
    folder = str(save_tiny_model(tmp_path / "qwen3", "qwen3"))
    base = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, "device": "cuda", "block_size": 4}
    seen = {"_swap_out": [], "_swap_in": []}

    def watch(name):
        """Which stream is current while the blocks are staged, and how many go."""
        original = getattr(PinnedHostCache, name)

        def watched(self, ids, runs):
            staging = self._staging

            def stage(n):
                seen[name].append((torch.cuda.current_stream(), n))
                return staging(n)

            with monkeypatch.context() as patch:
                patch.setattr(self, "_staging", stage)
                original(self, ids, runs)

        monkeypatch.setattr(PinnedHostCache, name, watched)

    watch("_swap_out")
    watch("_swap_in")
    expected = tokens(LLM(folder, num_blocks=1024, **base))
    assert seen == {"_swap_out": [], "_swap_in": []}, "an unlimited pool sends nobody out"
    llm = LLM(folder, num_blocks=40, max_num_seqs=4, policy="round-robin:2", async_scheduling=async_scheduling, **base)
    for _ in range(3):                      # again, into blocks and host memory that were used before
        assert tokens(llm) == expected
    for name, batches in seen.items():
        assert sum(n for _, n in batches) > 100, f"{name} was hardly used"
        assert all(stream != torch.cuda.default_stream() for stream, _ in batches)
    assert (llm.manager.usage, llm.manager.swapped.host_pool.num_used) == (0.0, 0)
