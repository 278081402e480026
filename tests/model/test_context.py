"""Attention of the chunks that each context-parallel rank holds, against attention written out in float64.

What the ranks exchange is checked in tests/parallel/test_layouts.py.
"""

import itertools

import pytest
import torch

from r1engine.batch import PackedBatch, RowShape, Sequence, pack
from r1engine.model.layers import attention
from r1engine.model.layers.attention import _chunk_flash, _chunk_sdpa, packed_attention, row_layout
from r1engine.model.layers.context import Share, share_of_row

ROWS = {
    "one long sequence": [96],
    "many short ones": [1, 5, 2, 7, 3, 1, 9, 4, 6, 2, 8, 1, 3, 11],
    "both, with padding": [50, 3, 1, 20, 2],
    "ends at the borders of chunks": [12, 24, 12, 48],
}
SCALE = 0.3


def row_of(lengths: list[int]) -> PackedBatch:
    return pack([Sequence([2] * n, 0, 1.0) for n in lengths], RowShape(max_tokens=96, multiple=16))[0][0]


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: list[int]) -> torch.Tensor:
    """Causal attention of each sequence: a matrix of scores, minus infinity where a key is later, softmax."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    for a, b in itertools.pairwise(borders):
        scores = SCALE * torch.einsum("qhd,khd->hqk", q[a:b], k[a:b])
        is_later = torch.arange(b - a)[None, :] > torch.arange(b - a)[:, None]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(is_later, -torch.inf).softmax(-1), v[a:b]))
    return torch.cat(outputs)


def shares(row: PackedBatch, ranks: int) -> list[Share]:
    return [share_of_row(row.cu_seqlens, rank, ranks, None) for rank in range(ranks)]


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_ranks_together_compute_causal_attention(lengths, ranks):
    row, random = row_of(lengths), torch.Generator().manual_seed(1)
    q, k, v, slope = (
        torch.randn(len(row.tokens), heads, 8, generator=random, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = written_out(*inputs, row.cu_seqlens.tolist())
    found = torch.zeros_like(expected)
    for share in shares(row, ranks):
        layout = row_layout(row, torch.ones(4), torch.float64, share=share)
        found = found.index_add(0, share.index, packed_attention(q[share.index], k, v, layout, scale=SCALE))
    torch.testing.assert_close(found, expected)
    of_ranks, at_once = (torch.autograd.grad((out * slope).sum(), inputs) for out in (found, expected))
    torch.testing.assert_close(of_ranks, at_once)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_token_is_held_once_and_the_causal_work_is_shared_evenly(ranks):
    row = row_of([96])
    held = shares(row, ranks)
    assert sorted(torch.cat([share.index for share in held]).tolist()) == list(range(96))
    assert len({int((share.index + 1).sum()) for share in held}) == 1  # keys that the queries see


def test_a_share_knows_its_sequences():
    row = row_of(ROWS["both, with padding"])
    for share in shares(row, 4):
        layout = row_layout(row, torch.ones(4), torch.float64, share=share)
        counts = torch.bincount(layout.sequence_of_token, minlength=len(row.cu_seqlens) - 1)
        assert layout.held_cu_seqlens.diff().tolist() == counts.tolist()
        assert torch.equal(layout.held(row.positions), row.positions[share.index])
        assert torch.equal(layout.sequence_weight, row_layout(row, torch.ones(4), torch.float64).sequence_weight)


def flash_as_documented(q, k, v, borders, longest, *, scale):
    """Stands in for FlashAttention, which has no CPU kernel: the causal mask ends in the bottom right corner."""
    (cu_q, cu_k), k, v = borders, *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    assert (cu_q.diff().max(), cu_k.diff().max()) == longest
    outputs = []
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        scores = scale * torch.einsum("qhd,khd->hqk", q[a:b], k[c:d])
        is_later = torch.arange(c, d)[None, :] - d > torch.arange(a, b)[:, None] - b
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(is_later, -torch.inf).softmax(-1), v[c:d]))
    return torch.cat(outputs)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_flash_attention_is_asked_for_the_same(monkeypatch, lengths):
    monkeypatch.setattr(attention, "flash_attention", flash_as_documented)
    row, random = row_of(lengths), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(len(row.tokens), heads, 8, generator=random, dtype=torch.float64) for heads in (4, 2, 2))
    for share in shares(row, 4):
        for chunk in share.chunks:
            parts = q[share.index][chunk.tokens], k[chunk.keys], v[chunk.keys], chunk, SCALE
            torch.testing.assert_close(_chunk_flash(*parts), _chunk_sdpa(*parts))


def test_a_row_that_cannot_be_dealt_is_refused():
    with pytest.raises(ValueError, match="a row of 6 tokens cannot be dealt to 2 ranks, required a multiple of 4 "):
        share_of_row(torch.tensor([0, 6], dtype=torch.int32), 0, 2, None)
