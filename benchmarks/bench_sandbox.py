"""The sandbox: what running a program of a model costs.

Rows: one test of a program in the warm sandbox, in a sandbox that is started for it, and in a plain child process
without any protection; one call of a function; programs a second through the scorer. Needs no GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import timing
import torch

from r1engine.data.question import Question
from r1engine.rewards import Record, Scorer
from r1engine.rewards.sandbox import Sandbox, probe

PROGRAM = "print(int(input()) ** 2)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="the rewards run on the CPU in any case"
    )
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = timing.use_device(args.device)
    if problem := probe().problem():
        timing.note(f"bench_sandbox: no rows: {problem}")
        return 0
    for line in probe().describe():
        timing.note(f"  {line}")
    rounds = 2 if args.smoke else 100
    for row, values in [*tests_of_a_program(rounds), throughput(8 if args.smoke else 1000)]:
        timing.emit("sandbox", row, device, values)
    return 0


def tests_of_a_program(rounds: int) -> list[tuple[str, dict[str, float]]]:
    """Rows of one test of a program, by how it is run (seconds)."""
    with Sandbox() as warm:

        def in_the_warm_sandbox() -> None:
            assert warm.run_script(PROGRAM, "12").stdout == b"144\n"

        def call_in_the_warm_sandbox() -> None:
            with warm.functions("def square(x): return x * x") as module:
                assert module.call("square", [12]) == 144

        def in_a_fresh_sandbox() -> None:
            with Sandbox() as fresh:
                assert fresh.run_script(PROGRAM, "12").stdout == b"144\n"

        def in_a_plain_process() -> None:
            command = [sys.executable, "-I", "-S", "-c", PROGRAM]
            assert subprocess.run(command, input=b"12", capture_output=True, check=True).stdout == b"144\n"

        runs = [in_the_warm_sandbox, call_in_the_warm_sandbox, in_a_plain_process]
        taken = timing.interleaved({run.__name__: _timed(run) for run in runs}, rounds=rounds, warmup=2)
    taken["in_a_fresh_sandbox"] = [_timed(in_a_fresh_sandbox)() for _ in range(max(2, rounds // 10))]
    rows = [(name.replace("_", " "), timing.summary(values)) for name, values in taken.items()]
    ratios = [a / b for a, b in zip(taken["in_a_plain_process"], taken["in_the_warm_sandbox"], strict=True)]
    return [*rows, ("plain process / warm sandbox", timing.summary(ratios))]


def throughput(items: int) -> tuple[str, dict[str, float]]:
    """Row of programs with three tests each through the scorer, one worker a core."""
    tests = [{"stdin": str(n), "stdout": str(n * n)} for n in (2, 3, 4)]
    record = Record(Question("", reward="code", tests=tests), f"<think>a</think><answer>{PROGRAM}</answer>")
    with Scorer() as scorer:
        scorer.score([record] * 8)  # starts the workers and their sandboxes
        started = time.perf_counter()
        scores = scorer.score([record] * items)
        seconds = time.perf_counter() - started
    assert {score.verdict for score in scores} == {"right"}
    latency = sorted(score.seconds for score in scores)
    p50, p99 = (latency[int(share * (items - 1))] for share in (0.5, 0.99))
    return "code items", {"items_per_second": items / seconds, "latency_p50": p50, "latency_p99": p99, "items": items}


def _timed(run: Callable[[], None]) -> Callable[[], float]:
    return lambda: timing.seconds(run, torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
