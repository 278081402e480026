"""torch.ops.r1kernels.paged_attention: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

import torch

from r1kernels.paged_attention import paged_attention
from r1kernels.tracing import wish


@torch.library.custom_op("r1kernels::paged_attention", mutates_args=())
def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    impl: str,
) -> torch.Tensor:
    """As paged_attention."""
    return paged_attention(query, keys, values, block_table, lengths, scale=scale, impl=wish(impl))


@attention.register_fake
def _(query, keys, values, block_table, lengths, scale, impl):
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])
