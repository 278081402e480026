"""torch.ops.r1kernels.moe_experts: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

from typing import cast

import torch

from r1kernels.moe_experts import check_experts
from r1kernels.moe_experts.layer import Precision, alignment, experts_backward, experts_forward
from r1kernels.moe_plan import moe_plan
from r1kernels.moe_plan.torch_op import empty_plan, filled, plan_of, tensors_of


@torch.library.custom_op("r1kernels::moe_experts", mutates_args=())
def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    residual: torch.Tensor | None,
    precision: str,
) -> list[torch.Tensor]:
    """The result, and what its backward wants: the rows before the activation and the tensors of the plan."""
    check_experts(x, ids, gate_up, down, precision)
    plan = moe_plan(ids, len(gate_up), align=alignment(precision))
    out, h = experts_forward(x, plan, weights, gate_up, down, residual, cast("Precision", precision))
    return [out, h, *tensors_of(plan)]


@experts.register_fake
def _(x, ids, weights, gate_up, down, residual, precision):
    plan = empty_plan(ids, gate_up.shape[0], alignment(precision))
    h = x.new_empty(plan[1].shape[0], gate_up.shape[1], dtype=x.dtype if precision == "same" else torch.bfloat16)
    return [torch.empty_like(x), h, *plan]


@torch.library.custom_op("r1kernels::moe_experts_backward", mutates_args=())
def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    h: torch.Tensor,
    plan: list[torch.Tensor],
    precision: str,
    wants_wgrad: bool,
) -> list[torch.Tensor]:
    """Gradients of x, weights, gate_up and down, the last two empty where they are not wanted."""
    given = plan_of(plan, alignment(precision))
    chosen = cast("Precision", precision)
    found = experts_backward(grad, x, weights, gate_up, down, h, given, chosen, wants_wgrad)
    return [filled(gradient, like) for gradient, like in zip(found, (x, weights, gate_up, down), strict=True)]


@gradients.register_fake
def _(grad, x, weights, gate_up, down, h, plan, precision, wants_wgrad):
    of_weights = [y.new_empty(y.shape if wants_wgrad else 0) for y in (gate_up, down)]
    return [torch.empty_like(x), torch.empty_like(weights), *of_weights]


def _setup(ctx, inputs, output):
    x, _, weights, gate_up, down, _, ctx.precision = inputs
    ctx.save_for_backward(x, weights, gate_up, down, *output[1:])


def _backward(ctx, grads):
    grad = grads[0].contiguous()
    x, weights, gate_up, down, h, *plan = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wants_wgrad = needs[3] or needs[4]
    given = grad, x, weights, gate_up, down, h, plan
    to_x, to_weights, *of_weights = gradients(*given, ctx.precision, wants_wgrad)
    of_weights = of_weights if wants_wgrad else [None, None]
    return to_x, None, to_weights, *of_weights, grad if needs[5] else None, None


experts.register_autograd(_backward, setup_context=_setup)
