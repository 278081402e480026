"""FP8 block casts of activations and of the experts' down projections, against PyTorch, torch.compile and SGLang.

python benchmarks/bench_fp8_cast.py --device cuda
"""

from __future__ import annotations

from functools import partial

import memory_bound
import peers
import torch
from moe_problem import Problem

from r1kernels import fp8_dequantize, fp8_quantize
from r1kernels.fp8_cast import reference


def cast_calls(x: torch.Tensor, block: tuple[int, int]) -> memory_bound.Calls:
    values, scale = fp8_quantize(x, block=block)
    num_bytes = 3 * x.numel() + 4 * scale.numel()
    name = f"quantize {block[0]}x{block[1]}"

    def plain() -> object:
        return reference.quantize(x, block)

    return {
        name: (lambda: fp8_quantize(x, block=block), num_bytes),
        f"de{name}": (lambda: fp8_dequantize(values, scale, block=block), num_bytes),
        f"{name}, PyTorch": (plain, num_bytes),
    } | memory_bound.compiled(name, plain, num_bytes, x.device)


def calls(case: Problem) -> memory_bound.Calls:
    activations, weights = case.randn(case.tokens, case.hidden), case.matrices()[1]
    out = cast_calls(activations, (1, 128)) | cast_calls(weights, (128, 128))
    others = {n: partial(op, activations) for n, op in peers.installed(peers.QUANTIZE, case.device).items()}
    for name, call in peers.working(others, peers.QUANTIZE).items():
        out[f"quantize 1x128, {name}"] = (call, out["quantize 1x128"][1])
    return out


if __name__ == "__main__":
    memory_bound.run("fp8_cast", __doc__, calls)
