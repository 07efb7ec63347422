"""The same engine on a GPU. Run with `make gpu-check`; deselected elsewhere."""
import pytest
import torch

import m0_basics
from m0_basics import SamplingParams
from m0_basics.tools.testing.tiny_models import save_tiny_model
from m1_offline import LLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

PROMPTS = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 7, 40, 23)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def tokens(llm, params=GREEDY):
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [[o.token_ids for o in output.outputs] for output in outputs]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_gpu_tokens_equal_cpu_tokens(tmp_path, family):
    """F0.11, F1.1: in float32 the device changes no greedy token, with or without a cache."""
    folder = str(save_tiny_model(tmp_path / family, family))
    options = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
    expected = tokens(LLM(folder, device="cpu", **options))
    assert tokens(LLM(folder, device="cuda", **options)) == expected
    assert tokens(m0_basics.LLM(folder, device="cuda", **options)) == expected


def test_sampling_on_the_gpu_is_reproducible(tmp_path):
    """F1.3, F1.4: n samples of a seed are the same in two runs, and differ from each other."""
    folder = str(save_tiny_model(tmp_path / "qwen3", "qwen3"))
    llm = LLM(folder, device="cuda", dtype="bfloat16", max_model_len=128, skip_tokenizer_init=True)
    params = SamplingParams(n=4, seed=7, temperature=1.5, top_p=0.95, max_tokens=16, ignore_eos=True)
    first = tokens(llm, params)
    assert first == tokens(llm, params)
    assert all(len({tuple(ids) for ids in outputs}) > 1 for outputs in first)


def test_auto_dtype_follows_the_capability(tmp_path):
    """F0.9: bfloat16 from compute capability 8.0 on, float16 before."""
    folder = str(save_tiny_model(tmp_path / "qwen3", "qwen3"))
    llm = LLM(folder, device="auto", max_model_len=64, skip_tokenizer_init=True)
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert llm.engine.runner.model.dtype is expected
