"""Folders that GPTQModel wrote, read bit for bit; and the tool that compares with a GPTQModel that is installed."""
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m0_basics.config import ConfigError
from m0_basics.loading.weights import SafetensorsFolder
from m0_basics.sampling_params import SamplingParams
from m7_gptq import LLM
from m7_gptq.loading.checkpoint import read_matrix
from m7_gptq.loading.settings import read_settings
from m7_gptq.tools.interop import FIXTURES, RESULTS, VALUES, Form, all_forms, run, table

FOLDERS = Path(__file__).parent / "gptqmodel_folders"
NAMES = [name.removeprefix("gptqmodel-") for name in FIXTURES]


@pytest.mark.parametrize("name", NAMES)
def test_gptqmodels_folders_bit_for_bit(name):
    """Its kernel multiplies in float16; ours is exact, and rounds to the same."""
    folder = FOLDERS / name
    settings, source, values = read_settings(folder), SafetensorsFolder(folder), load_file(str(folder / VALUES))
    assert len(values) == 7
    zeros_of_0 = 0
    for key, theirs in values.items():
        matrix = read_matrix(source, key.removesuffix(".half"), settings)
        assert theirs.dtype is torch.float16 and torch.equal(matrix.dequantise().half(), theirs), key
        assert matrix.group_size == 16 and matrix.bits == int(name.split("-")[1][0])
        zeros_of_0 += int((matrix.zeros == 0).sum())
    assert (zeros_of_0 > 100) == ("asym" in name) == (not settings.sym)
    assert ("order" in name) == (read_matrix(source, "model.layers.0.mlp.down_proj", settings).order is not None)
    assert settings.version == (2 if name.endswith("v2") else 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_runs_them_as_transformers_runs_gptqmodels_weights(name):
    import transformers
    folder = FOLDERS / name
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float().eval()
    plain = {key: tensor.float() for key, tensor in load_file(str(folder / "model.safetensors")).items()
             if key.rpartition(".")[2] in ("weight", "bias")}
    values = load_file(str(folder / VALUES))
    plain |= {key.replace(".half", ".weight"): tensor.float() for key, tensor in values.items()}
    plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
    theirs.load_state_dict(plain)
    prompt = list(range(40, 70))
    with torch.no_grad():
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    llm = LLM(model=str(folder), dtype="float32", activations="exact", max_model_len=64, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == wanted[0, len(prompt):].tolist()


# --- the tool ------------------------------------------------------------------------------------------------------

def test_the_forms_cover_the_format():
    forms = all_forms()
    assert len({form.name for form in forms}) == len(forms) and set(FIXTURES) <= {form.name for form in forms}
    for writer in ("gptqmodel", "lab"):
        found = {(f.bits, f.sym, f.desc_act, f.checkpoint_format) for f in forms if f.writer == writer}
        for bits in (4, 8):
            for sym in (True, False):
                for desc_act in (True, False):
                    formats = {form for b, s, d, form in found if (b, s, d) == (bits, sym, desc_act)}
                    assert formats == ({"gptq", "gptq_v2"} if sym or writer == "gptqmodel" else {"gptq_v2"})
        assert {2, 3} < {f.bits for f in forms if f.writer == writer}


def test_the_stored_results_are_of_these_forms():
    stored = json.loads(RESULTS.read_text())
    assert [Form(**one["form"]) for one in stored["forms"]] == all_forms()
    assert all(one["equal"] and one["error"] is None and one["num_weights"] > 0 for one in stored["forms"])
    assert stored["gptqmodel"].startswith("7.")
    for one in stored["forms"]:
        assert (one["zero_points_of_0"] > 100) == (not one["form"]["sym"])


def test_an_interpreter_without_gptqmodel(tmp_path):
    """Each form says so, and none counts as equal."""
    forms = [Form("gptqmodel", "llama", 4, True, False, "gptq"), Form("lab", "llama", 4, True, False, "gptq")]
    found = run(Path(sys.executable), forms, tmp_path)
    assert [one.form for one in found] == forms and not any(one.equal for one in found)
    assert all("No module named 'gptqmodel'" in (one.error or "") for one in found)
    assert table(found).row_count == 2


@pytest.mark.parametrize(("python", "message"), [
    ("/nowhere/python", r"gptqmodel_python='/nowhere/python' cannot be run: No such file"),
    ("/bin/false", r"gptqmodel_python='/bin/false' did not finish: no message; allowed: a Python with gptqmodel"),
])
def test_no_interpreter(tmp_path, python, message):
    with pytest.raises(ConfigError, match=message):
        run(Path(python), [Form("lab", "llama", 4, True, False, "gptq")], tmp_path)
