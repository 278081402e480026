"""What grpo_loss means, in PyTorch with autograd, in the dtype of its inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from r1kernels.grpo_loss.objective import GrpoObjective
from r1kernels.grpo_loss.terms import TokenTerms

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8; an infinite ratio would make 0 * inf = NaN of a zero gradient


def grpo_loss_reference(
    logp: torch.Tensor,
    terms: TokenTerms,
    objective: GrpoObjective,
    entropy: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """-> the loss and the sums of GrpoMetrics, scalars."""
    old_logp, advantage, loss_weight, ref_logp, rollout_logp = terms
    is_used = loss_weight != 0

    def used(x: torch.Tensor) -> torch.Tensor:
        return torch.where(is_used, x, 0.0)  # unlike a product with 0, drops NaN from value and gradient

    level = _leveller(is_used, cu_seqlens)
    weight, advantage = used(loss_weight), used(advantage)
    old_logp = logp.detach() if old_logp is None else old_logp.detach()
    log_ratio = level(used(logp - old_logp), objective.ratio_level).clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    loss, cut_low, cut_high = _policy(objective, ratio, used(logp), advantage)
    tis, is_off = torch.ones_like(weight), torch.zeros_like(is_used)
    if objective.tis != "off":
        assert rollout_logp is not None  # check_tensors
        log_tis = level(used(old_logp - rollout_logp.detach()), objective.tis_level).clamp(max=MAX_LOG_RATIO)
        tis, is_off = _tis(objective, log_tis.exp())
    total = (weight * tis * loss).sum()
    kl = torch.zeros_like(weight)
    if ref_logp is not None:
        d = used(ref_logp.detach() - logp)
        kl = _kl(objective, level(d, "sequence") if objective.ratio_level == "sequence" else d)
        kl = kl * ratio if objective.kl_importance else kl
        if objective.kl_coef:
            total = total + objective.kl_coef * (weight * kl).sum()
    if objective.entropy_coef:
        assert entropy is not None  # check_tensors
        total = total - objective.entropy_coef * (weight * used(entropy)).sum()
    sums = (kl, cut_low | cut_high, cut_low, ratio, _k3(log_ratio), tis, is_off)
    return total, [(weight * x.detach()).sum() for x in sums]


def _policy(
    o: GrpoObjective, ratio: torch.Tensor, logp: torch.Tensor, advantage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Policy term of each token, and whether the clip changed it from below and from above."""
    clipped = ratio.clamp(1 - o.clip_eps, 1 + o.clip_high)
    if o.loss == "cispo":
        return -clipped.detach() * advantage * logp, clipped > ratio, clipped < ratio
    if o.loss == "sapo":
        tau = torch.where(advantage < 0, ratio.new_tensor(o.sapo_tau_negative), ratio.new_tensor(o.sapo_tau))
        never = torch.zeros_like(ratio, dtype=torch.bool)
        return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantage, never, never
    gain = ratio * advantage
    is_cut = clipped * advantage < gain
    cut_low, cut_high = is_cut & (advantage < 0), is_cut & (advantage > 0)
    gain = torch.minimum(gain, clipped * advantage)
    if o.dual_clip is not None:
        floor = o.dual_clip * advantage
        is_floored = (advantage < 0) & (gain < floor)
        gain, cut_high = torch.where(is_floored, floor, gain), cut_high | is_floored
    return -gain, cut_low, cut_high


def _tis(o: GrpoObjective, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Importance weight of each token, and whether the bounds changed it."""
    is_off = (value < o.tis_low) | (value > o.tis_high)
    inside = value.clamp(o.tis_low, o.tis_high) if o.tis == "truncate" else torch.where(is_off, 0.0, value)
    return inside, is_off


def _kl(o: GrpoObjective, d: torch.Tensor) -> torch.Tensor:
    """KL estimate of each token with the value of `kl` and the gradient of `kl_grad`; d = ref_logp - logp."""
    value = _KL[o.kl](d)
    if o.kl_grad in (None, o.kl):
        return value
    source = _KL[o.kl_grad](d)
    return value.detach() + (source - source.detach())


def _k3(d: torch.Tensor) -> torch.Tensor:
    d = d.clamp(max=MAX_LOG_RATIO)
    return d.expm1() - d  # exp(d) - d - 1 would lose every digit of a small d


_KL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k1": torch.neg,
    "k2": lambda d: d * d / 2,
    "k3": _k3,
    "abs": torch.abs,
}


def _leveller(is_used: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """(x [T], level) -> [T]: x itself, or at every position the sum or mean over the used tokens of its sequence."""
    if cu_seqlens is None:
        return lambda x, level: x
    lengths = cu_seqlens.diff().long()
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=is_used.device), lengths, output_size=len(is_used))

    def sums(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(lengths)).index_add(0, ids, x)[ids]

    def level_of(x: torch.Tensor, level: str) -> torch.Tensor:
        if level == "token":
            return x
        return sums(x) if level == "sequence" else sums(x) / sums(is_used.to(x.dtype)).clamp(min=1)

    return level_of
