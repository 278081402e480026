"""torch.ops.r1kernels.group_advantage: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

from typing import Any

import torch

from r1kernels.group_advantage import GroupAdvantage, group_advantage


@torch.library.custom_op("r1kernels::group_advantage", mutates_args=())
def advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor | None,
    cu_groups: torch.Tensor | None,
    mode: str,
    ddof: int,
    eps: float,
    eps_mode: str,
    singleton: str,
    nan: str,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of GroupAdvantage."""
    given: dict[str, Any] = {"mode": mode, "ddof": ddof, "eps": eps, "eps_mode": eps_mode, "singleton": singleton}
    given |= {"nan": nan, "impl": impl}
    found = group_advantage(rewards, group_ids, cu_groups=cu_groups, **given)
    advantage, mean, std, is_active = (x.clone(memory_format=torch.contiguous_format) for x in found)
    return advantage, mean, std, is_active


@advantages.register_fake
def _(rewards, *rest):
    floats = [rewards.new_empty(rewards.shape, dtype=torch.float32) for _ in range(3)]
    return *floats, rewards.new_empty(rewards.shape, dtype=torch.bool)


def traced(rewards: torch.Tensor, *arguments: Any) -> GroupAdvantage:
    """`group_advantage` as one node of a graph; `arguments` as the op has them."""
    return GroupAdvantage(*advantages(rewards.detach(), *arguments))
