"""linear_grpo_loss (three matrix products) against linear_logprob + grpo_loss (four), others' four, and whole logits.

python benchmarks/bench_linear_grpo_loss.py --device cpu
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import peers
import timing
import torch

from r1kernels import GrpoObjective, grpo_loss, linear_grpo_loss, linear_logprob
from r1kernels.linear_grpo_loss.reference import linear_grpo_loss_reference

CPU_SHAPES = [(1024, 256, 32_000)]  # T, H, V
GPU_SHAPES = [(8192, 1536, 151_936), (8192, 4096, 131_072), (4096, 7168, 129_280)]
OBJECTIVE = GrpoObjective(clip_eps=0.2, kl_coef=0.04)


def four_products(hidden, weight, labels, old, advantage, loss_weight, *, ref_logp):
    logp = linear_logprob(hidden, weight, labels, return_entropy=False).logp
    return grpo_loss(logp, old, advantage, loss_weight, OBJECTIVE, ref_logp=ref_logp)[0]


def three_products(hidden, weight, labels, old, advantage, loss_weight, *, ref_logp):
    return linear_grpo_loss(hidden, weight, labels, old, advantage, loss_weight, OBJECTIVE, ref_logp=ref_logp).loss


def whole_logits(hidden, weight, labels, old, advantage, loss_weight, *, ref_logp):
    tensors = hidden, weight, labels, old, advantage, loss_weight
    return linear_grpo_loss_reference(*tensors, OBJECTIVE, ref_logp=ref_logp)[0]


def theirs(op, hidden, weight, labels, old, advantage, loss_weight, *, ref_logp):
    """Another project's log-probabilities, four products, and our loss."""
    return grpo_loss(op(hidden, weight, labels).float(), old, advantage, loss_weight, OBJECTIVE, ref_logp=ref_logp)[0]


def measure(shape: tuple[int, int, int], device: torch.device, rounds: int) -> None:
    tokens, size, vocab = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(tokens, size, device=device, dtype=dtype)
    weight = (torch.randn(vocab, size, device=device) * size**-0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    old = -10 - torch.rand(tokens, device=device)
    fixed = labels, old, torch.randn(tokens, device=device), torch.full((tokens,), 1 / tokens, device=device)

    def step(call: Callable) -> None:
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        call(*inputs, *fixed, ref_logp=old).backward()

    runs = {"three products": three_products, "four products": four_products, "whole logits": whole_logits}
    if device.type == "cuda":
        runs["torch.compile"] = torch.compile(whole_logits)
    for name, op in peers.installed(peers.LINEAR_LOGP, device).items():
        runs[name] = partial(theirs, op)
    calls = peers.working({name: partial(step, run) for name, run in runs.items()}, peers.LINEAR_LOGP)
    taken = timing.compared(calls, device, rounds=rounds, clock=time.process_time)
    for name, call in calls.items():
        row = timing.summary(taken[name]) | {"peak_extra_mb": timing.extra_bytes(call, device) / 1e6}
        row["tflops_of_three"] = 6 * tokens * size * vocab / row["median"] / 1e12
        row |= {"tokens": tokens, "hidden": size, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
        row["clock"] = "GPU seconds" if device.type == "cuda" else "CPU seconds of the process"
        timing.emit("linear_grpo_loss", name, device, row)


def main() -> None:
    args = timing.arguments(__doc__)
    shapes = [(64, 32, 500)] if args.smoke else GPU_SHAPES if args.device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        measure(shape, args.device, rounds=1 if args.smoke else 5)


if __name__ == "__main__":
    main()
