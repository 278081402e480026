"""The router of a mixture-of-experts layer over packed rows: recorded choices replayed, balance loss per sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer

from r1engine.model.layers.attention import RowLayout

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # Megatron 0.16 forgets to define it without Transformer Engine


class _Replay:
    """Where Megatron asks for the chosen experts: the recorded ones, if there are any."""

    def __init__(self) -> None:
        self.experts: torch.Tensor | None = None  # [T local, k]; a row of a token without a record starts negative

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Callable
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.experts is None:
            return choose(scores, topk, num_groups, group_topk)
        _, chosen = choose(scores, topk, num_groups, group_topk)
        experts = torch.where(self.experts[:, :1] < 0, chosen, self.experts)
        return scores.gather(1, experts), experts


class ReplayRouter(TopKRouter):
    """Megatron's router, told by its layer which packed row is in it.

    Replay (R3, arXiv 2510.11370): with recorded experts the choice is theirs and the weights are computed from this
    model's scores, so that the router's gradient stays. Balance (DeepSeek-V3, eq. 17-20): Megatron takes a whole
    packed row for one sequence; here every sequence has its own loss, weighted as its tokens are in the objective.
    """

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config, pg_collection)
        self.router_replay = _Replay()
        self.layout: RowLayout | None = None

    def enter(self, layout: RowLayout, expert_layer: int) -> None:
        """Called before each forward pass of the layer, recomputation included.

        Args:
            layout:       of the row.
            expert_layer: index of the layer among those with experts.
        """
        self.layout = layout
        recorded = layout.experts
        self.router_replay.experts = None if recorded is None else self._local(recorded[:, expert_layer])

    def _local(self, held: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's part of a tensor over the tokens that the layout holds."""
        ranks = self.tp_group.size() if self.config.sequence_parallel else 1
        return held if ranks == 1 else held.chunk(ranks)[self.tp_group.rank()]

    def _add_up(self, counts: torch.Tensor) -> None:
        """In place, over the ranks that hold the other parts of the row."""
        if self.config.sequence_parallel and self.tp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_group)
        if self.cp_group.size() > 1:
            dist.all_reduce(counts, group=self.cp_group)

    def count(self, routing_map: torch.Tensor) -> torch.Tensor:
        """[E] choices of each expert by the tokens that are not padding, out of [T local, E] bool."""
        if self.layout is None:
            return routing_map.sum(dim=0)
        is_sample = self._local((self.layout.sequence_weight > 0)[self.layout.sequence_of_token])
        return (routing_map & is_sample[:, None]).sum(dim=0)

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: None = None) -> None:
        """Counts the load; Megatron's own is compiled, which costs seconds."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            self.local_tokens_per_expert += self.count(routing_map)

    def _apply_seq_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Attaches alpha * sum over sequences of weight * (sum over experts of f * P), with

        f = experts / (k * tokens) * (tokens that would choose the expert),  P = mean score of the expert.
        """
        assert self.layout is not None
        sequence = self._local(self.layout.sequence_of_token)
        lengths = self.layout.cu_seqlens.diff()
        shape = (len(lengths), self.num_experts)
        counts = probs.new_zeros(shape, dtype=torch.float32).index_add_(0, sequence, routing_map.float())
        self._add_up(counts)
        scores = torch.zeros_like(counts).index_add(0, sequence, scores_for_aux_loss.float())
        scale = self.layout.sequence_weight * self.num_experts / (self.topk * lengths.float().square())
        loss = self.config.moe_aux_loss_coeff * (scale[:, None] * counts * scores).sum()
        return MoEAuxLossAutoScaler.apply(probs, loss)


class ExpertsLayer(TransformerLayer):
    """A transformer layer that tells its router which row comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        moe = self.config.moe_layer_freq
        self.mlp.router.enter(kwargs["packed_seq_params"], sum(moe[: self.layer_number - 1]))
        return super().forward(*args, **kwargs)
