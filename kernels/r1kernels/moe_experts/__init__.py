"""The routed experts of a mixture-of-experts layer as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch

from r1kernels.dispatch import check_float
from r1kernels.moe_experts.layer import PRECISIONS, Precision, alignment, experts_backward, experts_forward
from r1kernels.moe_plan import moe_plan
from r1kernels.tracing import is_traced


def moe_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    precision: Precision = "same",
) -> torch.Tensor:
    """out[t] = sum over k of weights[t, k] * expert_{ids[t, k]}(x[t]) (+ residual[t]); DeepSeek-V3 eq. 12.

        expert_e(x) = down[e] (silu(gate[e] x) * (up[e] x)),  gate_up[e] = [gate[e]; up[e]]

    RowPlan, permute, matmul, activation, matmul, combine, each of them an op of this package; `moe_gate_topk` gives ids
    and weights. Only x and the [R, 2I] rows before the activation are kept for the backward: the permuted copies, the
    activation and the FP8 forms are cheaper to make again than to keep. Nothing waits for the device.

        same:      matmuls in x's dtype.
        fp8:       DeepSeek-V3's FP8 for the matmuls of forward and of the gradient of the rows. The gradients of the
                   weights are taken in bfloat16: a deviation from the paper, because on sm_90 the grouped FP8 kernel
                   for them is about as fast as bfloat16 by published numbers (DeepGEMM issue 107), wants its sizes
                   from the host and rounds both operands again.
        fp8_wgrad: the gradients of the weights in FP8 too, as the paper has it; waits for the device once.

    Args:
        x:         [T, H] floating point, contiguous; differentiable.
        ids:       [T, K] int32, contiguous: expert of each choice in [0, E); -1 for one that goes nowhere.
        weights:   [T, K] float32; differentiable.
        gate_up:   [E, 2I, H] of x's dtype, contiguous; differentiable.
        down:      [E, H, I] of x's dtype, contiguous; differentiable.
        residual:  [T, H] of x's dtype, added in the same float32 sum (the shared expert's output); differentiable.
        precision: as above. FP8 needs bfloat16 or float32, and H and I divisible by 128.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit, or the precision is unknown.

    Example:
        >>> import torch
        >>> x, ids, weights = torch.eye(2, 4), torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([[1.0], [0.5]])
        >>> gate_up, down = torch.ones(2, 8, 4), torch.ones(2, 4, 4)
        >>> moe_experts(x, ids, weights, gate_up, down)
        tensor([[2.9242, 2.9242, 2.9242, 2.9242],
                [1.4621, 1.4621, 1.4621, 1.4621]])
    """
    check_experts(x, ids, gate_up, down, precision)
    if is_traced(x):
        from r1kernels.moe_experts import torch_op

        return torch_op.experts(x, ids, weights, gate_up, down, residual, precision)[0]
    return _Experts.apply(x, ids, weights, gate_up, down, residual, precision)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        residual: torch.Tensor | None,
        precision: Precision,
    ) -> torch.Tensor:
        plan = moe_plan(ids, len(gate_up), align=alignment(precision))
        out, h = experts_forward(x, plan, weights, gate_up, down, residual, precision)
        ctx.save_for_backward(x, weights, gate_up, down, h)
        ctx.plan, ctx.precision = plan, precision
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grad.contiguous()
        wants_wgrad = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        x, weights, gate_up, down, h = ctx.saved_tensors
        grad_x, grad_weights, grad_gate_up, grad_down = experts_backward(
            grad, x, weights, gate_up, down, h, ctx.plan, ctx.precision, wants_wgrad
        )
        return grad_x, None, grad_weights, grad_gate_up, grad_down, grad if ctx.needs_input_grad[5] else None, None


def check_experts(
    x: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, precision: str
) -> None:
    """Require what `moe_experts` says of its arguments.

    Raises:
        ValueError: naming the op, what was found and what is required.
    """
    op = "moe_experts"
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_float(op, "x", x)
    if x.dim() != 2 or ids.dim() != 2 or len(ids) != len(x):
        raise ValueError(f"{op}: x [T, H] and ids [T, K] are required, got {tuple(x.shape)} and {tuple(ids.shape)}")
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dim() != 3 or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous {x.dtype} with 3 dimensions, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    experts, width, hidden = gate_up.shape
    if hidden != x.shape[1] or width % 2 or down.shape != (experts, hidden, width // 2):
        raise ValueError(
            f"{op}: gate_up [E, 2I, H] and down [E, H, I] are required with H={x.shape[1]}, "
            f"got {tuple(gate_up.shape)} and {tuple(down.shape)}"
        )
    if precision != "same" and (hidden % 128 or width % 256):
        raise ValueError(f"{op}: FP8 needs H and I divisible by 128, got H={hidden} and I={width // 2}")
