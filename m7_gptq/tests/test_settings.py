"""The settings of packed folders: what is read, what is refused, and that one error says why."""
import json

import pytest

from m0_basics.config import ConfigError
from m0_basics.loading.files import LoadError
from m7_gptq.loading.settings import GPTQSettings, parse_settings, read_settings, tied_meta


def folder(path, quantize_config=None, in_config=None):
    (path / "config.json").write_text(json.dumps({} if in_config is None else {"quantization_config": in_config}))
    if quantize_config is not None:
        (path / "quantize_config.json").write_text(json.dumps(quantize_config))
    return path


def test_autogptqs_file(tmp_path):
    """As AutoGPTQ 0.7 wrote it: no format, no method."""
    settings = read_settings(folder(tmp_path, {
        "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": True, "static_groups": False, "sym": False,
        "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}))
    assert settings == GPTQSettings(4, 128, desc_act=True, sym=False, damp_percent=0.01)
    assert settings.version == 1 and settings.middle == 8 and settings.groups(512) == 4


def test_gptqmodels_settings_in_config_json(tmp_path):
    settings = read_settings(folder(tmp_path, in_config={
        "bits": 8, "checkpoint_format": "gptq_v2", "desc_act": False, "dynamic": {"-:.*lm_head": {}}, "group_size": -1,
        "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.6.0"]}, "pack_dtype": "int32", "quant_method": "gptq",
        "sym": True, "true_sequential": True}))
    assert settings.version == 2 and settings.sym and settings.groups(512) == 1 and settings.middle == 128
    assert settings.meta == {"quantizer": ["gptqmodel:7.6.0"]} and not settings.tied


def test_what_is_missing_has_autogptqs_value(tmp_path):
    assert read_settings(folder(tmp_path, {"bits": 4})) == GPTQSettings(4, 128, sym=True)


def test_the_form_under_its_other_name(tmp_path):
    assert read_settings(folder(tmp_path, {"bits": 4, "format": "gptq_v2"})).version == 2


def test_written_and_read_again(tmp_path):
    settings = GPTQSettings(3, 32, True, True, "gptq_v2", True, False, True, 0.05, tied_meta({"quantizer": ["a:1"]}))
    assert settings.tied
    assert read_settings(folder(tmp_path, settings.to_dict(), settings.to_dict())) == settings


@pytest.mark.parametrize(("data", "message"), [
    ({"group_size": 64}, r"does not say bits; allowed: 2, 3, 4, 8"),
    ({"bits": 5}, r"bits=5 is not valid; allowed: 2, 3, 4, 8"),
    ({"bits": "4"}, r"bits='4' is not valid"),
    ({"bits": True}, r"bits=True is not valid"),
    ({"bits": [4]}, r"bits=\[4\] is not valid"),
    ({"bits": 4, "group_size": 0}, r"group_size=0 is not valid; allowed: an integer >= 1, or -1"),
    ({"bits": 4, "group_size": -2}, r"group_size=-2"),
    ({"bits": 4, "group_size": 64.0}, r"group_size=64.0"),
    ({"bits": 4, "desc_act": "yes"}, r"desc_act='yes' is not valid; allowed: true, false"),
    ({"bits": 4, "sym": 1}, r"sym=1 is not valid"),
    ({"bits": 4, "damp_percent": 2}, r"damp_percent=2 is not valid"),
    ({"bits": 4, "meta": [1]}, r"meta=\[1\] is not valid"),
    ({"bits": 4, "checkpoint_format": "marlin"}, r"checkpoint_format='marlin' is not valid; allowed: gptq, gptq_v2"),
    ({"bits": 4, "checkpoint_format": ["gptq"]}, r"checkpoint_format=\['gptq'\]"),
    ({"bits": 4, "quant_method": "awq"}, r"quant_method='awq' of .* is not supported; allowed: gptq"),
    ({"bits": 4, "pack_dtype": "int64"}, r"pack_dtype='int64' of .* allowed: int32"),
    ({"bits": 4, "is_marlin_format": True}, r"is_marlin_format"),
    ({"bits": 4, "rotation": "hadamard"}, r"rotation='hadamard' of .* changes what a layer computes"),
    ({"bits": 4, "adapter": {"name": "lora"}}, r"adapter="),
    ({"bits": 4, "activation": "w4afp8"}, r"activation="),
    ({"bits": 4, "dynamic": {"+:.*down_proj": {"bits": 8}}}, r"dynamic of .* '\+:\.\*down_proj' in a way of their own"),
    ({"bits": 4, "dynamic": {".*down_proj": {"group_size": 32}}}, r"dynamic of"),
    ({"bits": 4, "dynamic": [1]}, r"dynamic=\[1\]"),
])
def test_one_error_names_what_is_wrong(tmp_path, data, message):
    with pytest.raises(LoadError, match=message):
        parse_settings(data, tmp_path / "quantize_config.json")


def test_what_does_not_change_a_layer_is_let_be(tmp_path):
    settings = parse_settings({"bits": 4, "dynamic": {"-:.*mlp.*": {}}, "act_group_aware": True, "mse": 2.4,
                               "rotation": None, "adapter": None, "modules_in_block_to_quantize": [["q_proj"]]},
                              tmp_path)
    assert settings == GPTQSettings(4, 128, sym=True)


def test_two_files_that_contradict(tmp_path):
    with pytest.raises(LoadError, match=r"group_size of .* is 64 in config.json and 128 in quantize_config.json"):
        read_settings(folder(tmp_path, {"bits": 4, "group_size": 128}, {"bits": 4, "group_size": 64}))


def test_no_settings_and_no_object(tmp_path):
    with pytest.raises(LoadError, match=r"has no settings of packed weights; allowed: quantize_config.json"):
        read_settings(folder(tmp_path))
    with pytest.raises(LoadError, match=r"quantization_config of .* does not hold a JSON object"):
        read_settings(folder(tmp_path, in_config=["gptq"]))


def test_settings_of_ones_own_are_checked_too():
    with pytest.raises(ConfigError, match="bits=6"):
        GPTQSettings(bits=6)
