"""linear_logprob against whole logits: time, peak extra memory, forward and with gradients.

python benchmarks/bench_linear_logprob.py --device cpu
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timing
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from r1kernels import linear_logprob

CPU_SHAPES = [(2048, 128, 32_000), (2048, 1024, 32_000)]  # T, H, V
GPU_SHAPES = [(8192, 1536, 151_936), (8192, 4096, 131_072), (4096, 7168, 129_280)]
SMOKE_SHAPES = [(64, 32, 500)]


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual way: materialised logits, log_softmax, gather."""
    return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(-1, labels[:, None])[:, 0]


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, entropy: bool) -> torch.Tensor:
    return linear_logprob(hidden, weight, labels, return_entropy=entropy).logp


def liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none")


def cut_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


def candidates(device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """name -> logp [T] of (hidden, weight, labels); what is not installed is left out, and said so."""
    found = {"ours": partial(ours, entropy=False), "ours with entropy": partial(ours, entropy=True)}
    found["whole logits"] = whole_logits
    if device.type == "cpu":
        return found
    found["torch.compile"] = torch.compile(whole_logits)
    for name, call in (("liger_kernel", liger), ("cut_cross_entropy", cut_cross_entropy)):
        try:
            __import__(name)
        except ImportError:
            timing.note(f"bench_linear_logprob: {name} is not installed, left out")
            continue
        found[name] = call
    return found


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` has allocated at most beyond what there was."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(shape: tuple[int, int, int], device: torch.device, rounds: int) -> None:
    tokens, size, vocab = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(tokens, size, device=device, dtype=dtype)
    weight = (torch.randn(vocab, size, device=device) * size**-0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def forward(call: Callable) -> None:
        with torch.no_grad():
            call(hidden, weight, labels)

    def both(call: Callable) -> None:
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        call(*inputs, labels).sum().backward()

    for kind, run in (("forward", forward), ("forward + backward", both)):
        calls = {name: partial(run, call) for name, call in candidates(device).items()}
        out = torch.empty(tokens, vocab, device=device, dtype=dtype) if kind == "forward" else None
        if out is not None:  # what no candidate can do without: one product, into memory that is there
            calls["product alone"] = lambda out=out: torch.mm(hidden, weight.t(), out=out)

        def timed(call: Callable[[], object]) -> float:
            if device.type == "cuda":
                return timing.seconds(call, device)
            start = clock()
            call()
            return clock() - start

        taken = timing.interleaved({n: partial(timed, c) for n, c in calls.items()}, rounds=rounds, warmup=1)
        for name, call in calls.items():
            row = timing.summary(taken[name]) | {"peak_extra_mb": peak_bytes(call, device) / 1e6}
            row |= {"tokens": tokens, "hidden": size, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
            row["clock"] = "wall seconds" if device.type == "cuda" else "CPU seconds of the process"
            timing.emit("linear_logprob", f"{kind}: {name}", device, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    device = timing.use_device(args.device)
    torch.set_num_threads(args.threads)
    shapes = SMOKE_SHAPES if args.smoke else GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        measure(shape, device, rounds=1 if args.smoke else 5)


if __name__ == "__main__":
    main()
