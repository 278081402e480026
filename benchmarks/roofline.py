"""What compiled Triton kernels reach at most, before anybody has run them: shares of a copy's rate on H100 and H200.

python benchmarks/roofline.py [--json]

Compiles each kernel for sm_90a (no GPU needed) and reads its registers and its loop from the machine code. How much of
the issue slots, of the unit for exponentials and of the loads in flight does it take to move memory at the rate of a
copy? Where one of them is more than 1, it bounds the kernel. Rates are measured ones of copies: the shares are
`of_copy_rate` of the benchmarks, 1 / `over_copy` of bench_logits_grpo_loss.py. A measurement below the bound shows what
the model does not know: barriers, a cache that loses rows, launches, tails, latencies inside a warp.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

import aot  # noqa: E402
import compiled_kernels  # noqa: E402
import timing  # noqa: E402


class Gpu(NamedTuple):
    """What a GPU does in a second; the copy rate is a measured one, the clock that under load."""

    copy_bytes: float
    multiprocessors: int = 132
    clock: float = 1.755e9  # Hz
    latency: float = 0.8e-6  # seconds of a load that main memory answers, while it is busy


GPUS = {"H100": Gpu(3.0e12), "H200": Gpu(4.3e12)}
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 227 * 1024  # of a multiprocessor


class Work(NamedTuple):
    """A kernel, and what its outputs take of main memory."""

    kernel: aot.Kernel
    values: int  # of an element that are read from main memory, 2 bytes each: h has two an element, with grad three
    written: float  # bytes an element


FP8 = 1 + 4 / 128  # a value and its part of a scale
WORK = {
    "logprob_entropy": Work(compiled_kernels.forward(90, SQUARES=False), 1, 0),
    "its gradient": Work(compiled_kernels.backward(90), 1, 2),
    "its gradient with entropy": Work(compiled_kernels.backward(90, entropy=True), 1, 2),
    "logits_grpo_loss": Work(compiled_kernels.logits_grpo(90), 1, 2),
    "logits_grpo_loss, short rows": Work(compiled_kernels.logits_grpo(90, num_warps=8), 1, 2),
    "swiglu": Work(compiled_kernels.SWIGLU["swiglu"], 2, 2),
    "swiglu quant": Work(compiled_kernels.SWIGLU["quant"], 2, FP8),
    "swiglu dual": Work(compiled_kernels.SWIGLU["dual"], 2, 2 * FP8),
    "swiglu backward": Work(compiled_kernels.SWIGLU["backward"], 3, 6),
    "quant backward": Work(compiled_kernels.SWIGLU["quant backward"], 3, 2 * FP8),
    "wide quant backward": Work(compiled_kernels.SWIGLU["wide quant backward"], 3, 6 + 2 * FP8),
    "transposed backward": Work(compiled_kernels.SWIGLU["transposed backward"], 3, 3 * FP8),
    "paged attention": Work(compiled_kernels.paged_attention(), 1, 0),
    "paged attention, heads of 64": Work(compiled_kernels.paged_attention(head_dim=64), 1, 0),
    "paged attention, 16 heads on a latent": Work(compiled_kernels.latent_attention(), 1, 0),
}


def resident(made: aot.Compiled, num_warps: int) -> int:
    """Blocks of a kernel that fit a multiprocessor."""
    threads = 32 * num_warps
    by_registers = REGISTERS // (-(-made.registers // 8) * 8 * threads)
    return min(by_registers, THREADS // threads, BLOCKS, SHARED // (made.shared_bytes + 1024))


def bound(made: aot.Compiled, work: Work) -> dict[str, object]:
    """A row: what was found in the machine code; of each GPU what moving memory at the copy's rate takes of the issue
    slots, of the unit for exponentials, and of the loads that are in flight; and the share of that rate at most."""
    # Without a loop a thread runs all instructions once.
    loops = [loop for loop in made.loops if _wide_loads(loop)] or [made.opcodes]
    elements = [_wide_loads(loop) * 8 / work.values for loop in loops]  # of a thread in each pass
    instructions = sum(sum(loop.values()) / n for loop, n in zip(loops, elements, strict=True))
    special = sum(_special(loop) / n for loop, n in zip(loops, elements, strict=True))
    blocks, num_warps = resident(made, work.kernel.num_warps), work.kernel.num_warps
    in_flight = blocks * num_warps * 32 * _wide_loads(loops[0]) * 16
    read, moved = 2 * work.values, 2 * work.values + work.written
    row: dict[str, object] = {"registers": made.registers, "blocks": blocks, "warps": blocks * num_warps}
    row |= {"instructions": instructions, "bytes": moved, "kb_in_flight": in_flight / 1024}
    for name, gpu in GPUS.items():
        elements_a_cycle = gpu.copy_bytes / moved / gpu.multiprocessors / gpu.clock
        needed = {
            "issue": elements_a_cycle * instructions / 32 / 4,  # four schedulers, an instruction of 32 threads each
            "special": elements_a_cycle * special / 16,
            "flight": gpu.copy_bytes * read / moved * gpu.latency / gpu.multiprocessors / in_flight,
        }
        row |= {f"{name}_{unit}": share for unit, share in needed.items()}
        row[f"{name}_share"] = min(1.0, 1 / max(needed.values()))
    return row


def _wide_loads(opcodes: dict[str, int]) -> int:
    """Loads of 16 bytes."""
    return sum(n for op, n in opcodes.items() if op.startswith("LDG") and "128" in op.split("."))


def _special(opcodes: dict[str, int]) -> int:
    """Exponentials, reciprocals and the like."""
    return sum(n for op, n in opcodes.items() if op.startswith("MUFU"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="lines of JSON also in a terminal; a file gets them anyway")
    parser.add_argument("--only", nargs="*", default=list(WORK), choices=list(WORK), metavar="KERNEL", help="of these")
    args = parser.parse_args()
    if args.json:
        os.environ["R1_BENCHMARK_JSON"] = "1"
    chosen = {name: WORK[name] for name in args.only}
    made = aot.compile_here([work.kernel for work in chosen.values()])
    for (name, work), compiled in zip(chosen.items(), made, strict=True):
        timing.emit("roofline", name, torch.device("cpu"), bound(compiled, work))


if __name__ == "__main__":
    main()
