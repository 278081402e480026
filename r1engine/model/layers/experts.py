"""The routed experts of a rank: one parameter for each of their two matrices, as the grouped products take it.

In checkpoints they are what Megatron's SequentialMLP writes, so that either kind of experts goes on from the other's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from r1kernels import Fp8
from r1kernels.moe_experts.layer import quantize_weight, transposed

# Parameter -> the matrix of one expert of SequentialMLP.
MATRICES = {"weight1": "linear_fc1.weight", "weight2": "linear_fc2.weight"}


class RoutedExperts(MegatronModule):
    """Weights of E experts; MoE computes with them.

    Attributes:
        weight1: [E, 2I, D], of each expert its gate rows, then its up rows.
        weight2: [E, D, I].
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: Any) -> None:
        super().__init__(config)
        self.groups = pg_collection
        hidden, inner = config.hidden_size, config.moe_ffn_hidden_size
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        for name, shape, init in (
            ("weight1", (2 * inner, hidden), config.init_method),
            ("weight2", (hidden, inner), config.output_layer_init_method),
        ):
            weight = torch.nn.Parameter(
                torch.empty(num_local_experts, *shape, dtype=config.params_dtype, device=device)
            )
            # The gradient norm counts what is marked so on every tensor-parallel rank: they hold different experts.
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            if config.perform_initialization:
                init(weight)
            self.register_parameter(name, weight)
        self._kept: dict[tuple[torch.Tensor, bool], Fp8] | None = None

    def keep_fp8(self, is_kept: bool) -> None:
        """Whether what `fp8` makes is kept, to be given again; without, what was kept is freed."""
        self._kept = {} if is_kept else None

    def fp8(self, weight: torch.Tensor, transpose: bool) -> Fp8:
        """`weight1` or `weight2` in FP8 in 128x128 blocks; with `transpose` the last two dimensions are exchanged."""
        kept = {} if self._kept is None else self._kept
        if (weight, False) not in kept:
            kept[weight, False] = quantize_weight(weight)
        if transpose and (weight, True) not in kept:
            kept[weight, True] = transposed(kept[weight, False])
        return kept[weight, transpose]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensor]:
        """Of each matrix the part of this rank's experts, under the names and in the shapes of SequentialMLP."""
        groups, axis = self.groups, len(sharded_offsets)
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.{matrix}",
                getattr(self, name),
                *sharded_offsets,
                (axis, groups.ep.rank(), groups.ep.size()),
                replica_id=(0, 0, groups.expt_dp.rank()),
                prepend_axis_num=axis,
            )
            for name, matrix in MATRICES.items()
        }
