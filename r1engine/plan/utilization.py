"""Model FLOPs utilization: the work that a step cannot do without, over what its GPUs could have done meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

from r1engine.hf.architecture import Architecture
from r1engine.plan.hardware import GPUS
from r1engine.plan.sizes import forward_work

# As `torch.cuda.get_device_name` has them. A part of a GPU (MIG) and other boards of a chip are not in it: no data
# sheet gives the peak of the one, and the others have peaks of their own.
DEVICES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA H800": "h800",
    "NVIDIA H20": "h20",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA L40S": "l40s",
}


def training_flops(arch: Architecture, lengths: Iterable[int]) -> float:
    """Floating-point operations of a forward and a backward pass (twice a forward) over texts of these lengths.

    Without recomputation and padding; a token attends to itself and to those before it in its text.
    """
    work, total = forward_work(arch), 0.0
    for length in lengths:
        total += length * work.total((length + 1) / 2)
    return 3 * total


def utilization(flops: float, seconds: float, gpus: int, device_name: str) -> float | None:
    """Share of the dense bfloat16 peak of the data sheet; None on a device whose peak is not known here.

    Args:
        flops:       of all ranks.
        seconds:     that they took.
        gpus:        number of ranks, one GPU each.
        device_name: of each, as torch has it; "" on a CPU.
    """
    if device_name not in DEVICES:
        return None
    return flops / (seconds * gpus * GPUS[DEVICES[device_name]].bf16_tflops * 1e12)
