"""Tokens to the rows of their experts in FP8: fused, quantized before and quantized after; and in bfloat16.

python benchmarks/bench_moe_permute_quant.py --device cuda
"""

from __future__ import annotations

import memory_bound
import torch
from moe_problem import Problem

from r1kernels import fp8_quantize, moe_permute, moe_permute_fp8, moe_permute_quant


def calls(case: Problem) -> memory_bound.Calls:
    plan, x = case.plan(), case.randn(case.tokens, case.hidden)
    row = case.hidden + 4 * case.hidden // 128  # codes and scales
    read = case.tokens * 2 * case.hidden
    fused, plain = read + case.rows * row, read + case.rows * 2 * case.hidden
    out: memory_bound.Calls = {
        "permute + quantize": (lambda: moe_permute_quant(x, plan), fused),
        "quantize, then permute": (lambda: moe_permute_fp8(*fp8_quantize(x, block=(1, 128)), plan), fused),
        "permute, then quantize": (lambda: fp8_quantize(moe_permute(x, plan), block=(1, 128)), fused),
        "permute + quantize, dual": (lambda: moe_permute_quant(x, plan, dual=True), read + 2 * case.rows * row),
        "permute": (lambda: moe_permute(x, plan), plain),
    }
    if moe_utils := memory_bound.megatron_moe_utils():
        nobody = torch.zeros(case.tokens, case.experts, dtype=torch.bool, device=case.device)
        chosen = nobody.scatter(1, plan.expert_of[plan.row_of.long()].long(), True)

        def megatron(fused: bool) -> object:
            return moe_utils.permute(x, chosen, num_out_tokens=case.rows, fused=fused)

        out["permute, Megatron"] = (lambda: megatron(False), plain)
        if moe_utils.HAVE_TE and case.device.type == "cuda":
            out["permute, Transformer Engine"] = (lambda: megatron(True), plain)
    return out


if __name__ == "__main__":
    memory_bound.run("moe_permute_quant", __doc__, calls)
