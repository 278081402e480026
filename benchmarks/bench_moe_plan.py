"""The row order of 256 experts, against a stable sort in plain PyTorch.

python benchmarks/bench_moe_plan.py --device cuda
"""

from __future__ import annotations

import memory_bound
import torch
from moe_problem import Problem

from r1kernels import moe_plan

EXPERTS, TOPK = 256, 8


def calls(case: Problem) -> memory_bound.Calls:
    ids = torch.rand(case.tokens, EXPERTS, device=case.device).argsort(1)[:, :TOPK].int().contiguous()
    # ids in and their rows out; a slot and an expert of each row.
    num_bytes = 8 * ids.numel() + 8 * moe_plan(ids, EXPERTS).num_rows
    return {
        "plan": (lambda: moe_plan(ids, EXPERTS), num_bytes),
        "plan, PyTorch": (lambda: moe_plan(ids, EXPERTS, impl="reference"), num_bytes),
    }


if __name__ == "__main__":
    memory_bound.run("moe_plan", __doc__, calls)
