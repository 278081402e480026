"""FlashAttention on a GPU is asked for what attention written out gives, by either of its interfaces. Neither has a CPU
kernel: stand-ins with their rules compute; PyTorch's own signature is checked on the device "meta"."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from r1engine.model.layers import flash

LENGTHS = {"as many keys": ([5, 1, 9], [5, 1, 9]), "more keys than queries": ([2, 1, 4], [7, 1, 9])}
SCALE = 0.3


def inputs(lengths, size: int, device: str = "cpu", dtype=torch.float64):
    """Arguments of flash_attention: four heads of queries, two of keys and values."""
    random = torch.Generator().manual_seed(1)
    counts, heads = (sum(lengths[0]), sum(lengths[1]), sum(lengths[1])), (4, 2, 2)
    rows = (torch.randn(n, h, size, generator=random, dtype=dtype) for n, h in zip(counts, heads, strict=True))
    borders = (torch.tensor([0, *itertools.accumulate(part)], dtype=torch.int32) for part in lengths)
    tensors = [x.to(device) for x in rows], tuple(x.to(device) for x in borders)
    return (*tensors[0], tensors[1], (max(lengths[0]), max(lengths[1])))


def written_out(q, k, v, cu_q, cu_k, scale):
    """The causal mask ends in the bottom right corner."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        scores = scale * torch.einsum("qhd,khd->hqk", q[a:b], k[c:d])
        is_later = torch.arange(c, d)[None, :] - d > torch.arange(a, b)[:, None] - b
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(is_later, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(outputs)


def of_flash_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, *, softmax_scale, causal, deterministic):
    assert causal and deterministic == torch.are_deterministic_algorithms_enabled()
    assert (cu_q.diff().max(), cu_k.diff().max()) == (longest_q, longest_k)
    return written_out(q, k, v, cu_q, cu_k, softmax_scale)


def of_torch(q, k, v, cu_q, cu_k, longest_q, longest_k, *, scale, window_size, enable_gqa=False):
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert window_size == (-1, 0)
    return written_out(q, k, v, cu_q, cu_k, scale)


def of_torch_2_11(q, k, v, cu_q, cu_k, longest_q, longest_k, *, scale, window_size):
    return of_torch(q, k, v, cu_q, cu_k, longest_q, longest_k, scale=scale, window_size=window_size)


@pytest.fixture(autouse=True)
def _forgotten():
    flash.flash_attn.cache_clear()
    yield
    flash.flash_attn.cache_clear()


@pytest.fixture(params=["flash-attn", "torch", "torch 2.11"])
def _interface(request, monkeypatch):
    if request.param == "flash-attn":
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=of_flash_attn))
    else:
        monkeypatch.setattr(flash, "varlen_attn", of_torch if request.param == "torch" else of_torch_2_11)


@pytest.mark.usefixtures("_interface")
@pytest.mark.parametrize("size", [8, 12])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_interface_is_asked_for_the_same(lengths, size, deterministic):
    q, k, v, borders, longest = inputs(lengths, size)
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = flash.flash_attention(q, k, v, borders, longest, scale=SCALE)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, written_out(q, k, v, *borders, SCALE))


@pytest.mark.parametrize("size", [64, 12])
def test_pytorchs_own_takes_the_call(size):
    arguments = inputs(LENGTHS["more keys than queries"], size, "meta", torch.bfloat16)
    assert flash.flash_attention(*arguments, scale=SCALE).shape == (7, 4, size)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("raise OSError('libcudart.so.12: no such file')", r"OSError: libcudart\.so\.12: no such file"),
        ("raise RuntimeError('built for another CUDA')", "RuntimeError: built for another CUDA"),
        ("import einops_that_is_missing", "ModuleNotFoundError: No module named 'einops_that_is_missing'"),
        ("__version__ = '1.0'", "ImportError: cannot import name 'flash_attn_varlen_func'"),
    ],
)
def test_a_flash_attn_that_does_not_load_is_named(tmp_path, monkeypatch, source, reason):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(f"{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    for ask in (flash.choice, lambda: flash.flash_attention(*inputs(LENGTHS["as many keys"], 8), scale=SCALE)):
        with pytest.raises(RuntimeError, match=rf"does not load \({reason}.*\); required is one built for"):
            ask()
    sys.modules.pop("flash_attn", None)
