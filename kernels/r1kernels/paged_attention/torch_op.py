"""torch.ops.r1kernels.paged_attention: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

import torch

from r1kernels.paged_attention import paged_attention
from r1kernels.tracing import wish


@torch.library.custom_op("r1kernels::paged_attention", mutates_args=())
def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    value_dim: int | None,
    scale: float,
    impl: str,
) -> torch.Tensor:
    """As paged_attention."""
    places = block_table, lengths
    return paged_attention(query, keys, values, *places, value_dim=value_dim, scale=scale, impl=wish(impl))


@attention.register_fake
def _(query, keys, values, block_table, lengths, value_dim, scale, impl):
    return query.new_empty(query.shape[0], query.shape[1], value_dim if values is None else values.shape[3])
