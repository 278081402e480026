"""The GRPO loss from hidden states and the output layer, with three matrix products in place of four."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from r1kernels.dispatch import Impl
from r1kernels.grpo_loss import GrpoMetrics
from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.slopes import NO_LABEL, FusedGrpo, check_tokens
from r1kernels.grpo_loss.terms import TokenTerms
from r1kernels.linear_logprob.head import (
    Chunking,
    Head,
    HeadChunk,
    HeadGradients,
    as_given,
    check_head,
    check_main_grad,
    product_dtype,
    refuse_traced,
)
from r1kernels.logits_grpo_loss import loss_and_gradient
from r1kernels.logprob_entropy import have, logprob_of
from r1kernels.logprob_entropy.problem import Logprob, Selection, Softmax
from r1kernels.tracing import is_traced, traced_choice


def linear_grpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    objective: GrpoObjective | None = None,
    *,
    ref_logp: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    main_grad: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
    impl: Impl | None = None,
) -> FusedGrpo:
    """`grpo_loss` of `linear_logprob`, value and gradient at once: 6*T*H*V operations instead of 8*T*H*V.

    A token-level loss depends on the other tokens only through loss_weight, which is known beforehand. So as soon as a
    chunk's logits are there, so is their gradient: it is written over them and multiplied with weight and hidden states
    while it lies in the cache, and nothing is computed twice. The gradients wait, the weight's in float32, for the
    backward pass, which only multiplies them by the loss's own gradient.

    Args:
        hidden:    [..., H] float, differentiable; with sequence_parallel this rank's 1/ranks of the tokens.
        weight:    [V_local, H], as linear_logprob takes it, differentiable.
        labels:    [...] int64, global token ids; any where loss_weight is 0.
        old_logp, advantage, loss_weight, objective, ref_logp, rollout_logp: as grpo_loss takes them, of labels' shape;
                   float32 (float64 for float64 hidden states) recommended.
        bias, temperature, logit_scale, softcap, tp_group, sequence_parallel, chunk_tokens: as linear_logprob has them.
        main_grad: [V_local, H] float32 (float64 for float64): the weight's gradient is added to it in the forward pass,
                   and autograd gets none (Megatron's gradient buffer). The loss's own gradient must be 1 then: put what
                   there is to multiply into loss_weight. Not in a graph, nor in what is computed again for the
                   backward pass.
        impl:      force an implementation; None picks one.

    Returns:
        FusedGrpo(loss, metrics, logp, entropy); logp and entropy are 0 where loss_weight is 0.

    Raises:
        ValueError: as linear_logprob and grpo_loss; or the objective needs whole sequences (GSPO, eq. 1 as printed,
            importance sampling of sequences): their ratios are not known before the last chunk. Use linear_logprob
            and grpo_loss then.
        RuntimeError: `impl` names an implementation that cannot run here; with main_grad, in the backward pass: the
            loss's own gradient is not 1 (on a GPU when the device comes to it).

    Example:
        >>> import torch
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> labels, advantage = torch.tensor([0, 1]), torch.tensor([1.0, -0.5])
        >>> found = linear_grpo_loss(hidden, weight, labels, None, advantage, torch.full((2,), 0.5))
        >>> found.loss.item(), found.logp
        (-0.25, tensor([-0.1698, -0.5514]))
        >>> found.loss.backward()
        >>> hidden.grad
        tensor([[-0.1772,  0.0571],
                [-0.0530,  0.1060]])
    """
    op = "linear_grpo_loss"
    o = GrpoObjective() if objective is None else objective
    terms = TokenTerms(old_logp, advantage, loss_weight, ref_logp, rollout_logp)
    softmax, chunking = Softmax(temperature, logit_scale, softcap, tp_group), Chunking(sequence_parallel, chunk_tokens)
    if is_traced(hidden):
        from r1kernels.linear_grpo_loss.torch_op import traced

        refuse_traced(op, main_grad)
        chosen = traced_choice(op, impl, hidden.device.type, have(product_dtype(hidden)))
        return traced(hidden, weight, bias, labels, terms, o, softmax, chunking, chosen)
    terms = check_tokens(op, o, "grpo_loss(linear_logprob(...).logp, ...)", terms)
    selection = Selection(NO_LABEL, (loss_weight != 0).view(labels.shape))
    head = check_head(op, hidden, weight, labels, bias, softmax, selection, chunking)
    check_main_grad(op, weight, main_grad)
    call = _Call(logprob_of(op, impl, head.hidden), o, terms, main_grad, torch.is_grad_enabled())
    loss, metrics, logp, entropy = _LinearGrpo.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, head, call)
    return FusedGrpo(loss, GrpoMetrics(*metrics.unbind()), logp.view(labels.shape), entropy.view(labels.shape))


@dataclass(frozen=True)
class _Call:
    logprob: Logprob
    objective: GrpoObjective
    terms: TokenTerms
    main_grad: torch.Tensor | None
    is_recording: bool


class _LinearGrpo(torch.autograd.Function):
    """(hidden [N, H], weight, bias, head, call) -> loss, metrics, logp, entropy."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, call):
        hidden_needs, weight_needs, bias_needs = (need and call.is_recording for need in ctx.needs_input_grad[:3])
        gradients = HeadGradients(head, (hidden_needs, weight_needs, bias_needs), call.main_grad)
        new = head.problem.labels.new_empty
        logp, entropy = (new(len(head.problem.labels), dtype=head.problem.dtype) for _ in range(2))
        with as_given(hidden.device.type):
            sums = [_chunk(head, call, chunk, gradients, logp, entropy) for chunk in head.chunks()]
        total = torch.stack(sums).sum(0) if sums else logp.new_zeros(1 + len(GrpoMetrics._fields))
        ctx.save_for_backward(*gradients.results(hidden, weight, bias))
        ctx.is_final = call.main_grad is not None
        loss, metrics = total[0].clone(), total[1:].clone()
        ctx.mark_non_differentiable(metrics, logp, entropy)
        return loss, metrics, logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_metrics, _grad_logp, _grad_entropy):
        if ctx.is_final:
            torch._assert_async(grad_loss == 1, "linear_grpo_loss: with main_grad the loss's own gradient must be 1")
            return *ctx.saved_tensors, None, None
        return *(None if x is None else x * grad_loss.to(x.dtype) for x in ctx.saved_tensors), None, None


def _chunk(
    head: Head, call: _Call, chunk: HeadChunk, gradients: HeadGradients, logp: torch.Tensor, entropy: torch.Tensor
) -> torch.Tensor:
    """Loss and metrics [1 + metrics] of a chunk; its gradients are added, its rows of logp and entropy are set."""
    problem = chunk.problem
    terms = call.terms.each(lambda x: x[chunk.flat])
    sums, logp[chunk.flat], entropy[chunk.flat] = loss_and_gradient(
        call.logprob, problem, call.objective, terms, problem.logits
    )
    gradients.add(chunk, chunk.logits)
    return sums
