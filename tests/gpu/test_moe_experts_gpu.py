"""The routed experts on a GPU: Triton kernels against the reference, FP8 by DeepGEMM, no wait. `pytest -m gpu`."""

import importlib.util

import pytest
import torch

from r1kernels import moe_experts, moe_gate_topk, moe_plan, moe_swiglu_quant, moe_swiglu_quant_backward
from r1kernels.fp8_cast.reference import dequantize
from r1kernels.moe_experts.reference import experts_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
T, E, K, H, INNER = 2048, 16, 4, 1024, 512
NEEDS_DEEP_GEMM = pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is None, reason="DeepGEMM is not installed")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def leaves() -> list[torch.Tensor]:
    """x, router, gate_up, down"""
    torch.manual_seed(0)
    made = [randn(T, H), randn(E, H) / H**0.5, randn(E, 2 * INNER, H) / H**0.5, randn(E, H, INNER) / INNER**0.5]
    return [tensor.requires_grad_() for tensor in made]


def layer(x, router, gate_up, down, precision):
    gate = moe_gate_topk((x @ router.t()).float(), topk=K, n_group=4, topk_group=2)
    return moe_experts(x, gate.ids, gate.weights, gate_up, down, precision=precision)


@pytest.mark.parametrize("dual", [False, True])
def test_triton_gives_the_references_bytes(dual):
    plan = moe_plan(torch.rand(T, E, device="cuda").argsort(1)[:, :K].int().contiguous(), E)
    h, grad, weights = randn(plan.num_rows, 2 * INNER), randn(plan.num_rows, INNER), torch.rand(T, K, device="cuda")
    real = plan.slot_of >= 0
    for op, arguments in ((moe_swiglu_quant, (h,)), (moe_swiglu_quant_backward, (grad, h))):
        results = [op(*arguments, plan, weights=weights, dual=dual, impl=impl) for impl in ("triton", "reference")]
        a, b = (r if op is moe_swiglu_quant else r.grad for r in results)
        wide = [dequantize(r.values, r.scale, (1, 128))[real] for r in (a, b)]
        assert (wide[0] != wide[1]).float().mean() < 1e-2  # exp is approximate on a GPU
        torch.testing.assert_close(*wide, rtol=2**-3, atol=1e-3)
    torch.testing.assert_close(*(r.grad_weights for r in results), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("precision", ["same", pytest.param("fp8", marks=NEEDS_DEEP_GEMM)])
def test_layer_is_near_float64_and_never_waits(precision):
    inputs = leaves()
    layer(*inputs, precision).sum().backward()  # compiles
    direction = randn(T, H)
    for tensor in inputs:
        tensor.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = layer(*inputs, precision)
        out.backward(direction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x, _, gate_up, down = (t.detach().double().cpu().requires_grad_() for t in inputs)
    gate = moe_gate_topk((inputs[0] @ inputs[1].t()).float(), topk=K, n_group=4, topk_group=2)
    exact = experts_reference(x, gate.ids.cpu(), gate.weights.double().cpu().detach(), gate_up, down)
    exact.backward(direction.double().cpu())
    for found, wanted in ((out, exact), (inputs[2].grad, gate_up.grad), (inputs[3].grad, down.grad)):
        error = (found.detach().double().cpu() - wanted.detach()).norm() / wanted.norm()
        assert error < (0.01 if precision == "same" else 0.1)


@pytest.mark.parametrize("precision", ["same", pytest.param("fp8", marks=NEEDS_DEEP_GEMM)])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_experts_without_tokens_have_a_gradient_of_zero(precision, num_tokens):
    # As on a rank of expert parallelism to which few tokens come, or none.
    x, _, gate_up, down = leaves()
    ids = torch.full((num_tokens, K), -1, device="cuda", dtype=torch.int32)
    ids[:, 1] = 2
    weights = torch.rand(num_tokens, K, device="cuda", requires_grad=True)
    torch.full((2**28,), float("nan"), device="cuda")  # what memory holds that nobody writes
    out = moe_experts(x[:num_tokens], ids, weights, gate_up, down, precision=precision)
    out.backward(torch.ones_like(out))
    for weight in (gate_up, down):
        is_used = torch.arange(E, device="cuda") == 2 if num_tokens else torch.zeros(E, device="cuda").bool()
        assert not weight.grad[~is_used].any()
        assert weight.grad[is_used].abs().amax((1, 2)).gt(0).all() and weight.grad.isfinite().all()
    assert x.grad.isfinite().all() and not x.grad[num_tokens:].any()
