"""Run every benchmark; write their rows to benchmarks/results/<device>/<benchmark>.json.

python benchmarks/run_all.py --device cuda       measure
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
from pathlib import Path

import timing

FOLDER = Path(__file__).resolve().parent
IMPORTS = ("torch._dynamo", "transformers", "r1engine.model.policy", "r1engine.rewards")  # seconds each


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    name = timing.device_name(timing.use_device(args.device).type)
    results = FOLDER / "results" / re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
    failed, is_forked = [], args.smoke and args.device == "cpu"
    for module in IMPORTS if is_forked else ():
        importlib.import_module(module)
    for script in sorted(FOLDER.glob("bench_*.py")):
        timing.note(f"run_all: {script.name} on {name}")
        command = [str(script), "--device", args.device] + ["--smoke"] * args.smoke
        status, rows = in_fork(command) if is_forked else in_process(command)
        print(rows, end="", flush=True)
        if status:
            failed.append(script.name)
        elif not args.smoke:
            results.mkdir(parents=True, exist_ok=True)
            (results / f"{script.stem.removeprefix('bench_')}.json").write_text(rows)
    if failed:
        timing.note(f"run_all: failed: {', '.join(failed)}")
    return 1 if failed else 0


def in_process(command: list[str]) -> tuple[int, str]:
    """(status, stdout) of a script with its arguments."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout


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
