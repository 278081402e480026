"""grpo_loss: time, memory and kernel launches against TRL's and verl's formulas in eager PyTorch, and compiled.

python benchmarks/bench_grpo_loss.py --device cuda
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timing
import torch

from r1kernels import GrpoObjective, grpo_loss

BYTES = 7 * 4  # a token's, that nobody can do without: six numbers read, the gradient written
OBJECTIVE = GrpoObjective(clip_eps=0.2, clip_eps_high=0.28, dual_clip=3.0, kl_coef=0.04, tis="truncate")


def verl_formula(logp, old, advantage, weight, ref, rollout):
    """verl's vanilla policy loss with dual clip, low-variance KL, truncated importance sampling and its metrics."""
    log_ratio = (logp - old).clamp(-20, 20)
    ratio = log_ratio.exp()
    first, second = -advantage * ratio, -advantage * ratio.clamp(0.8, 1.28)
    clipped = torch.maximum(first, second)
    lower = torch.minimum(-advantage * 3.0, clipped)
    policy = torch.where(advantage < 0, lower, clipped) * (old - rollout).exp().clamp(max=2.0)
    d = (ref - logp).clamp(-20, 20)
    kl = (d.exp() - d - 1).clamp(-10, 10)
    loss = ((policy + 0.04 * kl) * weight).sum()
    metrics = (kl, (second > first).float(), ((clipped > lower) & (advantage < 0)).float(), ratio, -log_ratio)
    return loss, [(weight * x.detach()).sum() for x in metrics]


def trl_formula(logp, old, advantage, weight, ref, rollout):
    """TRL's loss of tokens: an upper bound of the ratio (its delta), truncated importance sampling, KL, its metrics."""
    ratio = (logp - old).exp()
    policy = -torch.minimum(ratio.clamp(max=3.0) * advantage, ratio.clamp(0.8, 1.28) * advantage)
    d = ref - logp
    kl = d.exp() - d - 1
    loss = ((policy * (old - rollout).exp().clamp(max=2.0) + 0.04 * kl) * weight).sum()
    low, high = (ratio < 0.8) & (advantage < 0), (ratio > 1.28) & (advantage > 0)
    return loss, [(weight * x.detach()).sum() for x in (kl, low.float(), high.float(), (low | high).float())]


def ours(logp, old, advantage, weight, ref, rollout, impl=None):
    return grpo_loss(logp, old, advantage, weight, OBJECTIVE, ref_logp=ref, rollout_logp=rollout, impl=impl)


def measure(tokens: int, device: torch.device, rounds: int) -> None:
    logp, advantage = -torch.rand(tokens, device=device), torch.randn(tokens, device=device)
    old, ref, rollout = (logp + 0.1 * torch.randn(tokens, device=device) for _ in range(3))
    weight = torch.full((tokens,), 1 / tokens, device=device)
    runs = {"ours": ours, "verl formula": verl_formula, "TRL formula": trl_formula}
    if device.type == "cuda":
        runs["torch.compile"] = torch.compile(verl_formula)
    rate = timing.copy_rate(device, tokens * BYTES // 2)

    def step(run: Callable) -> None:
        x = logp.detach().requires_grad_()
        run(x, old, advantage, weight, ref, rollout)[0].backward()

    calls = {name: partial(step, run) for name, run in runs.items()}
    taken = timing.compared(calls, device, rounds=rounds)
    for name, call in calls.items():
        row = timing.summary(taken[name]) | {"tokens": tokens, "launches": timing.launches(call, device)}
        row["extra_mb"] = timing.extra_bytes(call, device) / 2**20
        row["of_copy_rate"] = tokens * BYTES / rate / row["median"]
        timing.emit("grpo_loss", f"forward + backward: {name}", device, row)


def main() -> None:
    args = timing.arguments(__doc__)
    for tokens in [512] if args.smoke else [4096, 65_536]:
        measure(tokens, args.device, rounds=1 if args.smoke else 20)


if __name__ == "__main__":
    main()
