"""Run every benchmark; write their rows to benchmarks/results/<device>/<benchmark>.json.

python benchmarks/run_all.py --device cuda       measure
python benchmarks/run_all.py --device cuda --seconds 240    what fits into this time, least known first
python benchmarks/run_all.py --smoke             only see that each one runs; writes nothing

A measurement has a process of its own. On a CPU a smoke run is a fork of this process, which has done the imports; a
GPU cannot be used by a fork.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timing

FOLDER = Path(__file__).resolve().parent
LEAST_KNOWN = (
    "logits_grpo_loss",
    "paged_attention",
    "logprob_entropy",
    "moe_experts",
    "moe_swiglu_quant",
    "linear_logprob",
    "generate",
)
NO_GPU = ("curate", "evaluate", "rewards", "sandbox", "search", "sft")  # measure CPUs only
IMPORTS = ("torch._dynamo", "transformers", "r1engine.model.policy", "r1engine.rewards")  # seconds each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, help="stop then, with the rows there are")
    args = parser.parse_args()
    end = None if args.seconds is None else time.monotonic() + args.seconds
    name = timing.device_name(timing.use_device(args.device).type)
    results = FOLDER / "results" / re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
    failed, is_forked = [], args.smoke and args.device == "cpu"
    for module in IMPORTS if is_forked else ():
        importlib.import_module(module)
    for script in scripts(args.device):
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            timing.note(f"run_all: no time for {script.name}")
            continue
        timing.note(f"run_all: {script.name} on {name}")
        command = [str(script), "--device", args.device] + ["--smoke"] * args.smoke
        status, rows = in_fork(command) if is_forked else in_process(command, left)
        print(rows, end="", flush=True)
        if status:
            failed.append(script.name)
        if rows and not args.smoke:  # what was measured before a failure is measured
            results.mkdir(parents=True, exist_ok=True)
            (results / f"{script.stem.removeprefix('bench_')}.json").write_text(rows)
    if failed:
        timing.note(f"run_all: failed: {', '.join(failed)}")
    return 1 if failed else 0


def scripts(device: str) -> list[Path]:
    """The benchmarks of a device, on a GPU those first of which least is known."""
    found = sorted(FOLDER.glob("bench_*.py"))
    if device == "cpu":
        return found
    name = {script: script.stem.removeprefix("bench_") for script in found}
    place = {known: index for index, known in enumerate(LEAST_KNOWN)}
    return sorted((s for s in found if name[s] not in NO_GPU), key=lambda s: place.get(name[s], len(place)))


def in_process(command: list[str], seconds: float | None) -> tuple[int, str]:
    """(status, stdout) of a script with its arguments, which is ended after so many seconds."""
    # Unbuffered: the rows of a script that is ended are there.
    process = subprocess.Popen([sys.executable, "-u", *command], stdout=subprocess.PIPE, text=True)
    try:
        rows, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        timing.note(f"run_all: {command[0]} is ended, its time is up")
        process.kill()
        rows, _ = process.communicate()
    return process.returncode, rows


def in_fork(command: list[str]) -> tuple[int, str]:
    """The same in a fork of this process."""

    def run() -> None:
        os.dup2(file.fileno(), 1)
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")

    with tempfile.TemporaryFile("w+") as file:
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()
        file.seek(0)
        return process.exitcode, file.read()


if __name__ == "__main__":
    sys.exit(main())
