"""One prepared call on a GPU machine: build, tests, measurements, sanitizer, counters, within a time.

python benchmarks/gpu.py --seconds 520 --out FOLDER        what `make gpu` runs

Sections stand in the order of what is least known. Each is a process with a limit of its own and its own log; one that
fails or takes too long stops no other. What there was time for is in FOLDER/gpu.json, a line a section, and in the
table at the end. Needs the standard library, PyTorch and Triton; wheels for the rest are installed from
build/gpu-wheels (`make gpu-wheels`, on a machine with a network) without touching the machine's own packages.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SITE, WHEELS = ROOT / "build" / "gpu-site", ROOT / "build" / "gpu-wheels"
KERNELS = [f"tests/gpu/test_{name}_gpu.py" for name in ("moe", "logprob", "loss_ops", "moe_experts", "paged_attention")]
PYTEST = "{python} -m pytest -q -p no:cacheprovider -m gpu --durations 5"
SMALLEST = "-x tests/gpu/test_moe_gpu.py -k 'casts or transposed'"
SANITIZER = "compute-sanitizer --error-exitcode 9 --tool"
COUNTERS = "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct,gpu__time_duration.sum"
BUSY = "sm__inst_issued.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active"
KEPT = 5.0  # seconds at the end, for the table


class Section(NamedTuple):
    """A part of the call."""

    name: str
    seconds: float  # at most
    command: str  # for a shell, in the root of the repository
    needs: str = ""  # a program on PATH without which it is left out


class Outcome(NamedTuple):
    """What became of a section."""

    section: str
    status: str  # done, failed, ended (its time was up), no time, or what it needs
    seconds: float
    said: str  # the last line of its log


SECTIONS = (
    Section(
        "machine", 15, "nvidia-smi && {python} -c 'import torch, triton as t; print(torch.__version__, t.__version__)'"
    ),
    Section("wheels", 60, "{python} -m pip install -q --no-index --no-deps --upgrade --target {site} {wheels}/*.whl"),
    Section(
        "library",
        90,
        "cmake -S . -B build/gpu && cmake --build build/gpu --parallel && cmake --install build/gpu --prefix kernels"
        " && {python} -c 'from r1kernels import cuda_lib; print(cuda_lib.build_info())'",
        "cmake",
    ),
    Section("kernels", 150, " ".join([PYTEST, *KERNELS])),
    Section("engine", 90, " ".join([PYTEST, "tests/gpu", *(f"--ignore {file}" for file in KERNELS)])),
    Section("bounds", 60, "{python} benchmarks/roofline.py"),
    Section("measurements", 170, "{python} benchmarks/run_all.py --device cuda --seconds 160"),
    Section("memcheck", 40, f"{SANITIZER} memcheck {PYTEST} {SMALLEST}", "compute-sanitizer"),
    Section(
        "racecheck",
        40,
        f"{SANITIZER} racecheck {PYTEST} {SMALLEST}",
        "compute-sanitizer",
    ),
    Section(
        "counters",
        45,
        f"ncu --clock-control none --launch-count 3 -k 'regex:logits_grpo|gradient' --metrics {COUNTERS},{BUSY}"
        " {python} benchmarks/bench_logits_grpo_loss.py --device cuda --smoke",
        "ncu",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=520, help="of the whole call")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build" / "gpu-out")))
    parser.add_argument("--only", nargs="*", default=[section.name for section in SECTIONS], help="sections")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds - KEPT
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "gpu.json", "w") as rows:
        outcomes = []
        for section in SECTIONS:
            if section.name in args.only:
                print(f"gpu: {section.name}", file=sys.stderr, flush=True)
                outcomes.append(run(section, end - time.monotonic(), args.out / f"{section.name}.log"))
                rows.write(json.dumps(outcomes[-1]._asdict()) + "\n")
                rows.flush()
    print(table(outcomes))
    return 0 if all(outcome.status in ("done", "no wheels") for outcome in outcomes) else 1


def run(section: Section, left: float, log: Path) -> Outcome:
    """Run a section for as long as it may and as there is time."""
    if left <= 0:
        return Outcome(section.name, "no time", 0.0, "")
    if section.name == "wheels" and not list(WHEELS.glob("*.whl")):
        return Outcome(section.name, "no wheels", 0.0, "make gpu-wheels, on a machine with a network")
    if section.needs and not _has(section.needs):
        return Outcome(section.name, f"needs {section.needs}", 0.0, "")
    command = section.command.format(python=sys.executable, site=SITE, wheels=WHEELS)
    paths = [str(path) for path in (ROOT, ROOT / "kernels", ROOT / "tests" / "support", SITE)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "R1_TURN": "all"}
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, shell=True, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "done" if process.wait(min(section.seconds, left)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            status = "ended"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(section.name, status, round(time.monotonic() - start, 1), lines[-1][:160] if lines else "")


def _has(program: str) -> bool:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    return any(os.access(Path(folder, program), os.X_OK) for folder in folders)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a section."""
    return "\n".join(f"{x.section:13} {x.status:12} {x.seconds:6.1f} s  {x.said}" for x in outcomes)


if __name__ == "__main__":
    sys.exit(main())
