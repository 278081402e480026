"""paged_attention in two launches: every program attends to an equal share of all tokens, then shares become rows."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from r1kernels.triton_cast import INTERPRETED, round_to

NUM_WARPS, NUM_STAGES = 4, 3
PROGRAMS = 2  # of a multiprocessor: what registers leave room for with heads of 128 numbers
TILE_BYTES = 36864  # keys and values that a program takes at once: 32 tokens of 576 numbers in 16 bits
MOST_TOKENS = 64  # of a tile
LEAST_HEADS = 16  # rows of a matrix instruction
HEAD_BYTES = 64  # query heads of a program times bytes of a number: more of them do not fit registers
LEAST_ROWS = 64  # that a kernel is compiled for: fewer are no other kernel
PARTS = 16  # of a row that are put together at once
LOG2_E = 1.4426950408889634


@triton.jit
def _product(a, b):
    """a @ b, summed in float32."""
    if INTERPRETED:  # whose arithmetic in 16 bits is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows", "max_pages"])
def attention_kernel(
    query_ptr,  # [N, heads, head_dim]
    keys_ptr,  # [pages, kv_heads, page, head_dim]
    values_ptr,  # [pages, kv_heads, page, value_dim]; not read where values are in the keys
    table_ptr,  # [N, max_pages] i32
    lengths_ptr,  # [N] i32
    sums_ptr,  # [N + programs, heads, value_dim] f32, out: sums of weights times values
    scales_ptr,  # [2, N + programs, heads] f32, out: largest score (in units of log 2), sum of weights
    num_rows,
    max_pages,
    scale,  # to log 2
    query_row,
    key_page,
    key_head,
    key_token,
    value_page,
    value_head,
    value_token,
    GROUP: tl.constexpr,  # query heads of a key head
    HEADS: tl.constexpr,  # of them those of a program, as a matrix instruction takes them
    PAGE: tl.constexpr,
    TILE: tl.constexpr,  # tokens at once, a divisor of PAGE
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,  # the next power of two of a key, or of the part of it that is the value
    VALUE_BLOCK: tl.constexpr,  # of a value
    REST_BLOCK: tl.constexpr,  # of what a key has behind its value; 0: values have a place of their own
    ROWS: tl.constexpr,
):
    """Program p of a key head has tiles [p * share, (p + 1) * share) of the tiles of all rows, one row after the other.
    What it finds of row r is part p + r: from one part to the next, either or both rise, so no two have one number.

    Where values are in the keys, a tile is loaded once, in two parts: the value, and what the key has behind it."""
    KEY_DIM: tl.constexpr = VALUE_DIM if REST_BLOCK else HEAD_DIM
    BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS  # programs that share a key head's tiles
    program, head, block = tl.program_id(0), tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    first_head = head * GROUP + block * HEADS
    lanes = tl.arange(0, ROWS)
    tiles = (tl.load(lengths_ptr + lanes, mask=lanes < num_rows, other=0) + (TILE - 1)) // TILE
    ends, total = tl.cumsum(tiles, 0), tl.sum(tiles)
    share = (total + tl.num_programs(0) - 1) // tl.num_programs(0)
    begin = program * share
    end = tl.minimum(begin + share, total)
    if begin >= end:
        return
    first, last = tl.sum((ends <= begin).to(tl.int32)), tl.sum((ends < end).to(tl.int32))
    heads, tokens = tl.arange(0, HEADS), tl.arange(0, TILE)
    key_dims, value_dims = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_head, is_key, is_value = heads < GROUP - block * HEADS, key_dims < KEY_DIM, value_dims < VALUE_DIM
    num_heads = tl.num_programs(1) // BLOCKS * GROUP
    keys_ptr += head.to(tl.int64) * key_head
    values_ptr += head.to(tl.int64) * value_head
    key_places = tokens[:, None] * key_token + key_dims[None, :]
    value_places = tokens[:, None] * value_token + value_dims[None, :]
    if REST_BLOCK:
        rest_dims = VALUE_DIM + tl.arange(0, REST_BLOCK)
        is_rest = rest_dims < HEAD_DIM
        rest_places = tokens[:, None] * key_token + rest_dims[None, :]
    for row in range(first, last + 1):
        length = tl.load(lengths_ptr + row)
        row_end = tl.sum(tl.where(lanes == row, ends, 0))
        row_begin = row_end - (length + (TILE - 1)) // TILE
        query_at = query_ptr + row * query_row + (first_head + heads[:, None]) * HEAD_DIM
        query = tl.load(query_at + key_dims[None, :], mask=is_head[:, None] & is_key[None, :], other=0.0)
        if REST_BLOCK:
            query_rest = tl.load(query_at + rest_dims[None, :], mask=is_head[:, None] & is_rest[None, :], other=0.0)
        top = tl.full([HEADS], float("-inf"), tl.float32)
        weights = tl.zeros([HEADS, TILE], tl.float32)
        sums = tl.zeros([HEADS, VALUE_BLOCK], tl.float32)
        start_tile, stop_tile = tl.maximum(begin, row_begin) - row_begin, tl.minimum(end, row_end) - row_begin
        pages_ptr = table_ptr + row * max_pages
        page = tl.load(pages_ptr + start_tile * TILE // PAGE, mask=start_tile < stop_tile, other=0).to(tl.int64)
        for tile in range(start_tile, stop_tile):
            start = tile * TILE
            inside = start + tokens < length
            key_at = keys_ptr + (page * key_page + start % PAGE * key_token)
            value_at = values_ptr + (page * value_page + start % PAGE * value_token)
            # The page of the next tile: loads of keys wait for no other load.
            page = tl.load(pages_ptr + (start + TILE) // PAGE, mask=tile + 1 < stop_tile, other=0).to(tl.int64)
            keys = tl.load(key_at + key_places, mask=inside[:, None] & is_key[None, :], other=0.0)
            scores = _product(query, tl.trans(keys))
            if REST_BLOCK:
                rest = tl.load(key_at + rest_places, mask=inside[:, None] & is_rest[None, :], other=0.0)
                scores += _product(query_rest, tl.trans(rest))
            scores = tl.where(inside[None, :], scores * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            rescale = tl.exp2(top - higher)
            p = tl.exp2(scores - higher[:, None])
            weights = weights * rescale[:, None] + p
            if REST_BLOCK:
                values = keys
            else:
                values = tl.load(value_at + value_places, mask=inside[:, None] & is_value[None, :], other=0.0)
            sums = sums * rescale[:, None] + _product(round_to(p, values.dtype), values)
            top = higher
        part = (program + row).to(tl.int64) * num_heads + first_head + heads
        is_there = is_head & (row_begin < row_end)  # rows without tokens lie between others
        tl.store(scales_ptr + part, top, mask=is_there)
        tl.store(scales_ptr + (num_rows + tl.num_programs(0)) * num_heads + part, tl.sum(weights, 1), mask=is_there)
        is_there_too = is_there[:, None] & is_value[None, :]
        tl.store(sums_ptr + part[:, None] * VALUE_DIM + value_dims[None, :], sums, mask=is_there_too)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def combine_kernel(
    sums_ptr,  # [N + programs, heads, value_dim] f32
    scales_ptr,  # [2, N + programs, heads] f32
    lengths_ptr,  # [N] i32
    out_ptr,  # [N, heads, value_dim], out
    num_rows,
    num_programs,  # of attention_kernel
    TILE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row and head: the parts of all programs that had tiles of it."""
    row, head, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    lanes = tl.arange(0, ROWS)
    tiles = (tl.load(lengths_ptr + lanes, mask=lanes < num_rows, other=0) + (TILE - 1)) // TILE
    share = tl.maximum((tl.sum(tiles) + num_programs - 1) // num_programs, 1)
    begin = tl.sum(tl.where(lanes < row, tiles, 0))
    end = begin + tl.sum(tl.where(lanes == row, tiles, 0))
    first, stop = begin // share, (end + share - 1) // share
    stop = tl.where(begin < end, stop, first)
    dims = tl.arange(0, VALUE_BLOCK)
    top, weight = float("-inf"), 0.0
    out = tl.zeros([VALUE_BLOCK], tl.float32)
    for some in range(first, stop, PARTS):
        programs = some + tl.arange(0, PARTS)
        is_there = programs < stop
        part = (programs + row).to(tl.int64) * num_heads + head
        tops = tl.load(scales_ptr + part, mask=is_there, other=float("-inf"))
        totals = tl.load(scales_ptr + (num_rows + num_programs) * num_heads + part, mask=is_there, other=0.0)
        is_number = is_there[:, None] & (dims < VALUE_DIM)[None, :]
        sums = tl.load(sums_ptr + part[:, None] * VALUE_DIM + dims[None, :], mask=is_number, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        rescale, factors = tl.exp2(top - higher), tl.exp2(tops - higher)
        weight = weight * rescale + tl.sum(totals * factors, 0)
        out = out * rescale + tl.sum(sums * factors[:, None], 0)
        top = higher
    out = out / tl.where(begin < end, weight, 1.0)
    place = (row.to(tl.int64) * num_heads + head) * VALUE_DIM + dims
    tl.store(out_ptr + place, round_to(out, out_ptr.dtype.element_ty), mask=dims < VALUE_DIM)


def paged_attention_triton(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    value_dim: int,
    programs: int | None = None,
) -> torch.Tensor:
    """As `paged_attention_reference`; `programs` share the tokens, None: as many as the GPU runs at once."""
    (num_rows, heads, head_dim), (_, kv_heads, page, _) = query.shape, keys.shape
    out = query.new_empty(num_rows, heads, value_dim)
    if not out.numel():
        return out
    dims = (head_dim, value_dim, values is None)
    shape = constants(heads // kv_heads, page, *dims, num_rows, query.element_size())
    at_once = kv_heads * -(-shape["GROUP"] // shape["HEADS"])
    programs = programs or max(1, PROGRAMS * _multiprocessors(query.device) // at_once)
    sums = torch.empty(num_rows + programs, heads, value_dim, dtype=torch.float32, device=query.device)
    scales = torch.empty(2, num_rows + programs, heads, dtype=torch.float32, device=query.device)
    values = keys if values is None else values
    combined = {name: shape[name] for name in ("TILE", "VALUE_DIM", "VALUE_BLOCK", "ROWS")}
    with torch.cuda.device_of(query):
        attention_kernel[(programs, at_once)](
            query, keys, values, block_table, lengths, sums, scales,
            num_rows, block_table.shape[1], scale * LOG2_E, query.stride(0), *keys.stride()[:3], *values.stride()[:3],
            **shape, num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=True,
        )  # fmt: skip
        combine_kernel[(num_rows, heads)](
            sums, scales, lengths, out, num_rows, programs, **combined, PARTS=PARTS, enable_fp_fusion=True
        )
    return out


def constants(
    group: int, page: int, head_dim: int, value_dim: int, is_shared: bool, num_rows: int, size: int
) -> dict[str, int]:
    """What attention_kernel is compiled for; `is_shared`: values are in the keys, `size`: bytes of a number."""
    parts = (value_dim, head_dim - value_dim) if is_shared else (head_dim, value_dim)
    first, second = (max(LEAST_HEADS, triton.next_power_of_2(dim)) for dim in parts)
    tile = max(LEAST_HEADS, TILE_BYTES // (size * (first + second)))
    return {
        "GROUP": group,
        "HEADS": min(HEAD_BYTES // size, max(LEAST_HEADS, triton.next_power_of_2(group))),
        "PAGE": page,
        "TILE": min(page, MOST_TOKENS, triton.next_power_of_2(tile + 1) // 2),
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "KEY_BLOCK": first,
        "VALUE_BLOCK": first if is_shared else second,
        "REST_BLOCK": second if is_shared else 0,
        "ROWS": max(LEAST_ROWS, triton.next_power_of_2(num_rows)),
    }


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; on a CPU, where Triton's interpreter runs one program after the other, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
