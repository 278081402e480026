"""What moe_experts means: every expert in turn over the tokens that chose it, differentiated by PyTorch."""

from __future__ import annotations

import torch


def experts_reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x [T, H], ids [T, K], weights [T, K], gate_up [E, 2I, H], down [E, H, I], residual [T, H]) -> [T, H]."""
    out = torch.zeros_like(x) if residual is None else residual
    for e in range(len(gate_up)):
        tokens, choices = (ids == e).nonzero(as_tuple=True)
        gate, up = torch.nn.functional.linear(x[tokens], gate_up[e]).chunk(2, dim=1)
        rows = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[e])
        out = out.index_add(0, tokens, (rows * weights[tokens, choices, None]).to(x.dtype))
    return out
