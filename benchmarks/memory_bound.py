"""How the ops that only move bytes are measured: seconds, and bytes/s as a share of what a copy reaches."""

from __future__ import annotations

from collections.abc import Callable

import moe_problem
import timing
import torch

Calls = dict[str, tuple[Callable[[], object], float]]  # name -> (call, bytes that no implementation can avoid to move)


def run(benchmark: str, description: str | None, calls_of: Callable[[moe_problem.Problem], Calls]) -> None:
    """Print a row for each call of each size that the command line asks for."""
    cases, rounds = moe_problem.problems(description)
    for case in cases:
        rate = timing.copy_rate(case.device, moe_problem.copy_bytes(case, rounds))
        for name, (call, num_bytes) in calls_of(case).items():
            taken = timing.summary(timing.call_seconds(call, case.device, rounds=rounds, warmup=min(3, rounds)))
            moved = num_bytes / taken["median"]
            share = {"bytes": num_bytes, "bytes_per_s": moved, "of_copy_rate": moved / rate, "copy_rate": rate}
            timing.emit(benchmark, name, case.device, case.describe() | taken | share)


def megatron_moe_utils() -> object | None:
    """megatron.core's routing functions, None where Megatron is not installed; with Transformer Engine (HAVE_TE) they
    have fused forms."""
    try:
        from megatron.core.transformer.moe import moe_utils
    except ImportError:
        return None
    return moe_utils


def compiled(name: str, function: Callable[[], object], num_bytes: float, device: torch.device) -> Calls:
    """The function by torch.compile, on a GPU; on a CPU nothing, it would measure a C++ compiler."""
    return {f"{name}, torch.compile": (torch.compile(function), num_bytes)} if device.type == "cuda" else {}
