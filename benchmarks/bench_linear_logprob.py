"""linear_logprob against whole logits: time, peak extra memory, forward and with gradients.

python benchmarks/bench_linear_logprob.py --device cpu
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import peers
import timing
import torch

from r1kernels import linear_logprob

CPU_SHAPES = [(2048, 128, 32_000), (2048, 1024, 32_000)]  # T, H, V
GPU_SHAPES = [(8192, 1536, 151_936), (8192, 4096, 131_072), (4096, 7168, 129_280)]
SMOKE_SHAPES = [(64, 32, 500)]


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual way: materialised logits, log_softmax, gather."""
    return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(-1, labels[:, None])[:, 0]


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, entropy: bool) -> torch.Tensor:
    return linear_logprob(hidden, weight, labels, return_entropy=entropy).logp


def candidates(device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """name -> logp [T] of (hidden, weight, labels)."""
    found = {"ours": partial(ours, entropy=False), "ours with entropy": partial(ours, entropy=True)}
    found["whole logits"] = whole_logits
    if device.type == "cuda":
        found["torch.compile"] = torch.compile(whole_logits)
    return found | peers.installed(peers.LINEAR_LOGP, device)


def measure(shape: tuple[int, int, int], device: torch.device, rounds: int) -> None:
    tokens, size, vocab = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(tokens, size, device=device, dtype=dtype)
    weight = (torch.randn(vocab, size, device=device) * size**-0.5).to(dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    runs = candidates(device)

    def forward(call: Callable) -> None:
        with torch.no_grad():
            call(hidden, weight, labels)

    def both(call: Callable) -> None:
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        call(*inputs, labels).sum().backward()

    for kind, run in (("forward", forward), ("forward + backward", both)):
        calls = peers.working({name: partial(run, call) for name, call in runs.items()}, peers.LINEAR_LOGP)
        if kind == "forward":  # what no candidate can do without: one product, into memory that is there
            out = torch.empty(tokens, vocab, device=device, dtype=dtype)
            calls["product alone"] = lambda out=out: torch.mm(hidden, weight.t(), out=out)
        taken = timing.compared(calls, device, rounds=rounds, clock=time.process_time)
        for name, call in calls.items():
            row = timing.summary(taken[name]) | {"peak_extra_mb": timing.extra_bytes(call, device) / 1e6}
            row |= {"tokens": tokens, "hidden": size, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
            row["clock"] = "GPU seconds" if device.type == "cuda" else "CPU seconds of the process"
            timing.emit("linear_logprob", f"{kind}: {name}", device, row)


def main() -> None:
    args = timing.arguments(__doc__)
    shapes = SMOKE_SHAPES if args.smoke else GPU_SHAPES if args.device.type == "cuda" else CPU_SHAPES
    for shape in shapes:
        measure(shape, args.device, rounds=1 if args.smoke else 5)


if __name__ == "__main__":
    main()
