"""The routed experts, forward and backward: fused in bfloat16 and FP8, of matrices one by one that are put together in
each pass, and unfused as PyTorch steps.

python benchmarks/bench_moe_experts.py --device cuda
"""

from __future__ import annotations

import moe_problem
import timing
import torch

from r1kernels import moe_experts
from r1kernels.dispatch import why_not


def unfused(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Sort, index, PyTorch's grouped matmul, index_add: what Megatron's unfused layer does, without its loops."""
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=len(gate_up)).cumsum(0).int()
    tokens = order // ids.shape[1]
    gate, up = torch.nn.functional.grouped_mm(x[tokens], gate_up.mT, offs=ends).chunk(2, dim=1)
    act = (torch.nn.functional.silu(gate) * up * weights.flatten()[order, None]).to(x.dtype)
    return torch.zeros_like(x).index_add(0, tokens, torch.nn.functional.grouped_mm(act, down.mT, offs=ends))


def main() -> None:
    cases, rounds = moe_problem.problems(__doc__)
    first = cases[0]
    rate = timing.matmul_rate(
        [(2048 if rounds > 1 else 64, first.hidden, 2 * first.inner)], torch.bfloat16, first.device
    )
    leaves = [m.requires_grad_() for m in first.matrices()]
    singles = [[m.clone().requires_grad_() for m in matrices.detach()] for matrices in leaves]
    has_deep_gemm = first.device.type == "cuda" and why_not("deep_gemm", "cuda") is None
    for case in cases:
        x, ids, weights = case.randn(case.tokens, case.hidden).requires_grad_(), case.ids(), case.weights()
        weights.requires_grad_()
        grad = case.randn(case.tokens, case.hidden)
        layers = {
            "bf16": lambda x=x, i=ids, w=weights: moe_experts(x, i, w, *leaves),
            "fp8": lambda x=x, i=ids, w=weights: moe_experts(x, i, w, *leaves, precision="fp8"),
            "fp8_wgrad": lambda x=x, i=ids, w=weights: moe_experts(x, i, w, *leaves, precision="fp8_wgrad"),
            "bf16, put together": lambda x=x, i=ids, w=weights: moe_experts(x, i, w, *map(torch.stack, singles)),
            "bf16 unfused": lambda x=x, i=ids, w=weights: unfused(x, i, w, *leaves),
        }
        flop = 6 * case.rows * case.hidden * case.inner
        for name, layer in layers.items():
            trained = [m for matrices in singles for m in matrices] if "together" in name else leaves

            def forward(layer: object = layer) -> None:
                with torch.no_grad():
                    layer()

            def both(layer: object = layer, inputs: tuple = (x, weights, *trained), grad: torch.Tensor = grad) -> None:
                torch.autograd.grad(layer(), inputs, grad)

            for part, call, factor in (("forward", forward, 1), ("forward + backward", both, 3)):
                taken = timing.summary(timing.call_seconds(call, case.device, rounds=rounds, warmup=min(2, rounds)))
                speed = {"flop_per_s": factor * flop / taken["median"]}
                speed["of_bf16_matmul_rate"] = speed["flop_per_s"] / rate
                deep = {"has_deep_gemm": has_deep_gemm}
                timing.emit("moe_experts", f"{name}, {part}", case.device, case.describe() | taken | speed | deep)


if __name__ == "__main__":
    main()
