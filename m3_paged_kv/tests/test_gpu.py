"""The same engine on a GPU. Run with `make gpu-check`; deselected elsewhere."""
import pytest
import torch

from m0_basics import SamplingParams
from m0_basics.testing.tiny_models import save_tiny_model
from m3_paged_kv import LLM

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
