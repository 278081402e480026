"""The experts' matmuls in bfloat16 (PyTorch) and FP8 (DeepGEMM where it is installed), against the best dense matmul.

python benchmarks/bench_moe_grouped_gemm.py --device cuda
"""

from __future__ import annotations

from functools import partial

import moe_problem
import peers
import timing
import torch

from r1kernels import (
    fp8_quantize,
    moe_grouped_gemm,
    moe_grouped_gemm_fp8,
    moe_grouped_wgrad,
    moe_grouped_wgrad_fp8,
    moe_permute,
    moe_permute_quant,
)
from r1kernels.dispatch import why_not


def main() -> None:
    cases, rounds = moe_problem.problems(__doc__)
    first = cases[0]
    rate = timing.matmul_rate(
        [(2048 if rounds > 1 else 64, first.hidden, 2 * first.inner)], torch.bfloat16, first.device
    )
    gate_up, down = first.matrices()
    fp8_gate_up, fp8_down = (fp8_quantize(m, block=(128, 128)) for m in (gate_up, down))
    has_deep_gemm = first.device.type == "cuda" and why_not("deep_gemm", "cuda") is None
    for case in cases:
        plan = case.plan()
        x, act = case.randn(case.tokens, case.hidden), case.randn(case.tokens, case.inner)
        rows, act_rows = moe_permute(x, plan), moe_permute(act, plan)
        fp8, act_fp8 = moe_permute_quant(x, plan, dual=True), moe_permute_quant(act, plan, dual=True)
        sizes = plan.offsets.diff().tolist()
        one = 2 * case.rows * case.hidden * case.inner  # of down; gate_up is twice that
        calls = {
            "gate_up bf16": (lambda a=rows, p=plan: moe_grouped_gemm(a, gate_up, p), 2 * one),
            "down bf16": (lambda a=act_rows, p=plan: moe_grouped_gemm(a, down, p), one),
            "gate_up fp8": (lambda a=fp8, p=plan: moe_grouped_gemm_fp8(a, fp8_gate_up, p), 2 * one),
            "down fp8": (lambda a=act_fp8, p=plan: moe_grouped_gemm_fp8(a, fp8_down, p), one),
            "down wgrad bf16": (lambda g=rows, a=act_rows, p=plan: moe_grouped_wgrad(g, a, p), one),
            "down wgrad fp8": (
                lambda g=fp8, a=act_fp8, p=plan, n=sizes: moe_grouped_wgrad_fp8(g[2:], a[2:], p, rows_per_expert=n),
                one,
            ),
        }
        if has_deep_gemm:
            import deep_gemm

            out = torch.empty(plan.num_rows, 2 * case.inner, dtype=torch.bfloat16, device=case.device)
            direct = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
            calls["gate_up fp8, DeepGEMM called directly"] = (
                lambda a=fp8, o=out, p=plan, f=direct: f(tuple(a[:2]), tuple(fp8_gate_up), o, p.expert_of),
                2 * one,
            )
        others = peers.installed(peers.GROUPED, case.device)
        others = {name: partial(op, rows, gate_up, sizes) for name, op in others.items()}
        for name, call in peers.working(others, peers.GROUPED).items():
            calls[f"gate_up bf16, {name}"] = (call, 2 * one)
        for name, (call, flop) in calls.items():
            taken = timing.summary(timing.call_seconds(call, case.device, rounds=rounds, warmup=min(2, rounds)))
            speed = {"flop_per_s": flop / taken["median"], "of_bf16_matmul_rate": flop / taken["median"] / rate}
            deep = {"has_deep_gemm": has_deep_gemm}
            timing.emit("moe_grouped_gemm", name, case.device, case.describe() | taken | speed | deep)


if __name__ == "__main__":
    main()
