"""Group-relative advantages (R1 eq. 3) of groups of any sizes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from r1kernels.dispatch import Impl, check_float, choose


class GroupAdvantage(NamedTuple):
    """What `group_advantage` returns."""

    advantage: torch.Tensor  # [N] float32
    mean: torch.Tensor  # [N] float32, mean reward of the sample's group
    std: torch.Tensor  # [N] float32, its standard deviation; 0 for a group of one
    is_active: torch.Tensor  # [N] bool, False where the group gives no signal (equal rewards)


def group_advantage(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    mode: Literal["mean_std", "mean"] = "mean_std",
    ddof: int = 1,
    impl: Impl | None = None,
) -> GroupAdvantage:
    """Advantage of each sample against the other samples of its question (R1 eq. 3).

        mean_std:  A_i = (r_i - mean(r)) / std(r)
        mean:      A_i =  r_i - mean(r)                 (Dr. GRPO)

    A group whose rewards are all equal gives exactly 0, with no epsilon in the denominator; so does a
    group of one sample. The sums run in float64 in two passes. Eq. 3 does not say which standard
    deviation: ddof=1 (sample) is what TRL, verl and slime use.

    Args:
        rewards:   [N] float, finite.
        group_ids: [N] int64 in [0, number of groups); groups may have any sizes and any order.
        mode:      as above.
        ddof:      0 or 1, degrees of freedom taken from the standard deviation.
        impl:      force an implementation; None picks one.

    Returns:
        GroupAdvantage(advantage, mean, std, is_active), each [N].

    Raises:
        ValueError: shapes or dtypes do not fit, the mode or ddof is unknown, or a reward is not finite or a group
            id negative (these two on a CPU only: on a GPU the check would wait for the device).
    """
    op = "group_advantage"
    check_float(op, "rewards", rewards)
    choose(op, impl, rewards, have=("reference",))
    if rewards.dim() != 1 or group_ids.shape != rewards.shape or group_ids.dtype != torch.int64:
        raise ValueError(
            f"{op}: rewards [N] and group_ids [N] int64 are required, "
            f"got {tuple(rewards.shape)} and {group_ids.dtype} {tuple(group_ids.shape)}"
        )
    if mode not in ("mean_std", "mean"):
        raise ValueError(f"{op}: mode must be 'mean_std' or 'mean', got {mode!r}")
    if ddof not in (0, 1):
        raise ValueError(f"{op}: ddof must be 0 or 1, got {ddof}")
    if rewards.device.type == "cpu" and not rewards.isfinite().all():
        where = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"{op}: rewards must be finite, got {float(rewards[where])} at {where}")
    if group_ids.device.type == "cpu" and (group_ids < 0).any():
        raise ValueError(f"{op}: group_ids must be >= 0, got {int(group_ids.min())}")
    from r1kernels.group_advantage.reference import group_advantage_reference

    return GroupAdvantage(*group_advantage_reference(rewards, group_ids, mode == "mean_std", ddof))
