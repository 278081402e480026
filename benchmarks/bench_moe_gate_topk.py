"""The router of 256 experts, forward and backward, against PyTorch, torch.compile, Megatron, TE and SGLang.

python benchmarks/bench_moe_gate_topk.py --device cuda
"""

from __future__ import annotations

from functools import partial

import memory_bound
import peers
import torch
from moe_problem import Problem

from r1kernels import moe_gate_topk
from r1kernels.moe_gate_topk import reference

EXPERTS = 256


def calls(case: Problem) -> memory_bound.Calls:
    x = torch.randn(case.tokens, EXPERTS, device=case.device)
    bias = 0.1 * torch.randn(EXPERTS, device=case.device)
    leaf = x.clone().requires_grad_()
    weights = moe_gate_topk(leaf, bias).weights
    grad = torch.randn_like(weights)
    forward = case.tokens * (4 * EXPERTS + 64)  # float32 logits in; 8 ids and 8 weights out
    backward = case.tokens * (8 * 32 + 4 * EXPERTS + 64)  # 8 sectors of 32 bytes of the logits, all of the gradient

    def plain() -> object:
        return reference.gate(x, bias, 8, 8, 4, "sigmoid", True, 2.5, None, None)

    out: memory_bound.Calls = {
        "forward": (lambda: moe_gate_topk(x, bias), forward),
        "forward, PyTorch": (plain, forward),
        "backward": (lambda: torch.autograd.grad(weights, leaf, grad, retain_graph=True), backward),
    }
    if moe_utils := memory_bound.megatron_moe_utils():

        def megatron(fused: bool) -> object:
            return moe_utils.topk_routing_with_score_function(
                x, 8, num_groups=8, group_topk=4, scaling_factor=2.5, score_function="sigmoid", expert_bias=bias,
                fused=fused,
            )  # fmt: skip

        out["forward, Megatron"] = (lambda: megatron(False), forward)
        if moe_utils.HAVE_TE and case.device.type == "cuda":
            out["forward, Transformer Engine"] = (lambda: megatron(True), forward)
    others = {n: partial(op, x, bias) for n, op in peers.installed(peers.GATE, case.device).items()}
    for name, call in peers.working(others, peers.GATE).items():
        out[f"forward, {name}"] = (call, forward)
    return out | memory_bound.compiled("forward", plain, forward, case.device)


if __name__ == "__main__":
    memory_bound.run("moe_gate_topk", __doc__, calls)
