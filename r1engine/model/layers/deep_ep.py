"""The journey of expert_parallel.py by DeepEP's kernels (PyPI sgl-deep-ep): NVLink inside a node, RDMA between."""

from __future__ import annotations

from functools import cache
from typing import Any

import deep_ep
import torch
import torch.distributed as dist

from r1engine.model.layers.expert_parallel import Arrived, Tokens
from r1kernels import Fp8


@cache
def _buffer(group: dist.ProcessGroup, hidden_bytes: int) -> Any:
    """DeepEP's communication memory, one for all layers."""
    ranks = group.size()
    configs = deep_ep.Buffer.get_dispatch_config(ranks), deep_ep.Buffer.get_combine_config(ranks)
    return deep_ep.Buffer(
        group,
        max(c.get_nvl_buffer_size_hint(hidden_bytes, ranks) for c in configs),
        max(c.get_rdma_buffer_size_hint(hidden_bytes, ranks) for c in configs),
    )


class DeepEp:
    """A journey by deep_ep.Buffer. Its dispatch waits for the numbers of tokens that come, all together and to each
    expert, as DeepEP's normal mode does."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int, hidden_size: int) -> None:
        self.num_experts = num_experts
        self.buffer = _buffer(group, 2 * hidden_size)  # results come back in bfloat16

    def depart(self, x: Tokens, ids: torch.Tensor, weights: torch.Tensor) -> Arrived:
        """As AllToAll.depart; x in bfloat16 or Fp8."""
        ids = ids.long()  # its index type
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = self.buffer.get_dispatch_layout(ids, self.num_experts)
        there, local, of_there, per_local_expert, self.handle, _ = self.buffer.dispatch(
            _plain(x),
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
        )
        return Arrived(_tokens(there), local.int(), of_there, sum(per_local_expert))

    def follow(self, x: Tokens) -> Tokens:
        """As AllToAll.follow."""
        there, *_ = self.buffer.dispatch(_plain(x), handle=self.handle)
        return _tokens(there)

    def arrive(self, rows: torch.Tensor, of_weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As AllToAll.arrive; rows in bfloat16."""
        tokens, weights, _ = self.buffer.combine(rows, self.handle, topk_weights=of_weights)
        return tokens, weights


def _plain(x: Tokens) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return (x.values, x.scale) if isinstance(x, Fp8) else x


def _tokens(there: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> Tokens:
    return Fp8(*(part.contiguous() for part in there)) if isinstance(there, tuple) else there
