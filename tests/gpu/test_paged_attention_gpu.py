"""Attention over pages on a GPU: Triton against float64, and one CUDA graph for all lengths. `pytest -m gpu`."""

import pytest
import torch

from r1kernels import paged_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MIXED = [1, 63, 0, 64, 65, 0, 700, 5000, 129, 0]


def case(lengths, *, heads=28, kv_heads=4, dim=128, dtype=torch.bfloat16, page=64, most=5120):
    """(query, keys, values, table, lengths), pages in no order."""
    torch.manual_seed(0)
    rows, width = len(lengths), most // page
    query = torch.randn(rows, heads, dim, device="cuda", dtype=dtype)
    pool = torch.randn(2, rows * width, kv_heads, page, dim, device="cuda", dtype=dtype)
    table = torch.randperm(rows * width, device="cuda").view(rows, width).int()
    return query, *pool, table, torch.tensor(lengths, device="cuda", dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (12, 2, 64), (16, 16, 192), (8, 1, 256)])
def test_values_match_float64(heads, kv_heads, dim, dtype):
    given = case(MIXED, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    wanted = paged_attention(*(x.double() if x.is_floating_point() else x for x in given), impl="reference")
    plain = paged_attention(*given, impl="reference")  # sums in float32, the result in 16 bits
    found = paged_attention(*given, impl="triton")
    allowed = 1e-5 if dtype == torch.float32 else 2 * (plain.double() - wanted).abs().max() + 2**-9
    assert (found.double() - wanted).abs().max() <= allowed
    assert not found[[2, 5, 9]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [16, 128])
def test_values_in_the_keys_match_float64(heads, dtype):
    query, keys, _, *places = case(MIXED, heads=heads, kv_heads=1, dim=576, dtype=dtype)
    wanted = paged_attention(query.double(), keys.double(), None, *places, value_dim=512, impl="reference")
    plain, found = (
        paged_attention(query, keys, None, *places, value_dim=512, impl=impl) for impl in ("reference", "triton")
    )
    allowed = 1e-5 if dtype == torch.float32 else 2 * (plain.double() - wanted).abs().max() + 2**-9
    assert (found.double() - wanted).abs().max() <= allowed
    assert not found[[2, 5, 9]].any()


def test_one_graph_serves_all_lengths_and_nothing_waits():
    query, keys, values, table, lengths = case(MIXED)
    paged_attention(query, keys, values, table, lengths)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    with torch.cuda.graph(graph):
        out = paged_attention(query, keys, values, table, lengths)
    torch.cuda.set_sync_debug_mode("default")
    for changed in ([5120] * len(MIXED), MIXED[::-1], [0] * len(MIXED)):
        lengths.copy_(torch.tensor(changed))
        table.copy_(table.flip(1))
        graph.replay()
        assert torch.equal(out, paged_attention(query, keys, values, table, lengths))
