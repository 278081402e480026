"""group_advantage: time, memory, launches against verl's loop, its vectorized form and TRL's view of equal groups.

python benchmarks/bench_group_advantage.py --device cuda
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import timing
import torch

from r1kernels import group_advantage

BYTES = 4 + 8 + 3 * 4 + 1  # a sample's, that nobody can do without: reward and group read, four results written


def verl_loop(rewards: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """verl's compute_grpo_outcome_advantage: a Python dictionary of groups."""
    groups: dict[int, list[torch.Tensor]] = defaultdict(list)
    for i, group in enumerate(ids):
        groups[group].append(rewards[i])
    stats = {g: (torch.stack(r).mean(), torch.stack(r).std()) for g, r in groups.items()}
    return torch.stack([(rewards[i] - stats[g][0]) / (stats[g][1] + 1e-6) for i, g in enumerate(ids)])


def verl_vectorized(rewards: torch.Tensor, ids: torch.Tensor, groups: int) -> torch.Tensor:
    """verl's group_mean_std: sums by index, one pass."""

    def total(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(groups).index_add_(0, ids, x)

    count, first, second = total(torch.ones_like(rewards)), total(rewards), total(rewards * rewards)
    mean = first / count
    std = ((second - first * mean) / (count - 1).clamp(min=1)).clamp(min=1e-6).sqrt()
    return (rewards - mean[ids]) / (std[ids] + 1e-6)


def trl_view(rewards: torch.Tensor, size: int) -> torch.Tensor:
    """TRL: equal groups only."""
    view = rewards.view(-1, size)
    return ((view - view.mean(1, keepdim=True)) / (view.std(1, keepdim=True) + 1e-4)).view(-1)


def measure(samples: int, device: torch.device, rounds: int) -> None:
    size, groups = 16, samples // 16
    rewards = torch.randint(3, (samples,), device=device).float()
    ids = torch.arange(groups, device=device).repeat_interleave(size)
    cu_groups = torch.arange(0, samples + 1, size, device=device)
    listed = ids.tolist()
    calls = {
        "ours, cu_groups": partial(group_advantage, rewards, cu_groups=cu_groups),
        "ours, group_ids": partial(group_advantage, rewards, ids),
        "verl vectorized": partial(verl_vectorized, rewards, ids, groups),
        "TRL view": partial(trl_view, rewards, size),
    }
    if samples <= 8192:
        calls["verl loop"] = partial(verl_loop, rewards, listed)
    rate = timing.copy_rate(device, samples * BYTES // 2)
    taken = timing.compared(calls, device, rounds=rounds)
    for name, call in calls.items():
        row = timing.summary(taken[name]) | {"samples": samples, "group_size": size}
        row["launches"] = timing.launches(call, device)
        row["extra_mb"] = timing.extra_bytes(call, device) / 2**20
        row["of_copy_rate"] = samples * BYTES / rate / row["median"]
        timing.emit("group_advantage", name, device, row)


def main() -> None:
    args = timing.arguments(__doc__)
    for samples in [64] if args.smoke else [8192, 65_536]:
        measure(samples, args.device, rounds=1 if args.smoke else 10)


if __name__ == "__main__":
    main()
