"""Packed layers from a checkpoint: read exactly, and one clear error for each way in which they do not fit."""
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m0_basics.loading.files import LoadError
from m0_basics.loading.weights import SafetensorsFolder, WeightSource
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.loading.checkpoint import PackedLabelWarning, is_packed, read_bias, read_matrix
from m7_gptq.loading.pack import pack_matrix
from m7_gptq.loading.settings import GPTQSettings

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


class Tensors(WeightSource):
    """A checkpoint in memory."""

    def __init__(self, tensors):
        self.location, self.tensors = Path("folder"), tensors

    def names(self):
        return self.tensors.keys()

    def read(self, name):
        if name not in self.tensors:
            raise LoadError(f"{self.location} lacks the tensor {name}")
        return self.tensors[name]


def matrix_of(bits=4, outputs=32, inputs=64, groups=2, sym=False, order=None, seed=0):
    """A weight around 0, rounded to its grid."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, groups, inputs // groups, generator=generator)
    scales = (weight.abs().amax(2) / 2 ** (bits - 1)).half().float()
    zeros = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros += torch.randint(-1, 2, zeros.shape, generator=generator).to(torch.uint8)
    codes = (weight / scales.unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, 2 ** bits - 1).to(torch.uint8)
    return QuantizedMatrix(codes.view(outputs, inputs), scales, bits, zeros, order=order)


def checkpoint(settings, **matrices):
    names = {"q": Q, "k": K, "v": V}
    return Tensors({name: tensor for key, matrix in matrices.items()
                    for name, tensor in pack_matrix(matrix, settings.version).tensors(names[key]).items()})


ASYMMETRIC = GPTQSettings(bits=4, group_size=32, sym=False)


def test_a_layer_read_back():
    matrix = matrix_of()
    source = checkpoint(ASYMMETRIC, q=matrix)
    assert is_packed(source, Q) and not is_packed(source, K)
    back = read_matrix(source, Q, ASYMMETRIC)
    assert torch.equal(back.dequantise(), matrix.dequantise()) and back.bits == 4


def test_one_group_of_all_inputs():
    settings = GPTQSettings(bits=4, group_size=-1, sym=False)
    matrix = matrix_of(groups=1)
    assert torch.equal(read_matrix(checkpoint(settings, q=matrix), Q, settings).dequantise(), matrix.dequantise())


def test_shards(tmp_path):
    """The tensors of one layer in two files."""
    matrix = matrix_of()
    tensors = pack_matrix(matrix).tensors(Q)
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, str(tmp_path / file))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    back = read_matrix(SafetensorsFolder(tmp_path), Q, ASYMMETRIC)
    assert torch.equal(back.dequantise(), matrix.dequantise())


@pytest.mark.parametrize("name", ["qzeros", "scales"])
def test_missing_tensors(name):
    source = checkpoint(ASYMMETRIC, q=matrix_of())
    del source.tensors[f"{Q}.{name}"]
    with pytest.raises(LoadError, match=f"lacks the tensor {Q}.{name}"):
        read_matrix(source, Q, ASYMMETRIC)


def test_a_plain_layer_is_none_and_half_a_packed_one_an_error():
    source = checkpoint(ASYMMETRIC, q=matrix_of())
    assert read_matrix(source, K, ASYMMETRIC) is None
    del source.tensors[f"{Q}.qweight"]
    with pytest.raises(LoadError, match=f"lacks the tensor {Q}.qweight, and holds {Q}.qzeros"):
        read_matrix(source, Q, ASYMMETRIC)


def test_a_missing_g_idx_is_the_trivial_one():
    matrix = matrix_of()
    source = checkpoint(ASYMMETRIC, q=matrix)
    del source.tensors[f"{Q}.g_idx"]
    assert torch.equal(read_matrix(source, Q, ASYMMETRIC).dequantise(), matrix.dequantise())
    with pytest.raises(LoadError, match=r"lacks the tensor .*g_idx, which desc_act=true needs"):
        read_matrix(source, Q, replace(ASYMMETRIC, desc_act=True))


@pytest.mark.parametrize(("name", "tensor", "message"), [
    ("qweight", torch.zeros(8, 32), r"qweight is float32 \(8, 32\); allowed: int32 \[inputs \* bits / 32, outputs\]"),
    ("qweight", torch.zeros(8, dtype=torch.int32), r"qweight is int32 \(8,\)"),
    ("qweight", torch.zeros(6, 32, dtype=torch.int32), r"qweight is int32 \(6, 32\); allowed: 4 bits .* 64 by g_idx"),
    ("qzeros", torch.zeros(2, 3, dtype=torch.int32), r"qzeros is int32 \(2, 3\); allowed: int32 \(2, 4\)"),
    ("qzeros", torch.zeros(2, 4), r"qzeros is float32 \(2, 4\)"),
    ("scales", torch.zeros(3, 32).half(), r"scales is float16 \(3, 32\); allowed: float16 \(2, 32\)"),
    ("scales", torch.zeros(2, 32, dtype=torch.int32), r"scales is int32 \(2, 32\)"),
    ("scales", torch.full((2, 32), torch.inf).half(), r"scales holds a value that is not finite"),
    ("scales", torch.full((2, 32), torch.nan).half(), r"scales holds a value that is not finite"),
    ("g_idx", torch.zeros(64), r"g_idx is float32 \(64,\); allowed: int32 \[inputs\]"),
    ("g_idx", torch.zeros(32, dtype=torch.int32), r"qweight is int32 \(8, 32\); allowed: 4 bits .* 32 by g_idx"),
    ("g_idx", torch.full((64,), 2, dtype=torch.int32), r"g_idx holds values from 2 to 2; allowed: groups 0 to 1"),
    ("g_idx", torch.full((64,), -1, dtype=torch.int32), r"g_idx holds values from -1 to -1"),
    ("g_idx", torch.tensor([0] * 31 + [1] * 33, dtype=torch.int32),
     r"g_idx puts 31 inputs into group 0; allowed: 32 into each group"),
])
def test_tensors_that_do_not_fit(name, tensor, message):
    source = checkpoint(ASYMMETRIC, q=matrix_of())
    source.tensors[f"{Q}.{name}"] = tensor
    with pytest.raises(LoadError, match=message):
        read_matrix(source, Q, ASYMMETRIC)


def test_bits_other_than_the_settings():
    with pytest.raises(LoadError, match=r"qweight is int32 \(8, 32\); allowed: 8 bits of a multiple of 32 inputs"):
        read_matrix(checkpoint(ASYMMETRIC, q=matrix_of()), Q, replace(ASYMMETRIC, bits=8))


def test_a_group_that_does_not_divide():
    with pytest.raises(LoadError, match=r"group_size=48 does not divide the 64 inputs of .*q_proj"):
        read_matrix(checkpoint(ASYMMETRIC, q=matrix_of()), Q, replace(ASYMMETRIC, group_size=48))


# --- biases --------------------------------------------------------------------------------------------------------

def test_biases():
    source = Tensors({f"{Q}.bias": torch.ones(4).half(), f"{K}.bias": torch.zeros(4).half()})
    assert torch.equal(read_bias(source, Q, 4, expected=True), torch.ones(4).half())
    assert read_bias(source, K, 4, expected=False) is None        # AutoGPTQ's zeros
    assert read_bias(source, V, 4, expected=False) is None
    with pytest.raises(LoadError, match=r"q_proj.bias of folder has no place in the model"):
        read_bias(source, Q, 4, expected=False)
    with pytest.raises(LoadError, match=r"lacks the tensor .*v_proj.bias"):
        read_bias(source, V, 4, expected=True)
    with pytest.raises(LoadError, match=r"q_proj.bias is float16 \(4,\); allowed: floating-point \(8,\)"):
        read_bias(source, Q, 8, expected=True)


# --- a label that says one format, over tensors in the other ---------------------------------------------------------

def as_labelled(matrix, stored, label):
    """The matrix stored in one format, read under the label of the other."""
    source = checkpoint(replace(ASYMMETRIC, checkpoint_format=stored), q=matrix)
    settings = replace(ASYMMETRIC, checkpoint_format=label, bits=matrix.bits,
                       sym=bool((matrix.zeros == 2 ** (matrix.bits - 1)).all()))
    return read_matrix(source, Q, settings)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("stored", "label"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_a_symmetric_grid_shows_the_wrong_label_and_is_read_right(stored, label, bits):
    matrix = matrix_of(bits=bits, sym=True)
    with pytest.warns(PackedLabelWarning, match=f"checkpoint_format='{label}' of folder is wrong"):
        back = as_labelled(matrix, stored, label)
    assert torch.equal(back.dequantise(), matrix.dequantise())


@pytest.mark.parametrize(("stored", "label"), [("gptq_v2", "gptq"), ("gptq", "gptq_v2")])
def test_an_asymmetric_grid_only_makes_it_likely(stored, label):
    """It is said, and the label counts: the weights are as it has them, one step off."""
    matrix = matrix_of(outputs=64, inputs=128, groups=4)
    with pytest.warns(PackedLabelWarning, match=f"checkpoint_format='{label}' of folder may be wrong"):
        back = as_labelled(matrix, stored, label)
    step = 1 if stored == "gptq" else -1
    assert torch.equal(back.zeros.to(torch.int16) + step, matrix.zeros.to(torch.int16))


@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
def test_a_right_label_is_not_doubted(stored, sym):
    matrix = matrix_of(outputs=64, inputs=128, groups=4, sym=sym)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(as_labelled(matrix, stored, stored).dequantise(), matrix.dequantise())


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_weights_that_lie_to_one_side_are_not_doubted(label):
    """Half of the rows have no negative weight: on average they lie off 0, but not all by the same step."""
    matrix = matrix_of(outputs=64, inputs=128, groups=4)
    matrix.zeros[::2] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(as_labelled(matrix, label, label).dequantise(), matrix.dequantise())


def test_a_symmetric_folder_with_other_zero_points():
    matrix = matrix_of(sym=True)
    matrix.zeros[3, 1] = 5
    with pytest.raises(LoadError, match=r"qzeros holds zero points from 5 to 8; allowed: 8 everywhere, since sym"):
        read_matrix(checkpoint(ASYMMETRIC, q=matrix), Q, replace(ASYMMETRIC, sym=True))
