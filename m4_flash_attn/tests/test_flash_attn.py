"""F4.1: the libraries behind the common signature, with stand-ins of the same signatures, and their absence."""
from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import varlen

from m0_basics.config import ConfigError
from m4_flash_attn.kernels.flash_attn import LibraryError, load_flash_attn, load_torch_varlen
from m4_flash_attn.reference import paged_attention_reference, random_paged_batch
from m4_flash_attn.tests.batches import metadata_of

HOPPER, AMPERE = (9, 0), (8, 0)
MIXED = random_paged_batch([(0, 300), (520, 1), (250, 20), (0, 1)], 4, 2, block_size=256, dtype=torch.bfloat16)
DECODES = random_paged_batch([(300, 1), (0, 1), (520, 1)], 4, 2, block_size=256, dtype=torch.bfloat16)
BATCHES = {"mixed": MIXED, "decodes": DECODES}


def reference(q, k, v, query_starts, seq_lens, table, scale, left) -> torch.Tensor:
    """By the definition, from the arguments that the library was given. `left`: keys seen before the query's own."""
    assert k.shape == v.shape and k.shape[1] == 256 and q.dim() == 3
    assert table.dtype == seq_lens.dtype == torch.int32
    window = None if left in (-1, None) else left + 1
    out = paged_attention_reference(q, k.flatten(0, 1), v.flatten(0, 1), query_starts, seq_lens, table, k.shape[1],
                                    scale, window)
    return out.to(q.dtype)


# The signatures of flash-attn 2.8.3 and of flash-attn-4 4.0.0b36, as far as arguments are used or could be confused.
def varlen_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
             causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
             return_attn_probs=False, block_table=None):
    assert causal and window_size[1] in (-1, 0)
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q > 1 and int(cu_seqlens_k.diff().max()) == max_seqlen_k
    return reference(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, softmax_scale, window_size[0])


def with_kvcache_2(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
                   cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
                   window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
                   return_softmax_lse=False):
    assert causal and window_size[1] in (-1, 0) and k is v is None and q.shape[1] == 1
    starts = range(len(q) + 1)
    return reference(q.squeeze(1), k_cache, v_cache, list(starts), cache_seqlens, block_table, softmax_scale,
                     window_size[0]).unsqueeze(1)


def varlen_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
             min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
             softmax_scale=None, causal=False, window_size=(None, None)):
    assert causal and cu_seqlens_k is None and window_size[1] in (None, 0)
    return reference(q, k, v, cu_seqlens_q, seqused_k, page_table, softmax_scale, window_size[0]), None


def varlen_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                 window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    assert window_size[1] == 0 and enable_gqa and torch.equal(cu_seq_k.diff(), seqused_k)
    assert num_splits == 1              # else rows stay unwritten: pytorch#194167
    assert int(cu_seq_q.diff().max()) == max_q and int(seqused_k.max()) == max_k
    return reference(query, key, value, cu_seq_q, seqused_k, block_table, scale, window_size[0])


def install(monkeypatch, version_2: bool = False, version_4: bool = False) -> None:
    """Put stand-ins, or nothing, in the place of the libraries."""
    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    if version_2:
        package.flash_attn_varlen_func, package.flash_attn_with_kvcache = varlen_2, with_kvcache_2
    cute.flash_attn_varlen_func = varlen_4
    monkeypatch.setitem(sys.modules, "flash_attn", package if version_2 or version_4 else None)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute if version_4 else None)


def check(attend, name: str, window: int | None) -> None:
    batch = BATCHES[name]
    out = attend(batch.q, batch.k_cache, batch.v_cache, metadata_of(batch), batch.scale, window)
    assert out.shape == batch.q.shape
    torch.testing.assert_close(out.double(), batch.expected(window), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("version", [2, 4])
def test_flash_attn(version, batch, window, monkeypatch) -> None:
    """F4.1, F4.6: tables, lengths and windows reach the library as it understands them."""
    install(monkeypatch, version_2=version == 2, version_4=version == 4)
    check(load_flash_attn(torch.bfloat16, 256, HOPPER), batch, window)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("batch", BATCHES)
def test_torch_varlen(batch, window, monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_torch)
    check(load_torch_varlen(torch.bfloat16, 256, AMPERE), batch, window)


@pytest.mark.skipif("block_table" not in inspect.signature(varlen.varlen_attn).parameters, reason="torch before 2.12")
def test_the_stand_in_has_torchs_signature() -> None:
    assert list(inspect.signature(varlen_torch).parameters) == list(inspect.signature(varlen.varlen_attn).parameters)


def test_the_newer_library_takes_over_where_the_older_one_cannot(monkeypatch) -> None:
    """Version 2 wants pages of 256; version 4 takes any, on Hopper."""
    install(monkeypatch, version_2=True, version_4=True)
    assert "_flash_attn_2" in load_flash_attn(torch.bfloat16, 512, HOPPER).__qualname__
    assert "_flash_attn_4" in load_flash_attn(torch.bfloat16, 16, HOPPER).__qualname__
    with pytest.raises(LibraryError, match="block_size=16; set block_size=256"):
        load_flash_attn(torch.bfloat16, 16, AMPERE)


@pytest.mark.parametrize(("load", "dtype", "capability", "message"), [
    (load_flash_attn, torch.bfloat16, HOPPER,
     "the library is not installed; install it with `pip install flash-attn --no-build-isolation` (version 2: it is "
     "compiled, with nvcc) or `pip install flash-attn-4` (Hopper and newer)"),
    (load_flash_attn, torch.bfloat16, (7, 5),
     "it needs a GPU of compute capability 8.0 or newer, and this is 7.5"),
    (load_torch_varlen, torch.float32, HOPPER,
     "it computes in float16 and bfloat16, not in torch.float32; set dtype='bfloat16'"),
])
def test_what_is_missing_is_said_in_one_line(load, dtype, capability, message, monkeypatch) -> None:
    """F4.1: what is missing, and how to get it."""
    install(monkeypatch)
    with pytest.raises(LibraryError) as caught:
        load(dtype, 256, capability)
    assert str(caught.value) == message


@pytest.mark.parametrize(("source", "reason"), [
    ("raise OSError('undefined symbol: f')", "OSError: undefined symbol: f"),
    ("import a_library_that_it_needs", "No module named 'a_library_that_it_needs'")])
def test_a_broken_library_is_not_a_missing_one(source, reason, tmp_path, monkeypatch) -> None:
    """F4.1: built for another torch, or half installed: what it says is passed on."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    with pytest.raises(LibraryError, match=f"^flash_attn is installed and cannot be imported: {reason}$"):
        load_flash_attn(torch.bfloat16, 256, HOPPER)


def test_pages_of_torch(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_torch)
    with pytest.raises(LibraryError, match="block_size=16; set block_size=256"):
        load_torch_varlen(torch.float16, 16, AMPERE)


def test_an_old_torch(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: query)
    with pytest.raises(LibraryError, match=r"has no varlen_attn with a block table; install torch 2.12 or newer$"):
        load_torch_varlen(torch.float16, 256, AMPERE)


def test_sinks_are_refused(monkeypatch) -> None:
    """F4.6: no library knows them; they are not dropped in silence."""
    install(monkeypatch, version_2=True, version_4=True)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_torch)
    for attend in (load_flash_attn(torch.bfloat16, 256, HOPPER), load_flash_attn(torch.bfloat16, 16, HOPPER),
                   load_torch_varlen(torch.bfloat16, 256, HOPPER)):
        with pytest.raises(ConfigError, match="num_sinks=4 is not valid; allowed: 0"):
            attend(MIXED.q, MIXED.k_cache, MIXED.v_cache, metadata_of(MIXED), MIXED.scale, 8, 4)
