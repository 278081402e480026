"""Attention over pages: both implementations against PyTorch's attention in float64; the compiled kernels."""

from __future__ import annotations

import aot
import pytest
import torch
from compiled_kernels import combined_attention, latent_attention
from compiled_kernels import paged_attention as compiled_attention
from torch.nn.functional import scaled_dot_product_attention

from r1kernels import paged_attention
from r1kernels.paged_attention.triton_impl import paged_attention_triton

IMPLS = ["reference", "triton"]
NAN = float("nan")
MIXED = [1, 15, 0, 16, 17, 0, 100]  # either side of a page of 16; rows that are none


def case(lengths, *, heads=6, kv_heads=2, dim=16, value_dim=None, page=16, dtype=torch.float32):
    """(query, keys, values, table, lengths): pages in no order, and NaN wherever nobody may look."""
    draw, num_rows = torch.Generator().manual_seed(sum(lengths) + heads), len(lengths)
    width = max(1, *(-(-length // page) for length in lengths)) + 1
    pages = num_rows * width + 2
    made = [(num_rows, heads, dim), (pages, kv_heads, page, dim), (pages, kv_heads, page, value_dim or dim)]
    query, keys, values = (torch.randn(shape, generator=draw).to(dtype) for shape in made)
    table = torch.randperm(pages, generator=draw)[: num_rows * width].view(num_rows, width).int()
    is_read = torch.zeros(pages, 1, page, 1, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for token in range(length):
            is_read[table[row, token // page], 0, token % page] = True
        table[row, -(-length // page) :] = 10**9
    keys, values = (torch.where(is_read, x, NAN) for x in (keys, values))
    return query, keys, values, table, torch.tensor(lengths, dtype=torch.int32)


def latent(lengths, *, heads, dim, dtype=torch.float32, page=16):
    """The same with one entry of `dim` numbers a token for all heads, whose values are in it."""
    query, keys, _, *places = case(lengths, heads=heads, kv_heads=1, dim=dim, dtype=dtype, page=page)
    return query, keys, None, *places


def exact(query, keys, values, table, lengths, scale=None, value_dim=None):
    """Row by row, in float64; zeros for a row without tokens."""
    values = keys[..., :value_dim] if values is None else values
    out = torch.zeros(*query.shape[:2], values.shape[3], dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        if length:
            pages = table[row, : -(-length // keys.shape[2])].long()
            k, v = (x[pages].transpose(0, 1).flatten(1, 2)[None, :, :length].double() for x in (keys, values))
            found = scaled_dot_product_attention(query[row, None, :, None].double(), k, v, scale=scale, enable_gqa=True)
            out[row] = found[0, :, 0]
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 6, 7, 8, 17])
def test_every_ratio_of_heads_matches_float64(impl, ratio):
    kv_heads = 2 if ratio < 4 else 1
    given = case(MIXED, heads=ratio * kv_heads, kv_heads=kv_heads)
    torch.testing.assert_close(paged_attention(*given, impl=impl).double(), exact(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("dim", "value_dim", "page"),
    [(64, 64, 16), (128, 128, 64), (24, 16, 32), (192, 128, 16), (256, 256, 16), (8, 8, 128)],
)
def test_every_size_of_head_and_page_matches_float64(impl, dim, value_dim, page):
    given = case([3, page, 0, 2 * page + 1], dim=dim, value_dim=value_dim, page=page, heads=2, kv_heads=1)
    found = paged_attention(*given, scale=0.3, impl=impl)
    torch.testing.assert_close(found.double(), exact(*given, scale=0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("heads", "dim", "value_dim", "page"),
    [(16, 576, 512, 16), (48, 24, 16, 16), (5, 576, 512, 32), (4, 24, 16, 16), (33, 56, 40, 16), (2, 20, 20, 16)],
)
def test_values_in_the_keys_match_float64(impl, heads, dim, value_dim, page):
    # DeepSeek's entry of 512 + 64; more heads than a program has; no powers of two; nothing behind the values.
    given, options = latent(MIXED if heads < 16 else [17, 0, 1], heads=heads, dim=dim, page=page), {"scale": 0.2}
    found = paged_attention(*given, value_dim=value_dim, **options, impl=impl)
    wanted = exact(*given, value_dim=value_dim, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert found.shape == (len(given[0]), heads, value_dim)


@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.parametrize("lengths", [MIXED, [0, 0, 500], [0]])
def test_any_number_of_programs_gives_the_same_rows(programs, lengths):
    given = case(lengths, heads=2, kv_heads=1)
    for scale in (0.25, -0.25):  # the largest score in another part
        found = paged_attention_triton(*given, scale, value_dim=16, programs=programs)
        torch.testing.assert_close(found.double(), exact(*given, scale=scale), rtol=1e-5, atol=1e-5)


def test_parts_of_latents_are_put_together_head_by_head():
    given = latent(MIXED, heads=20, dim=24)  # in float32 two programs of 16
    found = paged_attention_triton(*given, 0.25, value_dim=18, programs=3)
    wanted = exact(*given, scale=0.25, value_dim=18)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_err_at_most_twice_as_much_as_pytorchs_attention(impl, dtype):
    lengths = [200, 90, 1, 64]
    for given, value_dim in (
        (case(lengths, dim=64, dtype=dtype), None),
        (latent(lengths, heads=6, dim=80, dtype=dtype), 64),
    ):
        query, keys, values, table, _ = given
        wanted = exact(*given, value_dim=value_dim)
        theirs = torch.zeros_like(wanted)
        for row, length in enumerate(lengths):
            pages = table[row, : -(-length // 16)].long()
            pool = keys, keys[..., :value_dim] if values is None else values
            k, v = (x[pages].transpose(0, 1).flatten(1, 2)[None, :, :length] for x in pool)
            alone = scaled_dot_product_attention(query[row, None, :, None], k, v, enable_gqa=True)
            theirs[row] = alone[0, :, 0].double()
        found = paged_attention(*given, value_dim=value_dim, impl=impl)
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() <= 2 * (theirs - wanted).abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mean_by_hand_and_large_scores(impl):
    # Equal scores: the mean of 0 .. 17, whose tokens lie in pages 2 and 0.
    values = torch.full((3, 1, 16, 1), NAN)
    values[2, 0, :, 0], values[0, 0, :2, 0] = torch.arange(16.0), torch.tensor([16.0, 17.0])
    table, lengths = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([18], dtype=torch.int32)
    query, keys, values = torch.ones(1, 3, 16), torch.zeros(3, 1, 16, 16), values.repeat(1, 1, 1, 16)
    found = paged_attention(query, keys, values, table, lengths, impl=impl)
    torch.testing.assert_close(found, torch.full((1, 3, 16), 8.5))
    # One score of a thousand above the others, beyond what exp can hold.
    keys[0, 0, 1] = 1000.0
    found = paged_attention(
        query, keys, values.expand(-1, -1, -1, 16).contiguous(), table, lengths, scale=1.0, impl=impl
    )
    torch.testing.assert_close(found, torch.full((1, 3, 16), 17.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_views_are_read_as_they_are(impl):
    query, keys, values, table, lengths = case(MIXED)
    wide = torch.full((len(query), 10, 16), NAN)
    wide[:, 2:8] = query
    pool = torch.stack([keys, values], dim=1)  # [pages, 2, kv_heads, page, dim]
    found = paged_attention(wide[:, 2:8], pool[:, 0], pool[:, 1], table, lengths, impl=impl)
    assert torch.equal(found, paged_attention(query, keys, values, table, lengths, impl=impl))
    empty = paged_attention(query[:0], keys, values, table[:0], lengths[:0], impl=impl)
    assert empty.shape == (0, 6, 16)


WRONG = [
    ({"query": torch.zeros(2, 4, 16).int()}, r"query must be floating point, got torch\.int32"),
    (
        {"query": torch.zeros(2, 16, 4).transpose(1, 2)},
        r"query must be contiguous in its heads, got strides \(64, 1, 4\)",
    ),
    (
        {"keys": torch.zeros(3, 2, 16, 16).half()},
        r"keys must have 4 dimensions, torch\.float32 on cpu, got \(3, 2, 16, 16\)",
    ),
    ({"keys": torch.zeros(3, 3, 16, 16), "values": torch.zeros(3, 3, 16, 16)}, r"a divisor of the 4 heads of 16, got"),
    ({"values": torch.zeros(2, 2, 16, 16)}, r"and values alike, .* got \(3, 2, 16, 16\) and \(2, 2, 16, 16\)"),
    ({"keys": torch.zeros(3, 2, 24, 16), "values": torch.zeros(3, 2, 24, 16)}, r"power of two .* from 16 on, got 24"),
    ({"block_table": torch.zeros(2, 3).long()}, r"block_table must be \[2, max_pages\] int32 on cpu, contiguous, got"),
    ({"lengths": torch.ones(3).int()}, r"lengths must be \[2\] int32 on cpu, contiguous, got \(3,\)"),
    ({"lengths": torch.tensor([49, 1]).int()}, r"lengths must be in \[0, 48\], got 1 \.\. 49"),
    ({"block_table": torch.full((2, 3), 3).int()}, r"pages in block_table must be in \[0, 3\), got 3 \.\. 3"),
    ({"values": None}, r"either values or a value_dim in \[1, 16\], .* got values None and value_dim None"),
    ({"values": None, "value_dim": 17}, r"either values or a value_dim in \[1, 16\], .* None and value_dim 17"),
    ({"value_dim": 16}, r"either values or a value_dim .* got values \(3, 2, 16, 16\) and value_dim 16"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_does_not_fit_is_refused(changes, message):
    given = {"query": torch.zeros(2, 4, 16), "keys": torch.zeros(3, 2, 16, 16), "values": torch.zeros(3, 2, 16, 16)}
    given |= {"block_table": torch.zeros(2, 3).int(), "lengths": torch.ones(2).int()}
    with pytest.raises(ValueError, match=f"paged_attention: .*{message}"):
        paged_attention(**(given | changes))


def test_heads_that_the_kernel_cannot_hold_are_refused():
    given = case([3], dim=272, heads=1, kv_heads=1)
    paged_attention(*given)
    limits = r"at most 256 numbers, with values in the keys 512 and 64 behind them, in float32, bfloat16 or float16, "
    with pytest.raises(ValueError, match=limits + r"got torch\.float32 heads of 272 with values of 272$"):
        paged_attention(*given, impl="triton")
    for dim, value_dim in ((577, 512), (513, 513)):
        with pytest.raises(ValueError, match=rf"heads of {dim} with values of {value_dim} in them"):
            paged_attention(*latent([3], heads=1, dim=dim), value_dim=value_dim, impl="triton")


# ---- compiled for sm_90a ---------------------------------------------------------------------------------------


@pytest.mark.machine_code
def test_compiled_kernels_load_16_bytes_at_a_time_while_they_compute():
    cases = {f"heads of {dim}": compiled_attention(head_dim=dim) for dim in (64, 128, 192)}
    cases |= {"float32": compiled_attention(group=1, dtype="fp32")}
    cases |= {f"{heads} heads on a latent": latent_attention(heads) for heads in (16, 128)}
    *made, combine, wide_combine = aot.compile_triton(
        [*cases.values(), combined_attention(), combined_attention(value_dim=512)]
    )
    for (name, kernel), found in zip(cases.items(), made, strict=True):
        assert found.spill_free, name
        # Two blocks on a multiprocessor: 65,536 registers, 227 KB of shared memory.
        assert 2 * 32 * kernel.num_warps * found.registers <= 65536, (name, found.registers)
        assert 2 * (found.shared_bytes + 1024) <= 227 * 1024, (name, found.shared_bytes)
        (loop,) = found.loops
        sizes = kernel.constexprs
        tile = sizes["TILE"] * (sizes["KEY_BLOCK"] + (sizes["REST_BLOCK"] or sizes["VALUE_BLOCK"]))
        size = 4 if name == "float32" else 2
        wide = [op for op in loop if op.startswith("LDGSTS") and "128" in op.split(".")]
        assert sum(loop[op] for op in wide) * 16 * 32 * kernel.num_warps == tile * size, name
        # The next page's number is the only other load; two tiles are on their way while one is computed.
        assert sum(n for op, n in loop.items() if op.startswith("LDG") and op not in wide and "DEPBAR" not in op) == 1
        assert found.shared_bytes >= 2 * tile * size, name
    assert combine.spill_free and combine.registers <= 64 and combine.count("LDG", "128") > 0
    assert wide_combine.spill_free and wide_combine.registers <= 96 and wide_combine.count("LDG", "128") > 0
