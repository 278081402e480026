"""The GRPO loss from logits: value and gradient from one read of them, the gradient in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from r1kernels.dispatch import Impl, check_float
from r1kernels.grpo_loss import GrpoMetrics
from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.slopes import NO_LABEL, FusedGrpo, check_tokens
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.logprob_entropy import have, logprob_of
from r1kernels.logprob_entropy.problem import (
    Logprob,
    Problem,
    Selection,
    Softmax,
    as_rows,
    check_problem,
    check_writable,
)
from r1kernels.tracing import is_traced, traced_choice


def logits_grpo_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    objective: GrpoObjective | None = None,
    *,
    ref_logp: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    inplace: bool = True,
    impl: Impl | None = None,
) -> FusedGrpo:
    """`grpo_loss` of `logprob_entropy`, value and gradient at once: 4 bytes a bfloat16 logit instead of 6.

    A token-level loss depends on the other tokens only through loss_weight, which is known beforehand. So a row's
    gradient follows from its own sums: the forward pass reads the row, and writes the gradient over it (or beside it)
    while the row still lies in the GPU's caches; main memory sees one read and one write. The backward pass multiplies
    by the loss's own gradient in place, on the device, and moves nothing where that is 1: put what else there is to
    multiply (micro-batches, ranks) into loss_weight. Without a need for gradients the logits are only read.

    With `tp_group` a collective stands between a row's sums and its gradient, so all rows are read twice, by two
    kernels: 6 bytes. In pieces that stay in the cache it would be 4, but at the price of a collective for each, which
    takes longer than a slice of the vocabulary takes to read.

    Args:
        logits:       [..., V_local] float, differentiable; strides as logprob_entropy takes them.
        labels:       [...] int64, global token ids; any where loss_weight is 0.
        old_logp, advantage, loss_weight, objective, ref_logp, rollout_logp: as grpo_loss takes them, of labels' shape;
                      float32 (float64 for float64 logits) recommended.
        temperature, logit_scale, softcap, tp_group: as logprob_entropy has them.
        inplace:      write the gradient over the logits, which are lost then, also for whoever kept them for a
                      backward pass: autograd raises there. In a compiled or exported graph it is written beside them.
        impl:         force an implementation; None picks one.

    Returns:
        FusedGrpo(loss, metrics, logp, entropy); logp and entropy are 0 where loss_weight is 0, and these rows are not
        read. A second backward pass through the same graph raises.

    Raises:
        ValueError: as logprob_entropy and grpo_loss; or the objective needs whole sequences (GSPO, eq. 1 as printed,
            importance sampling of sequences): their ratios are not known before the last row. Use logprob_entropy and
            grpo_loss then.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> labels, advantage = torch.tensor([0, 1]), torch.tensor([1.0, -0.5])
        >>> found = logits_grpo_loss(logits * 1, labels, None, advantage, torch.full((2,), 0.5))
        >>> found.loss.item(), found.logp
        (-0.25, tensor([-0.1698, -0.5514]))
        >>> found.loss.backward()
        >>> logits.grad
        tensor([[-0.0781,  0.0571,  0.0210],
                [-0.0530,  0.1060, -0.0530]])
    """
    op = "logits_grpo_loss"
    o = GrpoObjective() if objective is None else objective
    terms = TokenTerms(old_logp, advantage, loss_weight, ref_logp, rollout_logp)
    softmax = Softmax(temperature, logit_scale, softcap, tp_group)
    if is_traced(logits):
        from r1kernels.logits_grpo_loss.torch_op import traced

        return traced(
            logits, labels, terms, o, softmax, traced_choice(op, impl, logits.device.type, have(logits.dtype))
        )
    check_float(op, "logits", logits)
    terms = check_tokens(op, o, "grpo_loss(logprob_entropy(...).logp, ...)", terms)
    if loss_weight.shape != labels.shape:
        raise ValueError(
            f"{op}: loss_weight must have the shape of labels, {tuple(labels.shape)}, got {tuple(loss_weight.shape)}"
        )
    problem = check_problem(op, logits, labels, softmax, Selection(NO_LABEL, loss_weight != 0))
    if inplace:
        check_writable(op, "inplace", logits)
    is_recording = torch.is_grad_enabled() and logits.requires_grad
    call = _Call(logprob_of(op, impl, logits), problem.without_logits(), o, terms, inplace, is_recording)
    loss, metrics, logp, entropy = _LogitsGrpo.apply(logits, call)
    return FusedGrpo(loss, GrpoMetrics(*metrics.unbind()), logp.view(labels.shape), entropy.view(labels.shape))


def loss_and_gradient(
    logprob: Logprob, problem: Problem, objective: GrpoObjective, terms: TokenTerms, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss and metrics stacked, logp [N], entropy [N]; the loss's gradient is written to `out`.

    Args:
        terms: flat, as `check_tokens` returns them.
        out:   shaped as problem.logits, or these, or None where no gradient is wanted.
    """
    if logprob.name == "triton" and problem.softmax.tp_group is None:
        from r1kernels.logits_grpo_loss import triton_impl

        return triton_impl.loss_and_gradient(problem, objective, terms, out)
    from r1kernels.logits_grpo_loss import reference

    return reference.loss_and_gradient(logprob, problem, objective, terms, out)


def _multiply(logprob: Logprob, grad: torch.Tensor, factor: torch.Tensor) -> None:
    """grad *= factor, a scalar; without a pass over `grad` where it is 1."""
    if logprob.name == "triton":
        from r1kernels.logits_grpo_loss import triton_impl

        triton_impl.multiply(grad, factor)
    elif grad.is_cuda or factor != 1:  # on a GPU to look at it would wait for the device
        grad.mul_(factor)


@dataclass(frozen=True)
class _Call:
    logprob: Logprob
    problem: Problem  # without logits
    objective: GrpoObjective
    terms: TokenTerms
    inplace: bool
    wants_gradient: bool


class _LogitsGrpo(torch.autograd.Function):
    """(logits, call) -> loss, metrics, logp, entropy."""

    @staticmethod
    def forward(ctx, logits, call):
        problem = replace(call.problem, logits=as_rows("logits_grpo_loss", logits.detach()))
        grad = out = None
        if call.wants_gradient:
            grad = logits.detach() if call.inplace else torch.empty_like(logits)
            out = grad.view(problem.logits.shape)
        sums, logp, entropy = loss_and_gradient(call.logprob, problem, call.objective, call.terms, out)
        ctx.save_for_backward(grad)
        ctx.logprob, ctx.rows = call.logprob, problem.logits.shape
        loss, metrics = sums[0].clone(), sums[1:].clone()
        ctx.mark_non_differentiable(metrics, logp, entropy)
        return loss, metrics, logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_metrics, _grad_logp, _grad_entropy):
        (grad,) = ctx.saved_tensors  # raises where it was written over, by another backward pass say
        _multiply(ctx.logprob, grad.view(ctx.rows), grad_loss)
        torch.autograd.graph.increment_version(grad)
        return grad, None
