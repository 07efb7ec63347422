"""The same engine on a GPU. Run with `make gpu-check`; deselected elsewhere."""
import pytest
import torch

from m0_basics import SamplingParams
from m0_basics.tools.testing.tiny_models import save_tiny_model
from m2_continuous_batching import LLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

PROMPTS = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 7, 40, 23, 12, 3, 30, 18, 9, 26)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def tokens(llm, params=GREEDY):
    return [[o.token_ids for o in output.outputs] for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize("options", [{}, {"attention_backend": "naive"}, {"async_scheduling": True},
                                     {"max_num_seqs": 3, "policy": "round-robin:5"}])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_gpu_tokens_equal_cpu_tokens(tmp_path, family, options):
    """F2.3, F2.6: in float32 the device changes no greedy token."""
    folder = str(save_tiny_model(tmp_path / family, family))
    base = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
    expected = tokens(LLM(folder, device="cpu", **base))
    assert tokens(LLM(folder, device="cuda", **base, **options)) == expected


def test_sampling_on_the_gpu_is_reproducible(tmp_path):
    """F1.3: n samples of a seed are the same in two runs, with rows for all of them or for a few."""
    folder = str(save_tiny_model(tmp_path / "qwen3", "qwen3"))
    params = SamplingParams(n=4, seed=7, temperature=1.5, top_p=0.95, max_tokens=16, ignore_eos=True)
    base = {"device": "cuda", "dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
    assert tokens(LLM(folder, **base), params) == tokens(LLM(folder, max_num_seqs=5, **base), params)
