"""Causal attention over a packed row on a CPU: csrc/cpu/packed_attention.cpp, or PyTorch on padded blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from r1kernels import cpu_lib

PADDING_LIMIT = 1.25  # a padded block may hold at most this many times the tokens of its sequences


def is_compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `compiled_attention` takes these: float32, head sizes a multiple of 16, and the library is built."""
    return (
        q.shape[-1] % 16 == 0 and all(x.dtype == torch.float32 and not x.is_cuda for x in (q, k, v)) and cpu_lib.takes()
    )


def compiled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention within each sequence.

    Args:
        q:          [T, heads, size].
        k, v:       [T, kv_heads, size].
        cu_seqlens: [S+1] int32.
        scale:      factor on the product of a query and a key.

    Returns:
        [T, heads, size].
    """
    return _Compiled.apply(q, k, v, cu_seqlens.long(), scale)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, borders: torch.Tensor, scale: float
    ) -> torch.Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v, borders)
        ctx.scale, out = scale, torch.empty_like(q)
        cpu_lib.call("r1_cpu_packed_attention", q, k, v, borders, out, *_sizes(q, k, borders), scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        q, k, v, borders = ctx.saved_tensors
        grads = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        arguments = (q, k, v, grad.contiguous(), borders, *grads, *_sizes(q, k, borders), ctx.scale)
        cpu_lib.call("r1_cpu_packed_attention_backward", *arguments)
        return *grads, None, None


def _sizes(q: torch.Tensor, k: torch.Tensor, borders: torch.Tensor) -> tuple[int, int, int, int]:
    return len(borders) - 1, q.shape[1], k.shape[1], q.shape[2]


@dataclass(frozen=True)
class AttentionBlock:
    """Sequences of like length, attended as one padded batch."""

    start: int  # first row of the padded layout
    sequences: int
    length: int


@dataclass(frozen=True)
class Padded:
    """A row as blocks."""

    blocks: list[AttentionBlock]
    to_padded: torch.Tensor | None  # [P] token of each padded row; None: the layouts are the same
    to_packed: torch.Tensor | None  # [T] padded row of each token


def padded_blocks(cu_seqlens: torch.Tensor) -> Padded:
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
        blocks.append(AttentionBlock(row, len(group), length))
        for i in group:
            own = torch.arange(starts[i], starts[i] + lengths[i])
            to_packed[own] = torch.arange(row, row + lengths[i])
            # The padding repeats the sequence's first token: later than every real query, so never attended.
            padded += [own, own.new_full((length - lengths[i],), starts[i])]
            row += length
    to_padded = torch.cat(padded)
    if len(to_padded) == len(to_packed) and torch.equal(to_padded, torch.arange(len(to_packed))):
        return Padded(blocks, None, None)
    return Padded(blocks, to_padded, to_packed)


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


def padded_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Padded, scale: float) -> torch.Tensor:
    """As `compiled_attention`, by PyTorch."""
    if layout.to_padded is not None:
        q, k, v = (_Select.apply(x, layout.to_padded, layout.to_packed) for x in (q, k, v))
    outputs = []
    for block in layout.blocks:
        rows = slice(block.start, block.start + block.sequences * block.length)
        queries, keys, values = (
            x[rows].unflatten(0, (block.sequences, block.length)).transpose(1, 2) for x in (q, k, v)
        )
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if layout.to_packed is None else _Select.apply(out, layout.to_packed, layout.to_padded)
