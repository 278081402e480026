"""What every benchmark shares: interleaved timing, medians with quartiles, matmul rate, JSON rows.

A row is one line of JSON on stdout with the device, the versions and the date in it, in a terminal a line of a table;
everything else that a benchmark says goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache, partial

import torch
from table import Table

PACKAGES = (
    *("torch", "triton", "megatron-core", "transformers", "flash-attn", "transformer-engine", "trl", "verl"),
    *("liger-kernel", "cut-cross-entropy", "quack-kernels"),
)
SHORT = 200e-6  # seconds: several launches by Python
L2_FLUSH_BYTES = 256 * 2**20  # several times the largest L2 cache (H200: 60 MB)


def use_device(name: str) -> torch.device:
    """The device of this run. For "cpu", GPUs are hidden from this process; call it before anything touches CUDA.

    Raises:
        RuntimeError: "cuda" is asked for and there is none.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise RuntimeError("benchmark: --device cuda, but torch.cuda.is_available() is false")
    return torch.device(name)


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark of an op: `device` (a torch.device), `smoke`; sets the CPU threads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shape, to see that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", action="store_true", help="lines of JSON also in a terminal; a file gets them anyway")
    args = parser.parse_args()
    if args.json:
        os.environ["R1_BENCHMARK_JSON"] = "1"
    torch.set_num_threads(args.threads)
    args.device = use_device(args.device)
    return args


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended. (os.times counts in hundredths of a second: a
    short call takes none at all.)"""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall seconds (or those of another clock) of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compared(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call's rounds: on a GPU by events on a cold L2 cache, on a CPU interleaved, by `clock`.

    time.process_time counts the CPU seconds of this process: on one thread, what others do then counts less.
    """
    if device.type == "cuda":
        return {name: cold_kernel_seconds(call, rounds=rounds, warmup=3) for name, call in calls.items()}
    timed = {name: partial(seconds, call, device, clock) for name, call in calls.items()}
    return interleaved(timed, rounds=rounds, warmup=1)


def extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call holds beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def launches(call: Callable[[], object], device: torch.device) -> int:
    """Kernels on a GPU, PyTorch operators on a CPU, of one call."""
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    return sum(1 for e in profile.events() if e.device_type == kind and (kind.name == "CUDA" or e.cpu_parent is None))


def interleaved(candidates: dict[str, Callable[[], float]], *, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each candidate, one call of each a round, so that drift of the machine hits all of them alike.

    Args:
        candidates: name -> does the work once and returns its seconds.
        rounds:     measured calls of each.
        warmup:     calls of each before them, not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for round_number in range(-warmup, rounds):
        # Every other round backwards: whoever runs second finds the caches as the first left them.
        for name in names if round_number % 2 else reversed(names):
            value = candidates[name]()
            if round_number >= 0:
                taken[name].append(value)
    return taken


def cold_kernel_seconds(run: Callable[[], object], *, rounds: int, warmup: int) -> list[float]:
    """GPU seconds of each call between two CUDA events, with the L2 cache overwritten before each.

    A call that takes less than SHORT is repeated as a CUDA graph, if it can be: else the time that Python takes from
    one launch to the next would lie between the events.
    """
    taken = _between_events(run, rounds, warmup)
    if statistics.median(taken) > SHORT:
        return taken
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        note(f"timing: a short call with Python's gaps in it, as no graph takes it: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return taken
    return _between_events(graph.replay, rounds, warmup)


def _between_events(run: Callable[[], object], rounds: int, warmup: int) -> list[float]:
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    taken = []
    for round_number in range(-warmup, rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if round_number >= 0:
            taken.append(start.elapsed_time(end) / 1e3)
    return taken


def call_seconds(run: Callable[[], object], device: torch.device, *, rounds: int, warmup: int) -> list[float]:
    """Seconds of each call: on a GPU `cold_kernel_seconds`, on a CPU wall time."""
    if device.type == "cuda":
        return cold_kernel_seconds(run, rounds=rounds, warmup=warmup)
    return [seconds(run, device) for _ in range(-warmup, rounds)][warmup:]


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Highest bytes/s, read and written, of copying so many bytes: what the memory gives, not what it is sold with."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(call_seconds(lambda: target.copy_(source), device, rounds=5, warmup=2))


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of the values.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("summary: no values, at least one is required")
    first, median, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": first, "q3": third, "rounds": len(values)}


def matmul_rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> float:
    """Highest FLOP/s of [M, K] @ [K, N] over the shapes (M, K, N): what the machine gives, not what it is sold with."""
    best = 0.0
    for m, k, n in shapes:
        a, b = (torch.randn(*size, dtype=dtype, device=device) for size in ((m, k), (k, n)))
        out = torch.empty(m, n, dtype=dtype, device=device)
        flop = 2 * m * k * n
        calls = max(1, int(2e9 / flop)) if device.type == "cpu" else 20

        def repeat(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out, calls: int = calls) -> None:
            for _ in range(calls):
                torch.mm(a, b, out=out)

        taken = [seconds(repeat, device) for _ in range(6)][1:]
        best = max(best, calls * flop / min(taken))
    return best


def emit(benchmark: str, row: str, device: torch.device, values: dict[str, object]) -> None:
    """Print one row: its name, the values, and where, when and with what they were measured.

    In a terminal it is a line of a table, elsewhere (and with --json) a line of JSON.
    """
    head = {"benchmark": benchmark, "row": row}
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
    whole = head | rounded | environment(device.type)
    is_table = sys.stdout.isatty() and "R1_BENCHMARK_JSON" not in os.environ
    print(_table().add(whole) if is_table else json.dumps(whole), flush=True)


@cache
def _table() -> Table:
    return Table()


def note(text: str) -> None:
    """Tell the person who waits; no part of the result."""
    print(text, file=sys.stderr, flush=True)


@cache
def environment(device_type: str) -> dict[str, object]:
    """Device, threads, versions and date (UTC) of this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # what is not installed has no part in the number
    return {
        "device": device_name(device_type),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }


def device_name(device_type: str) -> str:
    """Name of the GPU, or model and number of usable cores of the CPU."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0))
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} x {cores}"
