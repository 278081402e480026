"""The experts' activation and its FP8 forms, fused and step by step, against the bytes that must move.

python benchmarks/bench_moe_swiglu_quant.py --device cuda
"""

from __future__ import annotations

import moe_problem
import timing
import torch

from r1kernels import fp8_quantize, moe_swiglu, moe_swiglu_quant, moe_swiglu_quant_backward
from r1kernels.moe_permute_quant.reference import row_weights
from r1kernels.moe_swiglu_quant import swiglu_backward


def main() -> None:
    cases, rounds = moe_problem.problems(__doc__)
    rate = timing.copy_rate(cases[0].device, moe_problem.copy_bytes(cases[0], rounds))
    for case in cases:
        plan, weights = case.plan(), case.weights()
        h, grad = case.randn(plan.num_rows, 2 * case.inner), case.randn(plan.num_rows, case.inner)
        factor = row_weights(weights, plan)

        def step_by_step(h: torch.Tensor = h, factor: torch.Tensor = factor) -> object:
            gate, up = h.chunk(2, 1)
            return fp8_quantize((torch.nn.functional.silu(gate) * up * factor).bfloat16(), block=(1, 128))

        def backward_step_by_step(
            h: torch.Tensor = h, grad: torch.Tensor = grad, plan: object = plan, weights: torch.Tensor = weights
        ) -> object:
            grad_h, _, _ = swiglu_backward(grad, h, plan, weights)
            return fp8_quantize(grad_h, block=(1, 128))

        i, scale = case.inner, 4 / 128
        # name -> (call, bytes a row that no implementation can avoid)
        calls = {
            "swiglu": (lambda h=h, p=plan, w=weights: moe_swiglu(h, p, w), 6 * i),
            "quant": (lambda h=h, p=plan, w=weights: moe_swiglu_quant(h, p, weights=w), i * (5 + scale)),
            "quant, step by step": (step_by_step, i * (5 + scale)),
            "quant dual": (
                lambda h=h, p=plan, w=weights: moe_swiglu_quant(h, p, weights=w, dual=True),
                i * (6 + 2 * scale),
            ),
            "backward": (
                lambda h=h, g=grad, p=plan, w=weights: moe_swiglu_quant_backward(g, h, p, weights=w),
                i * (14 + 2 * scale),
            ),
            "backward, step by step": (backward_step_by_step, i * (14 + 2 * scale)),
            "backward dual": (
                lambda h=h, g=grad, p=plan, w=weights: moe_swiglu_quant_backward(g, h, p, weights=w, dual=True),
                i * (11 + 5 * scale),
            ),
        }
        for name, (call, bytes_a_row) in calls.items():
            taken = timing.summary(timing.call_seconds(call, case.device, rounds=rounds, warmup=min(2, rounds)))
            moved = case.rows * bytes_a_row / taken["median"]
            share = {"bytes_per_s": moved, "of_copy_rate": moved / rate, "copy_rate": rate}
            timing.emit("moe_swiglu_quant", name, case.device, case.describe() | taken | share)


if __name__ == "__main__":
    main()
