"""logprob_entropy beside what else is installed: forward, and forward + backward.

On a GPU: bfloat16 logits, cold L2, fraction of the copy bandwidth measured in the same run. On a CPU: float32 at the
aim's shape. Peak extra memory is what a call needs beside the logits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import peers
import timing
import torch

from r1kernels import logprob_entropy

Run = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits, labels) -> logp


def eager(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(1, labels[:, None])[:, 0]


def contestants(device: torch.device) -> dict[str, Run]:
    """name -> log-probabilities; ours returns the entropy as well."""
    runs: dict[str, Run] = {
        "ours": lambda x, y: logprob_entropy(x, y).logp,
        "ours in place": lambda x, y: logprob_entropy(x, y, inplace_backward=True).logp,
        "ours, no entropy": lambda x, y: logprob_entropy(x, y, return_entropy=False, inplace_backward=True).logp,
        "torch eager": eager,
    }
    if device.type == "cuda":
        runs["torch.compile"] = torch.compile(eager, dynamic=True)
    return runs | peers.installed(peers.LOGP, device)


def step(run: Run, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, *, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            run(logits, labels)
        return
    # An in-place backward destroys the values, not the speed: a gradient is as good as logits to measure with.
    x = logits.detach().requires_grad_()
    torch.autograd.grad(run(x, labels).float(), x, weight)


def measure(device: torch.device, shape: tuple[int, int], *, rounds: int) -> None:
    tokens, vocab = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = torch.randn(shape, device=device, dtype=dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    weight = torch.randn(tokens, device=device)
    size = logits.numel() * logits.element_size()
    runs, scratch = contestants(device), logits.clone()
    spare = torch.empty_like(logits)
    for backward in (False, True):
        calls = {name: partial(step, run, scratch, labels, weight, backward=backward) for name, run in runs.items()}
        calls = peers.working(calls, peers.LOGP)
        taken = timing.compared(calls | {"copy": lambda: spare.copy_(logits)}, device, rounds=rounds)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        for name, call in calls.items():
            moved = size * (3 if backward else 1)  # the least: logits read in each pass, the gradient written
            row = timing.summary(taken[name]) | {
                "tokens": tokens,
                "vocab": vocab,
                "dtype": str(dtype),
                "backward": backward,
                "eager/this": medians["torch eager"] / medians[name],
                "extra_mb": timing.extra_bytes(call, device) / 2**20,
                "gb_per_s": moved / medians[name] / 1e9,
                "of_copy": (moved / medians[name]) / (2 * size / medians["copy"]),
            }
            timing.emit("logprob_entropy", name, device, row)


def main() -> None:
    args = timing.arguments(__doc__)
    shapes = [(2048, 32000)] if args.device.type == "cpu" else [(8192, 151936), (16384, 129280)]
    for shape in [(8, 128)] if args.smoke else shapes:
        measure(args.device, shape, rounds=2 if args.smoke else 5 if args.device.type == "cpu" else 20)


if __name__ == "__main__":
    main()
