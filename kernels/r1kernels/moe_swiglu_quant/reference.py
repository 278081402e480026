"""What moe_swiglu_quant means: the formulas in float32 (float64 for float64), and the quantization of fp8_cast."""

from __future__ import annotations

import torch

from r1kernels.fp8_cast.reference import quantize
from r1kernels.moe_permute_quant.reference import row_weights, transposed
from r1kernels.moe_plan import RowPlan

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
GradFields = tuple[
    Quantized, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


def swiglu(h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None) -> torch.Tensor:
    """(h [R, 2I], weights [T, K]) -> [R, I]."""
    act, weight = _act(h, plan, weights)
    return (act * weight).to(h.dtype)


def swiglu_backward(
    grad: torch.Tensor, h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(grad [R, I], h [R, 2I]) -> (d(h) [R, 2I], act [R, I], d(weights) [T, K])."""
    grad_h, act, grad_weights = _backward(grad, h, plan, weights)
    return grad_h.to(h.dtype), act.to(h.dtype), grad_weights


def swiglu_quant(h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, dual: bool) -> Quantized:
    """h [R, 2I] -> (values, scale, values_t, scale_t) of Fp8Rows [R, I]."""
    act, weight = _act(h, plan, weights)
    values, scale = quantize(act, (1, 128))
    scale = _column_major(scale * weight)
    return values, scale, *(transposed(act * weight, plan) if dual else (None, None))


def swiglu_quant_backward(
    grad: torch.Tensor, h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, dual: bool
) -> GradFields:
    """The fields of SwigluGrad, the first as a tuple."""
    grad_h, act, grad_weights = _backward(grad, h, plan, weights)
    values, scale = quantize(grad_h, (1, 128))
    rows = values, _column_major(scale)
    if not dual:
        return (*rows, None, None), grad_h.bfloat16(), act.bfloat16(), None, None, grad_weights
    return (*rows, *transposed(grad_h, plan)), None, None, *transposed(act, plan), grad_weights


def _act(h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up [R, I], zero in padding, and the weight of each row [R, 1]."""
    wide = torch.where(plan.slot_of[:, None] < 0, 0, h.to(torch.promote_types(h.dtype, torch.float32)))
    gate, up = wide.chunk(2, dim=1)
    if weights is None or not plan.num_tokens:
        return torch.nn.functional.silu(gate) * up, torch.ones_like(gate[:, :1])
    return torch.nn.functional.silu(gate) * up, row_weights(weights, plan)


def _backward(
    grad: torch.Tensor, h: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """d(h), act and d(weights), not rounded."""
    act, weight = _act(h, plan, weights)
    padding = plan.slot_of[:, None] < 0
    gate, up = torch.where(padding, 0, h.to(act.dtype)).chunk(2, dim=1)
    grad = torch.where(padding, 0, grad.to(act.dtype))
    sigmoid = gate.sigmoid()
    grad_gate = weight * grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = weight * grad * gate * sigmoid
    grad_weights = None
    if weights is not None:
        grad_weights = torch.zeros_like(weights).flatten()
        if plan.num_tokens:
            # One padding place at the end takes what belongs to no choice.
            of_slot = torch.cat([grad_weights, grad_weights.new_zeros(1)])
            slot = torch.where(plan.slot_of < 0, len(grad_weights), plan.slot_of).long()
            grad_weights = of_slot.index_copy(0, slot, (grad * act).sum(1).to(weights.dtype))[:-1]
        grad_weights = grad_weights.view_as(weights)
    return torch.cat([grad_gate, grad_up], dim=1), act * weight, grad_weights


def _column_major(scale: torch.Tensor) -> torch.Tensor:
    """[R, N], the same numbers with stride (1, R), as DeepGEMM reads scales."""
    return scale.t().contiguous().t()
