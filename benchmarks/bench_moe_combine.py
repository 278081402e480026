"""The experts' rows back to their tokens, forward and backward, against plain PyTorch and torch.compile.

python benchmarks/bench_moe_combine.py --device cuda
"""

from __future__ import annotations

import memory_bound
import torch
from moe_problem import Problem

from r1kernels import moe_combine, moe_combine_backward_quant
from r1kernels.moe_combine import reference


def calls(case: Problem) -> memory_bound.Calls:
    plan, weights = case.plan(), case.weights()
    rows, shared = case.randn(plan.num_rows, case.hidden), case.randn(case.tokens, case.hidden)
    leaves = (rows.clone().requires_grad_(), weights.clone().requires_grad_())
    out = moe_combine(leaves[0], plan, leaves[1])
    grad = torch.randn_like(out)
    token, row = 2 * case.hidden, 2 * case.hidden
    forward = case.tokens * token + case.rows * row
    backward = case.tokens * token + case.rows * 2 * row
    quantized = case.tokens * token + case.rows * (row + case.hidden + 4 * case.hidden // 128)

    def plain() -> object:
        return reference.combine(rows, plan, weights, None)

    return {
        "forward": (lambda: moe_combine(rows, plan, weights), forward),
        "forward + shared expert": (
            lambda: moe_combine(rows, plan, weights, residual=shared),
            forward + case.tokens * token,
        ),
        "forward, PyTorch": (plain, forward),
        "backward": (lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), backward),
        "backward, quantized": (lambda: moe_combine_backward_quant(grad, rows, plan, weights), quantized),
    } | memory_bound.compiled("forward", plain, forward, case.device)


if __name__ == "__main__":
    memory_bound.run("moe_combine", __doc__, calls)
