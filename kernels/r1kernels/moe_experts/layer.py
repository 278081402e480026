"""Forward and backward of the routed experts, op by op; `moe_experts` and the expert-parallel layer are built of them.

Tokens may come as `Fp8`, quantized before they crossed the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from r1kernels.fp8_cast import Fp8, fp8_dequantize, fp8_quantize
from r1kernels.moe_combine import moe_combine
from r1kernels.moe_grouped_gemm import (
    moe_grouped_gemm,
    moe_grouped_gemm_fp8,
    moe_grouped_wgrad,
    moe_grouped_wgrad_fp8,
)
from r1kernels.moe_permute_quant import Fp8Rows, moe_permute, moe_permute_fp8, moe_permute_quant
from r1kernels.moe_plan import RowPlan
from r1kernels.moe_swiglu_quant import moe_swiglu, moe_swiglu_quant, moe_swiglu_quant_backward, swiglu_backward

Precision = Literal["same", "fp8", "fp8_wgrad"]
PRECISIONS = ("same", "fp8", "fp8_wgrad")
Grads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
# (weight [E, N, K], whether it is wanted as [E, K, N]) -> in FP8, in blocks of 128x128
Quantize = Callable[[torch.Tensor, bool], Fp8]


def quantize_weight(weight: torch.Tensor) -> Fp8:
    """weight [E, N, K] in FP8, in 128x128 blocks."""
    return fp8_quantize(weight, block=(128, 128))


def transposed(weight: Fp8) -> Fp8:
    """[E, N, K] -> [E, K, N]: the same blocks, so that nothing is rounded again."""
    values, scale = weight
    return Fp8(values.view(torch.uint8).mT.contiguous().view(values.dtype), scale.mT.contiguous())


def quantized_anew(weight: torch.Tensor, transpose: bool) -> Fp8:
    """The Quantize that keeps nothing."""
    found = quantize_weight(weight)
    return transposed(found) if transpose else found


def experts_forward(
    x: torch.Tensor | Fp8,
    plan: RowPlan,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    residual: torch.Tensor | None,
    precision: Precision,
    quantize: Quantize = quantized_anew,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H], h [R, 2I] for the backward). Arguments as in `moe_experts`; the plan of its ids has the precision's
    `alignment`."""
    if precision == "same":
        assert not isinstance(x, Fp8)  # tokens in FP8 come with a precision of FP8 only
        h = moe_grouped_gemm(moe_permute(x, plan), gate_up, plan)
        rows = moe_grouped_gemm(moe_swiglu(h, plan, weights), down, plan)
    else:
        h = moe_grouped_gemm_fp8(_permute_fp8(x, plan), quantize(gate_up, False), plan)
        rows = moe_grouped_gemm_fp8(moe_swiglu_quant(h, plan, weights=weights), quantize(down, False), plan)
    return moe_combine(rows.to(gate_up.dtype), plan, residual=residual), h


def alignment(precision: str) -> int:
    """Of an expert's first row: 16 is what PyTorch's grouped matmul wants at most, 128 a block of FP8."""
    return 16 if precision == "same" else 128


def experts_backward(
    grad: torch.Tensor | Fp8,
    x: torch.Tensor | Fp8,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    h: torch.Tensor,
    plan: RowPlan,
    precision: Precision,
    wants_wgrad: bool,
    quantize: Quantize = quantized_anew,
) -> Grads:
    """(d x, d weights, d gate_up, d down) from the gradient [T, H] of the result; without wgrad the last are None."""
    if precision == "same":
        return _backward_same(grad, x, weights, gate_up, down, h, plan, wants_wgrad)
    backward = _backward_fp8_wgrad if precision == "fp8_wgrad" and wants_wgrad else _backward_fp8
    return backward(grad, x, weights, gate_up, down, h, plan, wants_wgrad, quantize)


def _backward_same(
    grad: torch.Tensor | Fp8,
    x: torch.Tensor | Fp8,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    h: torch.Tensor,
    plan: RowPlan,
    wants_wgrad: bool,
) -> Grads:
    assert not isinstance(grad, Fp8) and not isinstance(x, Fp8)
    grad_rows = moe_permute(grad, plan)
    grad_act = moe_grouped_gemm(grad_rows, down.mT, plan)
    grad_h, act, grad_weights = swiglu_backward(grad_act, h, plan, weights)
    grad_x = moe_combine(moe_grouped_gemm(grad_h, gate_up.mT, plan), plan)
    if not wants_wgrad:
        return grad_x, grad_weights, None, None
    grad_gate_up = moe_grouped_wgrad(grad_h, moe_permute(x, plan), plan)
    return grad_x, grad_weights, grad_gate_up, moe_grouped_wgrad(grad_rows, act, plan)


def _backward_fp8(
    grad: torch.Tensor | Fp8,
    x: torch.Tensor | Fp8,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    h: torch.Tensor,
    plan: RowPlan,
    wants_wgrad: bool,
    quantize: Quantize,
) -> Grads:
    grad_act = moe_grouped_gemm_fp8(_permute_fp8(grad, plan), quantize(down, True), plan)
    through = moe_swiglu_quant_backward(grad_act, h, plan, weights=weights)
    grad_x = _combined(through.grad, gate_up, plan, quantize)
    if not wants_wgrad:
        return grad_x, through.grad_weights, None, None
    assert through.wide_grad is not None and through.wide_act is not None  # as without dual
    grad_gate_up = moe_grouped_wgrad(through.wide_grad, moe_permute(_wide(x), plan), plan)
    grad_down = moe_grouped_wgrad(moe_permute(_wide(grad), plan), through.wide_act, plan)
    return grad_x, through.grad_weights, grad_gate_up.to(gate_up.dtype), grad_down.to(down.dtype)


def _backward_fp8_wgrad(
    grad: torch.Tensor | Fp8,
    x: torch.Tensor | Fp8,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    h: torch.Tensor,
    plan: RowPlan,
    wants_wgrad: bool,
    quantize: Quantize,
) -> Grads:
    sizes = plan.offsets.diff().tolist()  # the host's copy that DeepGEMM wants; both products share it
    grad_rows = moe_permute_quant(_wide(grad), plan, dual=True)
    grad_act = moe_grouped_gemm_fp8(grad_rows, quantize(down, True), plan)
    through = moe_swiglu_quant_backward(grad_act, h, plan, weights=weights, dual=True)
    assert through.act_t is not None and through.act_scale_t is not None  # as with dual
    act_t = through.act_t, through.act_scale_t
    grad_down = moe_grouped_wgrad_fp8(grad_rows.transposed, act_t, plan, rows_per_expert=sizes)
    grad_x = _combined(through.grad, gate_up, plan, quantize)
    x_t = moe_permute_quant(_wide(x), plan, dual=True).transposed
    grad_gate_up = moe_grouped_wgrad_fp8(through.grad.transposed, x_t, plan, rows_per_expert=sizes)
    return grad_x, through.grad_weights, grad_gate_up.to(gate_up.dtype), grad_down.to(down.dtype)


def _combined(grad_h: Fp8Rows, gate_up: torch.Tensor, plan: RowPlan, quantize: Quantize) -> torch.Tensor:
    rows = moe_grouped_gemm_fp8(grad_h, quantize(gate_up, True), plan)
    return moe_combine(rows.to(gate_up.dtype), plan)


def _permute_fp8(x: torch.Tensor | Fp8, plan: RowPlan) -> Fp8Rows:
    return moe_permute_fp8(*x, plan) if isinstance(x, Fp8) else moe_permute_quant(x, plan)


def _wide(x: torch.Tensor | Fp8) -> torch.Tensor:
    """In bfloat16."""
    return fp8_dequantize(*x, block=(1, 128)) if isinstance(x, Fp8) else x.bfloat16()
