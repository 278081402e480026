"""Multi-token prediction (DeepSeek-V3, section 2.2) as a draft model that learns beside the policy.

Module k reads the hidden state that predicts token t + k and the embedding of that token, and predicts token t + k + 1.
Deviation from the report: hidden states, embedding and output matrix are taken without gradient, and the modules'
gradient does not count in the norm that clips. In reinforcement learning the objective is the policy's, and its update
must not depend on whether a draft model is trained. (The report trains a base model, all of it on both losses.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn.functional import embedding

from r1engine.model.layers.attention import RowLayout


class NextToken(MegatronModule):
    """One module: two norms, a projection, a transformer layer and a norm."""

    def __init__(
        self, config: TransformerConfig, layer: ModuleSpec, norm: type, depth: int, vp_stage: int | None, groups: Any
    ) -> None:
        super().__init__(config)
        self.tp = groups.tp
        self.enorm, self.hnorm, self.norm = (
            norm(config, config.hidden_size, config.layernorm_epsilon) for _ in range(3)
        )
        self.eh_proj = ColumnParallelLinear(
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=groups.tp,
        )
        # Megatron adds the layers of the stages before to the number.
        number = config.num_layers + depth + 1 - get_transformer_layer_offset(config, vp_stage)
        self.layer = build_module(layer, config=config, layer_number=number, vp_stage=vp_stage, pg_collection=groups)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        """[T (/ tp), 1, D] each -> the hidden state that predicts one token further."""
        both = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)
        hidden = gather_from_tensor_model_parallel_region(self.eh_proj(both)[0], group=self.tp)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp)
        # The generator records the experts of the main model's layers only.
        hidden, _ = self.layer(hidden, attention_mask=None, packed_seq_params=replace(layout, experts=None))
        return self.norm(hidden)


class Mtp(MegatronModule):
    """All modules, named by their depth from 0."""

    def __init__(
        self, config: TransformerConfig, layers: list[ModuleSpec], norm: type, vp_stage: int | None, groups: Any
    ) -> None:
        super().__init__(config)
        self.tp = groups.tp
        for depth, layer in enumerate(layers):
            self.add_module(str(depth), NextToken(config, layer, norm, depth, vp_stage, groups))
        for parameter in self.parameters():
            parameter.shared = True  # Megatron's name for what the gradient norm leaves out

    def forward(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        matrix: torch.Tensor,
        layout: RowLayout,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Log-probability of each token under the modules, their mean.

        Args:
            hidden:    [H (/ tp), 1, D] of the main model, behind its last norm, of the tokens held here.
            tokens:    [T] of the row.
            positions: [T] in their sequences.
            matrix:    [V / tp, D], this rank's part of the embedding.
            layout:    of the row.
            predict:   (hidden, labels [H]) -> [H] log-probability of each label.

        Returns:
            [T] float32; 0 for tokens that have too few before them.
        """
        hidden, modules = hidden.detach(), list(self.children())
        total = torch.zeros(len(tokens), device=tokens.device)
        for depth, module in enumerate(modules):
            # What comes of the end of a sequence is dropped below, but its router's balance counts: no token there may
            # depend on the sequence that happens to lie behind in the row.
            follows = positions.roll(-depth - 1) == positions + depth + 1
            ahead = tokens.roll(-depth - 1).where(follows, 0)
            hidden = module(hidden, self._embed(layout.held(ahead), matrix), layout)
            logp = layout.whole(predict(hidden, layout.held(tokens.roll(-depth - 2)))).roll(depth + 2)
            total = total + logp.masked_fill(positions < depth + 2, 0.0)
        return total / len(modules)

    @torch.no_grad()
    def _embed(self, tokens: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """[T (/ tp), 1, D]: every rank looks up what its part of the matrix has."""
        local = tokens - self.tp.rank() * len(matrix)
        is_here = (local >= 0) & (local < len(matrix))
        rows = embedding(local.clamp(0, len(matrix) - 1), matrix) * is_here[:, None]
        if self.tp.size() > 1:
            dist.all_reduce(rows, group=self.tp)
        if self.config.sequence_parallel:
            rows = rows.chunk(self.tp.size())[self.tp.rank()]
        return rows[:, None]
