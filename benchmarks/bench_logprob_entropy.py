"""logprob_entropy beside what else is installed: forward, and forward + backward.

On a GPU: bfloat16 logits, cold L2, fraction of the copy bandwidth measured in the same run. On a CPU: float32 at the
aim's shape. Peak extra memory is what a call needs beside the logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from functools import partial

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
    if device.type == "cpu":
        return runs
    runs["torch.compile"] = torch.compile(eager, dynamic=True)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        runs["flash-attn"] = lambda x, y: -cross_entropy_loss(x, y, inplace_backward=True)[0]
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        runs["liger"] = lambda x, y: -liger_cross_entropy(x, y, reduction="none")
    if importlib.util.find_spec("quack"):
        from quack.cross_entropy import cross_entropy

        runs["quack"] = lambda x, y: -cross_entropy(x, y, reduction="none", inplace_backward=True)
    return runs


def step(run: Run, logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, *, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            run(logits, labels)
        return
    # An in-place backward destroys the values, not the speed: a gradient is as good as logits to measure with.
    x = logits.detach().requires_grad_()
    torch.autograd.grad(run(x, labels).float(), x, weight)


def extra_bytes(call: Callable[[], None], device: torch.device) -> int:
    """Most bytes that a call holds beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def measure(device: torch.device, shape: tuple[int, int], *, rounds: int) -> None:
    tokens, vocab = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    logits = torch.randn(shape, device=device, dtype=dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    weight = torch.randn(tokens, device=device)
    size = logits.numel() * logits.element_size()
    spare = torch.empty_like(logits)

    def copy() -> None:
        spare.copy_(logits)

    for backward in (False, True):
        calls: dict[str, Callable[[], None]] = {"copy": copy}
        for name, run in contestants(device).items():
            calls[name] = partial(step, run, logits.clone(), labels, weight, backward=backward)
        if device.type == "cuda":
            taken = {name: timing.cold_kernel_seconds(call, rounds=rounds, warmup=3) for name, call in calls.items()}
        else:
            timed = {name: partial(timing.seconds, call, device) for name, call in calls.items()}
            taken = timing.interleaved(timed, rounds=rounds, warmup=1)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        for name in contestants(device):
            moved = size * (3 if backward else 1)  # the least: logits read in each pass, the gradient written
            row = timing.summary(taken[name]) | {
                "tokens": tokens,
                "vocab": vocab,
                "dtype": str(dtype),
                "backward": backward,
                "eager/this": medians["torch eager"] / medians[name],
                "extra_mb": extra_bytes(calls[name], device) / 2**20,
                "gb_per_s": moved / medians[name] / 1e9,
                "of_copy": (moved / medians[name]) / (2 * size / medians["copy"]),
            }
            timing.emit("logprob_entropy", name, device, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shape, to see that it runs")
    args = parser.parse_args()
    device = timing.use_device(args.device)
    shapes = [(2048, 32000)] if device.type == "cpu" else [(8192, 151936), (16384, 129280)]
    for shape in [(8, 128)] if args.smoke else shapes:
        measure(device, shape, rounds=2 if args.smoke else 5 if device.type == "cpu" else 20)


if __name__ == "__main__":
    main()
