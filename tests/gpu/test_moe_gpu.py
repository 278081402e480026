"""The CUDA kernels of the MoE ops on a GPU: against the references, without waiting for the device. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from r1kernels import (
    cuda_lib,
    fp8_dequantize,
    fp8_quantize,
    moe_combine,
    moe_combine_backward_quant,
    moe_gate_topk,
    moe_permute,
    moe_permute_quant,
    moe_plan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not cuda_lib.available(), reason="the CUDA library is not installed"),
]

HIDDEN = 7168


@pytest.fixture(params=[1, 333, 4096])
def routed(request):
    """(tokens [T, H], logits [T, 256], bias [256])"""
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(request.param, HIDDEN, device="cuda", generator=generator).bfloat16()
    logits = torch.randn(request.param, 256, device="cuda", generator=generator)
    return x, logits, 0.1 * torch.randn(256, device="cuda", generator=generator)


def layer(x: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, impl: str | None) -> dict[str, torch.Tensor]:
    """Every op once, forward and backward; rows of padding left out."""
    logits = logits.detach().requires_grad_()
    borders = torch.tensor([0, len(x) // 3, len(x)], dtype=torch.int32, device="cuda")
    gate = moe_gate_topk(logits, bias, cu_seqlens=borders, impl=impl)
    plan = moe_plan(gate.ids, 256, impl=impl)
    real = plan.slot_of >= 0
    x = x.detach().requires_grad_()
    rows = moe_permute(x, plan, impl=impl)
    out = moe_combine(rows, plan, gate.weights, residual=x.detach(), impl=impl)
    (out.float().square().sum() + gate.sequence_scores.square().sum()).backward()
    quantized = moe_permute_quant(x.detach(), plan, weights=gate.weights.detach(), impl=impl)
    back, dots = moe_combine_backward_quant(out.detach(), rows.detach(), plan, gate.weights.detach(), impl=impl)
    return {
        "ids": gate.ids, "weights": gate.weights.detach(), "counts": gate.counts, "row_of": plan.row_of,
        "sequence_scores": gate.sequence_scores.detach(), "slot_of": plan.slot_of, "out": out.detach(),
        "x.grad": x.grad, "logits.grad": logits.grad, "values": quantized.values[real].float(),
        "scale": quantized.scale[real], "dots": dots, "back": back.values[real].float(),
    }  # fmt: skip


def test_kernels_match_the_references(routed):
    found, wanted = (layer(*routed, impl) for impl in ("cuda", "reference"))
    for name in ("ids", "counts", "row_of", "slot_of", "values"):
        assert torch.equal(found[name], wanted[name]), name
    for name in ("weights", "sequence_scores", "logits.grad", "scale"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    for name in ("out", "x.grad"):
        torch.testing.assert_close(found[name], wanted[name], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(found["dots"], wanted["dots"], rtol=1e-2, atol=1.0)


def test_two_runs_are_bitwise_equal(routed):
    first, second = (layer(*routed, None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_for_the_choices_of_one_rank_of_eight(routed):
    x, logits, bias = routed
    ids = moe_gate_topk(logits, bias).ids
    ids = torch.where(ids < 32, ids, -1)
    num_choices = int((ids >= 0).sum())
    found, wanted = (moe_plan(ids, 32, num_choices=num_choices, impl=impl) for impl in ("cuda", "reference"))
    assert found.num_rows == wanted.num_rows < len(ids) * ids.shape[1]
    for name in ("row_of", "slot_of", "expert_of", "offsets", "counts"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    used = int(found.offsets[-1])
    assert torch.equal(moe_permute(x, found, impl="cuda")[:used], moe_permute(x, wanted, impl="reference")[:used])


def test_transposed_form(routed):
    x, logits, bias = routed
    plan = moe_plan(moe_gate_topk(logits, bias).ids, 256)
    found, wanted = (moe_permute_quant(x, plan, dual=True, impl=impl) for impl in ("cuda", "reference"))
    used = int(plan.offsets[-1])
    assert torch.equal(found.values_t[: used * HIDDEN].float(), wanted.values_t[: used * HIDDEN].float())
    assert torch.equal(found.scale_t[: used // 128], wanted.scale_t[: used // 128])


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_casts_are_bitwise_the_references(block, dtype):
    x = torch.randn(3, 200, 640, device="cuda", dtype=dtype)
    found, wanted = (fp8_quantize(x, block=block, impl=impl) for impl in ("cuda", "reference"))
    assert torch.equal(found.values.float(), wanted.values.float())
    assert torch.equal(found.scale, wanted.scale)
    back = [fp8_dequantize(*found, block=block, dtype=dtype, impl=impl) for impl in ("cuda", "reference")]
    assert torch.equal(*back)


def test_nothing_waits_for_the_device(routed):
    x, logits, bias = routed
    torch.cuda.set_sync_debug_mode("error")
    try:
        gate = moe_gate_topk(logits, bias)
        plan = moe_plan(gate.ids, 256)
        quantized = moe_permute_quant(x, plan, dual=True)
        rows = moe_permute(x, plan)
        out = moe_combine(rows, plan, gate.weights)
        moe_combine_backward_quant(out, rows, plan, gate.weights, dual=True)
        fp8_quantize(x, block=(1, 128))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert quantized.values.shape == (plan.num_rows, HIDDEN)
