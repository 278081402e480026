"""Attention of one new token a sequence over keys and values that lie in pages."""

from __future__ import annotations

import torch

from r1kernels.dispatch import Impl, check_float, check_plain, choose
from r1kernels.tracing import has_values, is_traced, traced_choice

OP = "paged_attention"
HAVE = ("triton", "reference")
MAX_HEAD_DIM = 256  # of the Triton kernel
MAX_SHARED = 512, 64  # of the same where values are in the keys: of the value, and of what a key has behind it
LEAST_PAGE = 16  # tokens: what a matrix instruction takes


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    value_dim: int | None = None,
    scale: float | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """out[n, h] = sum over t of softmax_t(scale * query[n, h] . key[n, t]) * value[n, t], for t < lengths[n].

    Token t of sequence n is token t % page of page block_table[n, t // page]; query head h looks at key head
    h * kv_heads // heads. Sums are float32. What lies behind a sequence's length is not read: neither the rest of its
    last page nor of its row of the table. Not differentiable.

    Where `values` is None, a value is the first `value_dim` numbers of its key, which are loaded once for both. That is
    multi-head latent attention with the matrices that make keys and values out of latents taken into query and output:
    a token has one entry of 512 + 64 numbers for all heads, the latent and the part of the keys that knows positions.

    On a GPU it is two launches, whatever the lengths are: all pages of all sequences are dealt evenly to the
    multiprocessors, then the parts of each sequence are put together (flash-decoding). Of more than 32 query heads of a
    key head (in float32 16) as many are one program; each program reads the tokens. Nothing waits for the device, and
    nothing but the number of sequences decides how it is launched: a CUDA graph serves all lengths.

    Args:
        query:       [N, heads, head_dim] float, the heads of a sequence contiguous.
        keys:        [pages, kv_heads, page, head_dim] as query, contiguous in the last dimension; page is a power of
                     two from 16 on, heads a multiple of kv_heads.
        values:      [pages, kv_heads, page, value_dim], likewise; None: they are in the keys.
        block_table: [N, max_pages] int32, contiguous: pages of each sequence, in order.
        lengths:     [N] int32, contiguous: tokens of each sequence; 0 gives zeros.
        value_dim:   numbers of a value where `values` is None, from 1 to head_dim.
        scale:       of the products; None: head_dim ** -0.5.
        impl:        force an implementation; None picks one.

    Returns:
        [N, heads, value_dim] in query's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit; `values` and `value_dim` are both there, or neither;
            or (on a CPU only: on a GPU the check would wait for the device) a length is negative or more than max_pages
            pages, or a page that is needed does not exist.

    Example:
        >>> import torch
        >>> keys = torch.zeros(3, 1, 16, 16)  # equal scores: the mean of the values
        >>> values = torch.arange(48.0).view(3, 1, 16, 1).repeat(1, 1, 1, 16)
        >>> table, lengths = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32), torch.tensor([18, 3], dtype=torch.int32)
        >>> paged_attention(torch.ones(2, 4, 16), keys, values, table, lengths)[:, 0, 0]
        tensor([35.1667, 17.0000])
    """
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    plain = values.detach() if values is not None else None
    if is_traced(query):
        from r1kernels.paged_attention.torch_op import attention

        chosen = traced_choice(OP, impl, query.device.type, HAVE)
        return attention(query.detach(), keys.detach(), plain, block_table, lengths, value_dim, scale, chosen)
    chosen = choose(OP, impl, query, have=HAVE)
    _check_layout(query, keys, values)
    _check_places(query, keys, block_table, lengths)
    value_dim = _checked_value_dim(query.shape[2], values, value_dim)
    if chosen == "reference":
        from r1kernels.paged_attention.reference import paged_attention_reference as run
    else:
        _check_sizes(query, values, value_dim)
        from r1kernels.paged_attention.triton_impl import paged_attention_triton as run
    return run(query.detach(), keys.detach(), plain, block_table, lengths, scale, value_dim)


def _checked_value_dim(head_dim: int, values: torch.Tensor | None, value_dim: int | None) -> int:
    """Numbers of a value."""
    if values is not None and value_dim is None:
        return values.shape[3]
    if values is None and value_dim is not None and 1 <= value_dim <= head_dim:
        return value_dim
    raise ValueError(
        f"{OP}: required is either values or a value_dim in [1, {head_dim}], the numbers of a key that are its value, "
        f"got values {'None' if values is None else tuple(values.shape)} and value_dim {value_dim}"
    )


def _check_sizes(query: torch.Tensor, values: torch.Tensor | None, value_dim: int) -> None:
    """Of the Triton kernel."""
    head_dim = query.shape[2]
    fits = max(head_dim, value_dim) <= MAX_HEAD_DIM
    if values is None:
        fits = value_dim <= MAX_SHARED[0] and head_dim - value_dim <= MAX_SHARED[1]
    if not fits or query.dtype.itemsize > 4:
        raise ValueError(
            f"{OP}: impl='triton' takes heads of at most {MAX_HEAD_DIM} numbers, with values in the keys "
            f"{MAX_SHARED[0]} and {MAX_SHARED[1]} behind them, in float32, bfloat16 or float16, "
            f"got {query.dtype} heads of {head_dim} with values of {value_dim}{' in them' if values is None else ''}"
        )


def _check_layout(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None) -> None:
    for name, tensor, dims in (("query", query, 3), ("keys", keys, 4), ("values", values, 4)):
        if tensor is None:
            continue
        check_float(OP, name, tensor)
        if tensor.dim() != dims or tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{OP}: {name} must have {dims} dimensions, {query.dtype} on {query.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
        if tensor.stride(-1) != 1 or (name == "query" and tensor.stride(1) != tensor.shape[2]):
            raise ValueError(f"{OP}: {name} must be contiguous in its heads, got strides {tensor.stride()}")
    (_, heads, head_dim), (_, kv_heads, page, _) = query.shape, keys.shape
    like = keys if values is None else values
    if keys.shape[:3] != like.shape[:3] or keys.shape[3] != head_dim or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{OP}: keys must be [pages, kv_heads, page, head_dim] and values alike, with kv_heads a divisor of the "
            f"{heads} heads of {head_dim}, got {tuple(keys.shape)} and {tuple(like.shape)}"
        )
    if page < LEAST_PAGE or page & (page - 1):
        raise ValueError(f"{OP}: a page must have a power of two of tokens from {LEAST_PAGE} on, got {page}")


def _check_places(query: torch.Tensor, keys: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor) -> None:
    for name, tensor, dims in (("block_table", block_table, 2), ("lengths", lengths, 1)):
        check_plain(OP, name, tensor)
        is_wrong = tensor.dim() != dims or len(tensor) != len(query) or not tensor.is_contiguous()
        if is_wrong or tensor.dtype != torch.int32 or tensor.device != query.device:
            wanted = f"[{len(query)}, max_pages]" if dims == 2 else f"[{len(query)}]"
            raise ValueError(
                f"{OP}: {name} must be {wanted} int32 on {query.device}, contiguous, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
            )
    if not has_values(query) or not len(query):
        return
    (num_pages, _, page, _), most = keys.shape, block_table.shape[1] * keys.shape[2]
    if lengths.min() < 0 or lengths.max() > most:
        raise ValueError(f"{OP}: lengths must be in [0, {most}], got {int(lengths.min())} .. {int(lengths.max())}")
    first = torch.arange(block_table.shape[1]) * page
    needed = block_table[first < lengths[:, None]]
    if len(needed) and (needed.min() < 0 or needed.max() >= num_pages):
        found = f"{int(needed.min())} .. {int(needed.max())}"
        raise ValueError(f"{OP}: pages in block_table must be in [0, {num_pages}), got {found}")
