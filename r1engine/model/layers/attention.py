"""Causal attention over a packed row: no token sees another sequence. FlashAttention on GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from r1engine.batch import PackedBatch
from r1engine.model.layers.context import Chunk, Share
from r1engine.model.layers.cpu_attention import Padded, compiled_attention, is_compiled, padded_blocks, padded_sdpa
from r1engine.model.layers.flash import flash_attention
from r1kernels import cpu_lib


@dataclass(frozen=True)
class RowLayout:
    """What the layers need to know of a packed row; stands in for Megatron's PackedSeqParams.

    H of the row's T tokens are held here: all of them, but under context parallelism.
    """

    cu_seqlens: torch.Tensor  # [S+1] int32
    max_seqlen: int
    cos: torch.Tensor  # [H, 1, head_dim / 2]
    sin: torch.Tensor
    sequence_of_token: torch.Tensor  # [H] int64
    sequence_weight: torch.Tensor  # [S] float32, sum of the loss weights of its tokens
    experts: torch.Tensor | None  # [H, layers with experts, k] int64, to be replayed
    share: Share | None = None  # under context parallelism
    qkv_format: str = "thd"  # makes Megatron hand over [T, heads, head_dim]

    def held(self, of_row: torch.Tensor) -> torch.Tensor:
        """[H, ...] of the tokens here, from [T, ...]."""
        return of_row if self.share is None else of_row[self.share.index]

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] from [H, ...], with the sum of all ranks' gradients; see `Share`."""
        return x if self.share is None else self.share.gather(x)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Of the row, without gradient, from sums over the tokens here."""
        return x.detach() if self.share is None else self.share.total(x)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T] from [..., H], for what is computed alike on all ranks; see `Share`."""
        return x if self.share is None else self.share.whole(x)

    @cached_property
    def padded(self) -> Padded:
        """The sequences in blocks, for CPUs without the compiled attention."""
        return padded_blocks(self.cu_seqlens)

    @property
    def held_cu_seqlens(self) -> torch.Tensor:
        """[S+1] int32: first of the tokens here in each sequence, then H."""
        return self.cu_seqlens if self.share is None else self.share.cu_seqlens


def row_layout(
    row: PackedBatch,
    inverse_frequencies: torch.Tensor,
    dtype: torch.dtype,
    *,
    magnitude: float = 1.0,
    share: Share | None = None,
) -> RowLayout:
    """Prepare a row once for all layers.

    Args:
        row:                 the packed row.
        inverse_frequencies: [rotated dimensions / 2] float32, rotary frequencies (rad/token).
        dtype:               of the activations.
        magnitude:           factor on the rotated dimensions.
        share:               of this rank, under context parallelism.
    """
    here = slice(None) if share is None else share.index
    angle = row.positions[here, None, None].float() * inverse_frequencies
    lengths = row.cu_seqlens.diff()
    sequence_of_token = torch.arange(len(lengths), device=lengths.device).repeat_interleave(
        lengths, output_size=len(row.tokens)
    )
    return RowLayout(
        cu_seqlens=row.cu_seqlens,
        max_seqlen=row.max_seqlen,
        cos=(magnitude * angle.cos()).to(dtype),
        sin=(magnitude * angle.sin()).to(dtype),
        sequence_of_token=sequence_of_token[here],
        sequence_weight=row.loss_weight.new_zeros(len(lengths)).index_add_(0, sequence_of_token, row.loss_weight),
        experts=None if row.experts is None else row.experts[here].long(),
        share=share,
    )


class _Slices(torch.autograd.Function):
    """x[one] and x[other], whose gradients meet in one buffer; indexing makes one of x's size for each, and a sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, one: slice, other: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.rows, ctx.slices = len(x), (one, other)
        return x[one], x[other]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = grads[0].new_zeros(ctx.rows, *grads[0].shape[1:])
        for rows, grad in zip(ctx.slices, grads, strict=True):
            total[rows] += grad
        return total, None, None


class _Rotary(torch.autograd.Function):
    """Rotate the halves of the last dimension by the position's angle; the gradient rotates back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, heads, size = x.shape
    if size % 16 == 0 and x.stride(-1) == 1 and x.dtype == torch.float32 and cpu_lib.takes(cos, sin):
        where = (tokens, heads, size // 2, x.stride(0), x.stride(1))
        cpu_lib.call("r1_cpu_rotate", x, cos, sin, out, *where, float(sign))
        return out
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
    return out


def rotate(x: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Rotary embedding of [T, heads, size]: dimension i turns with i + size / 2, by the angle of its token."""
    return _Rotary.apply(x, layout.cos, layout.sin)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RowLayout, *, scale: float
) -> torch.Tensor:
    """Causal attention within each sequence.

    Args:
        q:      [H, heads, head_dim] of the tokens held here (see `RowLayout`), rotated.
        k, v:   [T, kv_heads, head_dim] of the row.
        layout: of the row.
        scale:  factor on the product of a query and a key.

    Returns:
        [H, heads, head_dim].
    """
    if layout.share is not None:
        attend = _chunk_flash if q.is_cuda else _chunk_sdpa
        chunks, keys = layout.share.chunks, [chunk.keys for chunk in layout.share.chunks]
        parts = zip(chunks, _Slices.apply(k, *keys), _Slices.apply(v, *keys), strict=True)
        return torch.cat([attend(q[chunk.tokens], k, v, chunk, scale) for chunk, k, v in parts])
    if q.is_cuda:
        cu, longest = layout.cu_seqlens, layout.max_seqlen
        return flash_attention(q, k, v, (cu, cu), (longest, longest), scale=scale)
    if is_compiled(q, k, v):
        return compiled_attention(q, k, v, layout.cu_seqlens, scale)
    return padded_sdpa(q, k, v, layout.padded, scale)


def _chunk_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: Chunk, scale: float) -> torch.Tensor:
    borders, longest = (chunk.cu_queries, chunk.cu_keys), (max(chunk.num_queries), max(chunk.num_keys))
    return flash_attention(q, k, v, borders, longest, scale=scale)


def _chunk_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: Chunk, scale: float) -> torch.Tensor:
    """Sequence by sequence; SDPA's own causal mask lets the first query see the first key only."""
    outputs = []
    parts = q.split(chunk.num_queries), k.split(chunk.num_keys), v.split(chunk.num_keys)
    for sequence in zip(*parts, strict=True):
        num_queries, num_keys = len(sequence[0]), len(sequence[1])
        mask = None
        if num_queries < num_keys:
            mask = q.new_ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        queries, keys, values = (x.transpose(0, 1)[None] for x in sequence)
        out = scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
