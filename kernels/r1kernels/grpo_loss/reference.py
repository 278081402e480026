"""What grpo_loss means, in PyTorch with autograd, in the dtype of its inputs."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8; an infinite ratio would make 0 * inf = NaN of a zero gradient


def _sequence_sums(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[T] -> [T]: every position holds the sum of x over its sequence."""
    lengths = cu_seqlens.diff()
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths, output_size=len(x))
    return x.new_zeros(len(lengths)).index_add(0, ids, x)[ids]


def grpo_loss_reference(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    loss_weight: torch.Tensor,
    ref_logp: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (loss, kl, clip_fraction, ratio), scalars. With `cu_seqlens` the ratios are those of whole sequences."""
    is_used = loss_weight != 0

    def log_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        difference = torch.where(is_used, a - b, 0.0)  # unlike a product with 0, drops NaN from value and gradient
        if cu_seqlens is not None:
            difference = _sequence_sums(difference, cu_seqlens)
        return difference.clamp(max=MAX_LOG_RATIO)

    weight = torch.where(is_used, loss_weight, 0.0)
    advantage = torch.where(is_used, advantage, 0.0)
    ratio = log_ratio(logp, old_logp).exp()
    gain = ratio * advantage
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    is_cut = clipped < gain
    gain = torch.minimum(gain, clipped)
    if dual_clip is not None:
        floor = dual_clip * advantage
        is_floored = (advantage < 0) & (gain < floor)
        gain, is_cut = torch.where(is_floored, floor, gain), is_cut | is_floored
    loss = -(weight * gain).sum()
    kl = logp.new_zeros(())
    if ref_logp is not None:
        d = log_ratio(ref_logp, logp)
        kl = (weight * (d.exp() - d - 1)).sum()
        loss = loss + kl_coef * kl
    return loss, kl.detach(), (weight * is_cut).sum(), (weight * ratio).sum().detach()
