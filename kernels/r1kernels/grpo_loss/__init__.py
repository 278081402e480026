"""The GRPO objective of a packed row (R1 eq. 1 and 2): loss, gradient and metrics."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from r1kernels.dispatch import Impl, check_float, check_same_shape, choose


class GrpoMetrics(NamedTuple):
    """Sums over the row, weighted by `loss_weight`; as the weights of a mini-batch sum to 1, adding the
    rows of a mini-batch gives means. Scalars on the device of the inputs, without gradient."""

    kl: torch.Tensor  # k3 estimate of KL(policy || reference), 0 without a reference
    clip_fraction: torch.Tensor  # share of tokens whose gradient the clip cut off
    ratio: torch.Tensor  # mean of pi / pi_old


def grpo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    *,
    ref_logp: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ratio_level: Literal["token", "sequence"] = "token",
    clip_eps: float = 10.0,
    clip_eps_high: float | None = None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, GrpoMetrics]:
    """Negated GRPO objective, summed over the row with the given weights (R1 eq. 1, 2).

        ratio = exp(logp - old_logp)
        gain  = min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) * A)
        gain  = max(gain, dual_clip * A)                         where A < 0, if dual_clip is set
        kl    = exp(ref_logp - logp) - (ref_logp - logp) - 1     (k3, eq. 2)
        loss  = sum(loss_weight * (kl_coef * kl - gain))

    Eq. 1 prints the ratio of whole sequences. GRPO as its source (DeepSeekMath) defines it and as every
    trainer implements it takes the ratio of each token: the default. `ratio_level="sequence"` is the
    literal reading: logp, old_logp and ref_logp are summed over the weighted tokens of each sequence first.
    Positions of weight 0 may hold anything, NaN included. Log-ratios are cut off at 20, where ratio and gradient
    would overflow (a long sequence under ratio_level="sequence" gets there): above it no gradient flows.

    Args:
        logp:          [T] float, log-probability of each token under the policy (nats); differentiable.
        old_logp:      [T] float, the same under the policy that the rollout was drawn from.
        advantage:     [T] float, advantage of the token's sequence.
        loss_weight:   [T] float, weight of the token; 1/(N*|o_i|) for eq. 1, 0 for prompt and padding.
        ref_logp:      [T] float, log-probability under the frozen reference; needed if kl_coef > 0.
        cu_seqlens:    [S+1] int, first token of each sequence, then T; needed for ratio_level="sequence".
        ratio_level:   as above.
        clip_eps:      clip range below 1, and above it unless clip_eps_high is given (R1 uses 10).
        clip_eps_high: clip range above 1 (DAPO's clip-higher).
        dual_clip:     bound c > 1 of the loss of negative advantages: at most -c * A.
        kl_coef:       weight of the KL term (R1 uses 0.001).
        impl:          force an implementation; None picks one.

    Returns:
        The loss, a scalar, and GrpoMetrics.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option lacks the tensor that it needs.
    """
    op = "grpo_loss"
    check_float(op, "logp", logp)
    check_same_shape(
        op,
        ("logp", logp),
        ("old_logp", old_logp),
        ("advantage", advantage),
        ("loss_weight", loss_weight),
        ("ref_logp", ref_logp),
    )
    choose(op, impl, logp, have=("reference",))
    if kl_coef and ref_logp is None:
        raise ValueError(f"{op}: kl_coef={kl_coef} needs ref_logp, got None")
    if ratio_level not in ("token", "sequence"):
        raise ValueError(f"{op}: ratio_level must be 'token' or 'sequence', got {ratio_level!r}")
    if ratio_level == "sequence" and cu_seqlens is None:
        raise ValueError(f"{op}: ratio_level='sequence' needs cu_seqlens, got None")
    from r1kernels.grpo_loss.reference import grpo_loss_reference

    loss, *metrics = grpo_loss_reference(
        logp,
        old_logp,
        advantage,
        loss_weight,
        ref_logp,
        cu_seqlens if ratio_level == "sequence" else None,
        clip_eps,
        clip_eps if clip_eps_high is None else clip_eps_high,
        dual_clip,
        kl_coef,
    )
    return loss, GrpoMetrics(*metrics)
