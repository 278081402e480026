"""Causal attention over a packed row: no token sees another sequence. flash-attn on GPUs, SDPA on CPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from r1engine.batch import PackedBatch
from r1engine.model.context import Chunk, Share
from r1kernels import cpu_lib

PADDING_LIMIT = 1.25  # a padded block may hold at most this many times the tokens of its sequences


@dataclass(frozen=True)
class Block:
    """Sequences of like length, attended as one padded batch (CPU)."""

    start: int  # first row of the padded layout
    sequences: int
    length: int


@dataclass(frozen=True)
class RowLayout:
    """What the layers need to know of a packed row; stands in for Megatron's PackedSeqParams.

    H of the row's T tokens are held here: all of them, but under context parallelism.
    """

    cu_seqlens: torch.Tensor  # [S+1] int32
    max_seqlen: int
    cos: torch.Tensor  # [H, 1, head_dim / 2]
    sin: torch.Tensor
    blocks: list[Block]  # CPU only
    to_padded: torch.Tensor | None  # [P] token of each padded row; None: the layouts are the same
    to_packed: torch.Tensor | None  # [T] padded row of each token
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

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T] from [..., H], for what is computed alike on all ranks; see `Share`."""
        return x if self.share is None else self.share.whole(x)

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
    on_gpu = row.tokens.is_cuda
    blocks, to_padded, to_packed = ([], None, None) if on_gpu or share is not None else _blocks(row.cu_seqlens)
    return RowLayout(
        cu_seqlens=row.cu_seqlens,
        max_seqlen=row.max_seqlen,
        cos=(magnitude * angle.cos()).to(dtype),
        sin=(magnitude * angle.sin()).to(dtype),
        blocks=blocks,
        to_padded=to_padded,
        to_packed=to_packed,
        sequence_of_token=sequence_of_token[here],
        sequence_weight=row.loss_weight.new_zeros(len(lengths)).index_add_(0, sequence_of_token, row.loss_weight),
        experts=None if row.experts is None else row.experts[here].long(),
        share=share,
    )


def _blocks(cu_seqlens: torch.Tensor) -> tuple[list[Block], torch.Tensor | None, torch.Tensor | None]:
    """Group the sequences into padded blocks, and map both ways between the packed and the padded layout."""
    starts, lengths = cu_seqlens[:-1].tolist(), cu_seqlens.diff().tolist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[groups[-1][0]] <= PADDING_LIMIT * lengths[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    blocks, padded, row = [], [], 0
    to_packed = torch.empty(sum(lengths), dtype=torch.int64)
    for group in groups:
        group.sort()
        length = max(lengths[i] for i in group)
        blocks.append(Block(row, len(group), length))
        for i in group:
            own = torch.arange(starts[i], starts[i] + lengths[i])
            to_packed[own] = torch.arange(row, row + lengths[i])
            # The padding repeats the sequence's first token: later than every real query, so never attended.
            padded += [own, own.new_full((length - lengths[i],), starts[i])]
            row += length
    to_padded = torch.cat(padded)
    if len(to_padded) == len(to_packed) and torch.equal(to_padded, torch.arange(len(to_packed))):
        return blocks, None, None
    return blocks, to_padded, to_packed


class _Select(torch.autograd.Function):
    """x[index], whose gradient is a plain copy because `back` names the one row that each entry's gradient is in."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.index, ctx.rows, ctx.is_padding = back, x.shape[0], len(index) > len(back)
        ctx.forward_index = index
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.is_padding:  # packed -> padded: the padding's gradient is zero and is dropped
            return grad.index_select(0, ctx.index), None, None
        padded = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return padded.index_copy_(0, ctx.forward_index, grad), None, None


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
        return _rotate(grad, *ctx.saved_tensors, -1), None, None


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


@cache
def flash_attn_varlen() -> Any:
    """flash_attn_varlen_func.

    Raises:
        RuntimeError: flash-attn is not installed.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise RuntimeError("training on a GPU needs flash-attn: pip install r1engine[gpu]") from error
    return flash_attn_varlen_func


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
        return flash_attn_varlen()(q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True)
    return _padded_sdpa(q, k, v, layout, scale)


def _padded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: RowLayout, scale: float) -> torch.Tensor:
    if layout.to_padded is not None:
        q, k, v = (_Select.apply(x, layout.to_padded, layout.to_packed) for x in (q, k, v))
    outputs = []
    for block in layout.blocks:
        rows = slice(block.start, block.start + block.sequences * block.length)
        batch = (x[rows].unflatten(0, (block.sequences, block.length)).transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*batch, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if layout.to_packed is None else _Select.apply(out, layout.to_packed, layout.to_padded)


def _chunk_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: Chunk, scale: float) -> torch.Tensor:
    """With fewer queries than keys, flash-attn (from 2.1 on) lets the last query see the last key."""
    borders, longest = (chunk.cu_queries, chunk.cu_keys), (max(chunk.num_queries), max(chunk.num_keys))
    return flash_attn_varlen()(q, k, v, *borders, *longest, softmax_scale=scale, causal=True)


def _chunk_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: Chunk, scale: float) -> torch.Tensor:
    """Sequence by sequence; SDPA's own causal mask lets the first query see the first key only."""
    outputs = []
    parts = q.split(chunk.num_queries), k.split(chunk.num_keys), v.split(chunk.num_keys)
    for sequence in zip(*parts, strict=True):
        queries, keys = len(sequence[0]), len(sequence[1])
        mask = q.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries) if queries < keys else None
        batch = (x.transpose(0, 1)[None] for x in sequence)
        out = scaled_dot_product_attention(*batch, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
