"""Stands in for DeepEP, whose kernels need GPUs: the calls of deep_ep.Buffer that we make, over gloo.

It requires the argument types that DeepEP's documentation requires, so that a test sees what we hand over.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from r1engine.model.layers.expert_parallel import AllToAll
from r1kernels import Fp8


class _Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    get_rdma_buffer_size_hint = get_nvl_buffer_size_hint


class Buffer:
    """[T, H] tokens as bfloat16, or as (float8_e4m3fn, float32 scales)."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group = group

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> _Config:
        return _Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int):
        assert topk_idx.dtype == torch.int64
        self.num_experts = num_experts
        return "per rank", None, "per expert", "is in rank", None

    def dispatch(self, x, handle=None, topk_idx=None, topk_weights=None, **layout: object):
        if isinstance(x, tuple):
            assert x[0].dtype == torch.float8_e4m3fn and x[1].dtype == torch.float32 and x[1].is_contiguous()
            x = Fp8(*x)
        else:
            assert x.dtype == torch.bfloat16
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return _plain(handle.follow(x)), None, None, None, None, None
        assert list(layout.values()) == ["per rank", None, "is in rank", "per expert"]
        assert topk_idx.dtype == torch.int64 and topk_weights.dtype == torch.float32
        journey = AllToAll(self.group, self.num_experts)
        there, ids, weights, _ = journey.depart(x, topk_idx.int(), topk_weights)
        per_expert = [int((ids == e).sum()) for e in range(journey.experts_per_rank)]
        return _plain(there), ids.long(), weights, per_expert, journey, None

    def combine(self, x: torch.Tensor, handle: AllToAll, topk_weights: torch.Tensor | None = None):
        assert x.dtype == torch.bfloat16 and (topk_weights is None or topk_weights.dtype == torch.float32)
        return *handle.arrive(x, topk_weights), None


def _plain(x):
    return tuple(x) if isinstance(x, Fp8) else x
