"""The feed-forward half of a decoder block: an MLP, or routed experts, whose choices are kept for the trainer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from r1engine.hf.architecture import Moe
from r1engine.rollout.local.weights import Experts, Mlp
from r1kernels import moe_experts, moe_gate_topk


class Chosen:
    """The experts of the tokens of one pass through the layers."""

    def __init__(self) -> None:
        self._layers: list[torch.Tensor] = []  # [N, k] int64, one a layer with experts

    def add(self, experts: torch.Tensor) -> None:
        """Those of the next layer with experts."""
        self._layers.append(experts)

    def stack(self) -> torch.Tensor | None:
        """[N, layers with experts, k]; None without such layers."""
        return torch.stack(self._layers, dim=1) if self._layers else None


def add_mlp(x: torch.Tensor, normed: torch.Tensor, mlp: Mlp) -> None:
    """Adds the MLP of `normed` to x, both [N, D], in place."""
    gate, up = F.linear(normed, mlp.gate_up).chunk(2, dim=1)
    x.addmm_(F.silu(gate).mul_(up), mlp.down.t())


def add_experts(x: torch.Tensor, normed: torch.Tensor, layer: Experts, moe: Moe, chosen: Chosen) -> None:
    """Adds the shared expert and the weighted routed ones to x, in place, and notes the choice."""
    gate = moe_gate_topk(
        F.linear(normed.float(), layer.router.float()),
        layer.bias,
        topk=moe.top_k,
        n_group=moe.num_groups,
        topk_group=moe.group_top_k,
        score=moe.score,
        norm=moe.is_normalized,
        scale=moe.scale,
    )
    experts = gate.ids.long()
    chosen.add(experts)
    if layer.shared is not None:
        add_mlp(x, normed, layer.shared)
    if x.device.type != "cpu":  # nothing waits for the device, whatever was chosen
        x.copy_(moe_experts(normed, gate.ids, gate.weights, layer.routed.gate_up, layer.routed.down, residual=x))
        return
    for index, expert in enumerate(layer.routed.each):
        rows, places = torch.where(experts == index)
        if len(rows):
            weighted = torch.zeros(len(rows), x.shape[1], dtype=x.dtype, device=x.device)
            add_mlp(weighted, normed[rows], expert)
            x.index_add_(0, rows, weighted * gate.weights[rows, places, None].to(x.dtype))
