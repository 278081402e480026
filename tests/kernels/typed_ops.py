"""Every public op as a strictly typed program calls it: pyright reads this file in strict mode (`make pyright`) and
finds no unknown type. It is not run."""

# pyright: strict

from __future__ import annotations

import torch

from r1kernels import (
    Fp8,
    FusedGrpo,
    Gate,
    GroupAdvantage,
    GrpoMetrics,
    GrpoObjective,
    LogProb,
    RowPlan,
    fp8_dequantize,
    fp8_quantize,
    group_advantage,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    logits_grpo_loss,
    logprob_entropy,
    moe_combine,
    moe_experts,
    moe_gate_topk,
    moe_permute,
    moe_plan,
    moe_swiglu,
    paged_attention,
)
from r1kernels.integrations import trl


def loss_from_hidden(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, old: torch.Tensor
) -> tuple[torch.Tensor, GrpoMetrics]:
    advantages: GroupAdvantage = group_advantage(torch.zeros(8), torch.arange(8) // 4, ddof=1)
    objective = GrpoObjective(clip_eps=0.2)
    fused: FusedGrpo = linear_grpo_loss(hidden, weight, labels, old, advantages.advantage, torch.ones(8), objective)
    found: LogProb = linear_logprob(hidden, weight, labels, temperature=0.7)
    loss, metrics = grpo_loss(found.logp, old, advantages.advantage, torch.ones(8), objective, entropy=found.entropy)
    return loss + fused.loss, metrics


def loss_from_logits(logits: torch.Tensor, labels: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    found: LogProb = logprob_entropy(logits, labels, return_entropy=True)
    fused: FusedGrpo = logits_grpo_loss(logits, labels, old, torch.zeros(8), torch.ones(8), inplace=False)
    return found.logp.sum() + fused.loss


def routed(x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate: Gate = moe_gate_topk(logits, topk=2, n_group=1, topk_group=1)
    plan: RowPlan = moe_plan(gate.ids, logits.shape[-1])
    rows = moe_swiglu(moe_permute(x, plan), plan)
    return moe_combine(rows, plan, gate.weights) + moe_experts(x, gate.ids, gate.weights, gate_up, down)


def stored(x: torch.Tensor) -> torch.Tensor:
    blocks: Fp8 = fp8_quantize(x, block=(1, 128))
    return fp8_dequantize(blocks.values, blocks.scale, block=(1, 128))


def patched() -> int:
    with trl.patch() as patch:
        return sum(patch.calls.values())


def decoded(query: torch.Tensor, pool: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    over_latents = paged_attention(query, pool[0], None, table, lengths, value_dim=8)
    return over_latents + paged_attention(query, pool[0], pool[1], table, lengths, scale=0.1)
