"""torch.ops.r1kernels.linear_grpo_loss: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

from typing import Any

import torch

from r1kernels.grpo_loss import GrpoMetrics
from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.slopes import FusedGrpo
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.grpo_loss.torch_op import NUM_SUMS, decode, encode
from r1kernels.linear_grpo_loss import linear_grpo_loss
from r1kernels.linear_logprob.head import Chunking, product_dtype
from r1kernels.linear_logprob.torch_op import empty_gradients
from r1kernels.logprob_entropy.problem import Softmax, wide
from r1kernels.logprob_entropy.torch_op import arguments_of, softmax_of
from r1kernels.tracing import autograd_in_op


@torch.library.custom_op("r1kernels::linear_grpo_loss", mutates_args=())
def loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    ref_logp: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    temperatures: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    group: str,
    sequence_parallel: bool,
    chunk_tokens: int | None,
    dtype: torch.dtype,  # of the products
    kinds: str,
    bounds: list[float],
    needs: list[bool],  # gradients: of hidden, weight and bias
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss and metrics [8], logp and entropy like labels, gradients of hidden, weight and bias (or empty)."""
    softmax = softmax_of(temperatures, temperature, logit_scale, softcap, group)
    given: dict[str, Any] = softmax._asdict() | {"ref_logp": ref_logp, "rollout_logp": rollout_logp, "impl": impl}
    given |= {"sequence_parallel": sequence_parallel, "chunk_tokens": chunk_tokens}
    with autograd_in_op(), torch.autocast(hidden.device.type, dtype, enabled=dtype != hidden.dtype):
        layer: list[Any] = [
            None if x is None else x.detach().requires_grad_(need)
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        terms = labels, old_logp, advantage, loss_weight
        found = linear_grpo_loss(layer[0], layer[1], *terms, decode(kinds, bounds), bias=layer[2], **given)
        wanted = [x for x in layer if x is not None and x.requires_grad]
        grads = iter(torch.autograd.grad(found.loss, wanted) if wanted else ())
    hidden_grad, weight_grad, bias_grad = (next(grads) if need else hidden.new_empty(0) for need in needs)
    sums = torch.stack([found.loss.detach(), *found.metrics])
    return sums, found.logp, found.entropy, hidden_grad, weight_grad, bias_grad


@loss_and_gradients.register_fake
def _(hidden, weight, bias, labels, *rest):
    *_, needs, _impl = rest
    dtype = wide(next(x for x in rest if isinstance(x, torch.dtype)))
    rows = [hidden.new_empty(labels.shape, dtype=dtype) for _ in range(2)]
    return hidden.new_empty(NUM_SUMS, dtype=dtype), *rows, *empty_gradients(needs, hidden, weight, bias)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output[3:])


def _backward(ctx, grad_sums, *_others):
    grads = (
        (x * grad_sums[0].to(x.dtype)) if need else None
        for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    )
    return *grads, *[None] * 18


loss_and_gradients.register_autograd(_backward, setup_context=_setup)


def traced(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    terms: TokenTerms,
    objective: GrpoObjective,
    softmax: Softmax,
    chunking: Chunking,
    impl: str,
) -> FusedGrpo:
    """`linear_grpo_loss` as one node of a graph."""
    recording = torch.is_grad_enabled()
    needs = [recording and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    sums, logp, entropy, *_ = loss_and_gradients(
        hidden,
        weight,
        bias,
        labels,
        *terms,
        *arguments_of(softmax),
        *chunking,
        product_dtype(hidden),
        *encode(objective),
        needs,
        impl,
    )
    return FusedGrpo(sums[0], GrpoMetrics(*sums.detach()[1:].unbind()), logp.detach(), entropy.detach())
