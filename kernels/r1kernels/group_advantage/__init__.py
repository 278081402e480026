"""Group-relative advantages (R1 eq. 3) of groups of any sizes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch

from r1kernels.dispatch import Impl, check_float, choose
from r1kernels.tracing import is_traced, traced_choice

HAVE = ("triton", "reference")

Mode = Literal["mean_std", "mean", "rloo", "batch_std"]


class GroupAdvantage(NamedTuple):
    """What `group_advantage` returns."""

    advantage: torch.Tensor  # [N] float32
    mean: torch.Tensor  # [N] float32, mean reward of the sample's group
    std: torch.Tensor  # [N] float32, the standard deviation of its group (batch_std: of the batch); 0 if equal
    is_active: torch.Tensor  # [N] bool, False where the group gives no signal (equal rewards)


def group_advantage(
    rewards: torch.Tensor,
    group_ids: torch.Tensor | None = None,
    *,
    cu_groups: torch.Tensor | None = None,
    mode: Mode = "mean_std",
    ddof: int = 1,
    eps: float = 0.0,
    eps_mode: Literal["add", "clamp"] = "add",
    singleton: Literal["zero", "raw"] = "zero",
    nan: Literal["error", "zero", "propagate"] = "error",
    impl: Impl | None = None,
) -> GroupAdvantage:
    """Advantage of each sample against the other samples of its question (R1 eq. 3).

        mean_std:   A_i = (r_i - mean(r)) / std(r)
        mean:       A_i =  r_i - mean(r)                                (Dr. GRPO)
        rloo:       A_i =  r_i - mean(r of the others)                  (leave one out)
        batch_std:  A_i = (r_i - mean(r)) / std(all rewards of the call)

    A group whose rewards are all equal gives exactly 0, whatever the rounding of its mean. Rewards are equal if they
    lie within four units in the last place of the largest: 0.1 + 0.2 is 0.3. The unit is that of float64 or float32,
    as the rewards have it; in 16 bits a unit is a difference, and only the same numbers are equal. The sums run in
    float64 in two passes, in a fixed order: the same bits in every run. Eq. 3 does not say which standard deviation:
    ddof=1 (sample) is what TRL, verl and slime use. It has no epsilon either; verl and slime add 1e-6, TRL 1e-4.

    On a GPU it is one launch. With cu_groups a program has one group: O(N). With group_ids in any order each block of
    16 samples looks through all of them; blocks that share no group are skipped.

    Args:
        rewards:   [N] float.
        group_ids: [N] int64, >= 0; groups may have any sizes and any order. Either this or cu_groups.
        cu_groups: [G+1] int32 or int64, first sample of each group, then N: groups lie one after the other.
        mode:      as above.
        ddof:      0 or 1, degrees of freedom taken from the standard deviation.
        eps:       >= 0, keeps the divisor away from 0.
        eps_mode:  "add": std + eps; "clamp": max(std, eps).
        singleton: advantage of a sample alone in its group: "zero", or "raw": its reward over the divisor of a group
                   with std 1 (mean_std: 1 and eps; batch_std: the batch's; else 1), as verl has it.
        nan:       rewards that are not finite: "error"; "zero": not counted in the group, advantage 0; "propagate":
                   the group's mean, std and advantages are not finite either. On a GPU "error" would wait for the
                   device: there it does what "propagate" does.
        impl:      force an implementation; None picks one.

    Returns:
        GroupAdvantage(advantage, mean, std, is_active), each [N].

    Raises:
        ValueError: shapes or dtypes do not fit, an option is unknown, or (on a CPU only: on a GPU the check would wait
            for the device) a reward is not finite, a group id is negative or cu_groups does not rise from 0 to N.

    Example:
        >>> import torch
        >>> rewards, questions = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
        >>> found = group_advantage(rewards, questions)
        >>> found.advantage, found.is_active
        (tensor([ 1.1547, -0.5774, -0.5774,  0.0000,  0.0000]), tensor([ True,  True,  True, False, False]))
    """
    op = "group_advantage"
    if is_traced(rewards):
        from r1kernels.group_advantage.torch_op import traced

        chosen = traced_choice(op, impl, rewards.device.type, HAVE)
        return traced(rewards, group_ids, cu_groups, mode, ddof, eps, eps_mode, singleton, nan, chosen)
    check_float(op, "rewards", rewards)
    chosen = choose(op, impl, rewards, have=HAVE)
    _check_groups(op, rewards, group_ids, cu_groups)
    _check_options(op, mode=(mode, get_args(Mode)), eps_mode=(eps_mode, ("add", "clamp")))
    _check_options(op, singleton=(singleton, ("zero", "raw")), nan=(nan, ("error", "zero", "propagate")))
    if ddof not in (0, 1):
        raise ValueError(f"{op}: ddof must be 0 or 1, got {ddof}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0, got {eps}")
    if nan == "error" and rewards.device.type == "cpu" and not rewards.isfinite().all():
        where = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"{op}: rewards must be finite, got {float(rewards[where])} at {where}")
    options: dict[str, Any] = {"mode": mode, "ddof": ddof, "eps": eps}
    options |= {"clamps": eps_mode == "clamp", "raw": singleton == "raw"}
    options |= {"skips": nan == "zero", "rounding": _rounding(rewards.dtype)}
    if chosen == "reference":
        from r1kernels.group_advantage.reference import group_advantage_reference as run
    else:
        from r1kernels.group_advantage.triton_impl import group_advantage_triton as run
    return GroupAdvantage(*run(rewards.detach(), group_ids, cu_groups, **options))


def _rounding(dtype: torch.dtype) -> float:
    """The spread of rewards, relative to the largest, that their rounding can make."""
    return 4 * torch.finfo(dtype).eps if dtype.itemsize >= 4 else 0.0


def _check_groups(
    op: str, rewards: torch.Tensor, group_ids: torch.Tensor | None, cu_groups: torch.Tensor | None
) -> None:
    if (group_ids is None) == (cu_groups is None):
        raise ValueError(
            f"{op}: one of group_ids and cu_groups is required, got {'none' if cu_groups is None else 'both'}"
        )
    if rewards.dim() != 1:
        raise ValueError(f"{op}: rewards must be [N], got {tuple(rewards.shape)}")
    is_here = rewards.device.type == "cpu"
    if group_ids is not None:
        if group_ids.shape != rewards.shape or group_ids.dtype != torch.int64 or group_ids.device != rewards.device:
            raise ValueError(
                f"{op}: group_ids must be int64 {tuple(rewards.shape)} on {rewards.device}, "
                f"got {group_ids.dtype} {tuple(group_ids.shape)} on {group_ids.device}"
            )
        if is_here and (group_ids < 0).any():
            raise ValueError(f"{op}: group_ids must be >= 0, got {int(group_ids.min())}")
    if cu_groups is None:
        return
    is_integer = cu_groups.dtype in (torch.int32, torch.int64)
    if cu_groups.dim() != 1 or not cu_groups.numel() or not is_integer or cu_groups.device != rewards.device:
        raise ValueError(
            f"{op}: cu_groups must be [G+1] int32 or int64 on {rewards.device}, "
            f"got {cu_groups.dtype} {tuple(cu_groups.shape)} on {cu_groups.device}"
        )
    if is_here and (cu_groups[0] != 0 or cu_groups[-1] != len(rewards) or (cu_groups.diff() < 0).any()):
        raise ValueError(f"{op}: cu_groups must rise from 0 to {len(rewards)}, got {cu_groups.tolist()[:10]}")


def _check_options(op: str, **options: tuple[str, tuple[str, ...]]) -> None:
    for name, (found, allowed) in options.items():
        if found not in allowed:
            raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {found!r}")
