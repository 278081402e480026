"""The GRPO objective of a packed row (R1 eq. 1 and 2) and its relatives: loss, gradient and metrics."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1kernels.dispatch import Impl, choose
from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.terms import TokenTerms, check_tensors
from r1kernels.tracing import is_traced, traced_choice

HAVE = ("triton", "reference")


class GrpoMetrics(NamedTuple):
    """Sums over the row, weighted by `loss_weight`; as the weights of a mini-batch sum to 1, adding the
    rows of a mini-batch gives means. Scalars on the device of the inputs, without gradient."""

    kl: torch.Tensor  # estimate of KL(policy || reference) by objective.kl, 0 without a reference
    clip_fraction: torch.Tensor  # share of tokens whose term the clip changed
    clip_fraction_low: torch.Tensor  # of these, from below (A < 0 and a small ratio)
    ratio: torch.Tensor  # mean of pi / pi_old
    policy_kl: torch.Tensor  # k3 estimate of KL(pi_old || policy): how far the policy has moved
    tis_weight: torch.Tensor  # mean importance weight, 1 without correction
    tis_fraction: torch.Tensor  # share of tokens whose importance weight was truncated or masked


def grpo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    objective: GrpoObjective | None = None,
    *,
    entropy: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, GrpoMetrics]:
    """Negated GRPO objective, summed over the row with the given weights (R1 eq. 1, 2).

        ratio = exp(logp - old_logp)
        gain  = min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) * A)
        kl    = exp(ref_logp - logp) - (ref_logp - logp) - 1     (k3, eq. 2)
        loss  = sum(loss_weight * (kl_coef * kl - gain))

    is the default; `GrpoObjective` says what else there is. Eq. 1 prints the ratio of whole sequences. GRPO as its
    source (DeepSeekMath) defines it and as every trainer implements it takes the ratio of each token: the default.
    `ratio_level="sequence"` is the literal reading: logp, old_logp and ref_logp are summed over the weighted tokens of
    each sequence first. Positions of weight 0 may hold anything, NaN included. Log-ratios are cut off at 20, where
    ratio and gradient would overflow (a long sequence under ratio_level="sequence" gets there): above it no gradient
    flows. On a GPU loss, gradients and metrics come from one launch, with the same bits in every run.

    Args:
        logp:         [T] float, log-probability of each token under the policy (nats); differentiable.
        old_logp:     [T] float, the same under the policy that the rollout was drawn from. None: that is this very
                      policy, every ratio is 1 and the gradient the policy gradient.
        advantage:    [T] float, advantage of the token's sequence.
        loss_weight:  [T] float, weight of the token; 1/(N*|o_i|) for eq. 1, 0 for prompt and padding.
        objective:    the loss and its constants; None: GrpoObjective(), R1's without the KL term.
        entropy:      [T] float, entropy of the policy at each token (nats); differentiable; needed if entropy_coef.
        ref_logp:     [T] float, log-probability under the frozen reference; needed if kl_coef.
        rollout_logp: [T] float, log-probability that the generator reported; needed if tis is not off.
        cu_seqlens:   [S+1] int, first token of each sequence, then T; needed if a level is not "token".
        impl:         force an implementation; None picks one.

    Returns:
        The loss, a scalar in logp's dtype (Triton: float32), and GrpoMetrics.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option lacks the tensor that it needs.

    Example:
        >>> import torch
        >>> logp = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
        >>> old_logp, advantage = torch.tensor([-1.2, -0.5, -1.0]), torch.tensor([1.0, 1.0, -1.0])
        >>> loss, metrics = grpo_loss(logp, old_logp, advantage, torch.full((3,), 1 / 3), GrpoObjective(clip_eps=0.2))
        >>> loss.item(), metrics.clip_fraction.item()
        (-0.46666666865348816, 0.6666666865348816)
        >>> loss.backward()
        >>> logp.grad
        tensor([ 0.0000, -0.3333,  0.0000])
    """
    op = "grpo_loss"
    o = GrpoObjective() if objective is None else objective
    terms = TokenTerms(old_logp, advantage, loss_weight, ref_logp, rollout_logp)
    if is_traced(logp):
        from r1kernels.grpo_loss.torch_op import traced

        chosen = traced_choice(op, impl, logp.device.type, HAVE)
        return traced(logp, terms, o, entropy, cu_seqlens if o.needs_sequences else None, chosen)
    check_tensors(op, o, logp, terms, entropy)
    if o.needs_sequences:
        _check_cu_seqlens(op, cu_seqlens, logp)
    chosen = choose(op, impl, logp, have=HAVE)
    if chosen == "reference":
        from r1kernels.grpo_loss.reference import grpo_loss_reference

        loss, metrics = grpo_loss_reference(logp, terms, o, entropy, cu_seqlens if o.needs_sequences else None)
        return loss, GrpoMetrics(*metrics)
    from r1kernels.grpo_loss.triton_impl import GrpoLoss

    entropy, cu_seqlens = (None if x is None else x.contiguous() for x in (entropy, cu_seqlens))
    terms = terms.each(lambda x: x.detach().contiguous())
    loss, metrics = GrpoLoss.apply(logp.contiguous(), entropy, terms, o, cu_seqlens)
    return loss, GrpoMetrics(*metrics.unbind())


def _check_cu_seqlens(op: str, cu_seqlens: torch.Tensor | None, logp: torch.Tensor) -> None:
    if cu_seqlens is None:
        raise ValueError(f"{op}: ratio_level or tis_level of sequences needs cu_seqlens, got None")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != logp.device:
        raise ValueError(
            f"{op}: cu_seqlens must be [S+1] int32 or int64 on {logp.device}, "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if cu_seqlens.device.type != "cpu":
        return  # to look at the values would wait for the device
    if not cu_seqlens.numel() or cu_seqlens[0] != 0 or cu_seqlens[-1] != logp.numel() or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to {logp.numel()}, got {cu_seqlens.tolist()[:10]}")
