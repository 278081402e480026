"""Run every benchmark; write their rows to benchmarks/results/<device>/<benchmark>.json.

python benchmarks/run_all.py --device cuda       measure
python benchmarks/run_all.py --smoke             only see that each one runs; writes nothing
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import timing

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    name = timing.device_name(timing.use_device(args.device).type)
    results = FOLDER / "results" / re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")
    failed = []
    for script in sorted(FOLDER.glob("bench_*.py")):
        timing.note(f"run_all: {script.name} on {name}")
        command = [sys.executable, script, "--device", args.device] + ["--smoke"] * args.smoke
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            failed.append(script.name)
        elif not args.smoke:
            results.mkdir(parents=True, exist_ok=True)
            (results / f"{script.stem.removeprefix('bench_')}.json").write_text(done.stdout)
    if failed:
        timing.note(f"run_all: failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
