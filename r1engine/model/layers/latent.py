"""Multi-head latent attention of a packed row: Megatron's module, with its queries, keys and values made here.

Megatron 0.16 cannot take packed rows without Transformer Engine, and drops a part of the rotary key's gradient under
tensor parallelism when the down projection is split (its columns see the gradient of this rank's heads only).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn.functional import pad

from r1engine.hf.architecture import Architecture
from r1engine.model.layers.attention import RowLayout, packed_attention, rotate
from r1engine.model.layers.fp8 import Linears

if find_spec("transformer_engine") is None:
    # Its names import as placeholders, which Megatron 0.16 takes for its presence.
    multi_latent_attention.HAVE_TE = False


class LatentCoreAttention(torch.nn.Module):
    """Megatron's core_attention over a packed row, of queries and keys that are rotated already."""

    def __init__(self, config: Any, **_: Any) -> None:
        """Megatron gives more, of which nothing is needed."""
        super().__init__()
        self.softmax_scale = config.softmax_scale  # the argument knows Megatron's own YaRN settings only

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: RowLayout,
        attn_mask_type: AttnMaskType,
        attention_bias: None = None,  # given by selective recomputation only
    ) -> torch.Tensor:
        # The flash kernels, PyTorch's and flash-attn 2's, want values as wide as keys.
        wide = pad(v, (0, q.shape[-1] - v.shape[-1]))
        out = packed_attention(q, k, wide, packed_seq_params, scale=self.softmax_scale)
        return out[..., : v.shape[-1]].flatten(1)


class LatentAttention(MLASelfAttention):
    """Queries, keys and values out of their latents (DeepSeek-V3, eq. 1-11), the rotary part rotated.

    Context parallelism gathers the latents and makes the keys and values of the whole row on every rank: of
    DeepSeek-V3, 512 + 64 numbers a token go over the wire in place of 128 x (192 + 128), one 71st (with tensor = 8
    one 9th, as a rank then needs the keys of 16 heads only).
    """

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: RowLayout | None = None,
        inference_context: None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """Queries [H, local heads, ...], keys and values [T, local heads, ...], from [H (/ tp), 1, D].

        H: the tokens held here, all T of the row but for context parallelism.
        """
        cfg, heads = self.config, self.num_attention_heads_per_partition
        assert packed_seq_params is not None
        if cfg.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            latent = self._split_over_sequence(self._whole(self.linear_q_down_proj(hidden_states)[0]))
            query, _ = self.linear_q_up_proj(self.q_layernorm(latent))
        latent, key_rope = self._whole(self.linear_kv_down_proj(hidden_states)[0]).split(
            [cfg.kv_lora_rank, cfg.qk_pos_emb_head_dim], dim=-1
        )
        # One rotary key for all heads: each rank's gradient is that of its own heads, to be added up.
        key_rope = copy_to_tensor_model_parallel_region(key_rope, group=self.pg_collection.tp)
        key_rope = rotate(_halves(key_rope), packed_seq_params)
        if packed_seq_params.share is not None:
            gathered = packed_seq_params.gather(torch.cat([latent, key_rope], dim=-1))
            latent, key_rope = gathered.split([cfg.kv_lora_rank, cfg.qk_pos_emb_head_dim], dim=-1)
        key_value, _ = self.linear_kv_up_proj(self.kv_layernorm(self._split_over_sequence(latent)))

        query = query.view(-1, heads, self.q_head_dim)
        query_nope, query_rope = query.split([cfg.qk_head_dim, cfg.qk_pos_emb_head_dim], dim=-1)
        key_nope, value = key_value.view(-1, heads, cfg.qk_head_dim + cfg.v_head_dim).split(
            [cfg.qk_head_dim, cfg.v_head_dim], dim=-1
        )
        query_rope = rotate(_halves(query_rope), packed_seq_params)
        key_rope = key_rope.expand(-1, heads, -1)
        query = torch.cat([query_nope, query_rope], dim=-1)
        return query, torch.cat([key_nope, key_rope], dim=-1), value, None, None

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        """[T, 1, latent] of all ranks, from this rank's columns."""
        return gather_from_tensor_model_parallel_region(part, group=self.pg_collection.tp)

    def _split_over_sequence(self, latent: torch.Tensor) -> torch.Tensor:
        if not self.config.sequence_parallel:
            return latent
        return scatter_to_sequence_parallel_region(latent, group=self.pg_collection.tp)


def _halves(x: torch.Tensor) -> torch.Tensor:
    """Neighbouring dimensions (2i, 2i + 1), which DeepSeek rotates together, put half the dimensions apart."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def latent_attention_spec(model: Architecture, linears: Linears, norm: type) -> ModuleSpec:
    """The layer's attention; `norm` is the class of the latents' norms."""
    assert model.mla is not None
    return ModuleSpec(
        LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=linears.column,
            linear_q_down_proj=linears.column,
            linear_q_up_proj=linears.column,
            linear_kv_down_proj=ColumnParallelLinear,  # never in FP8, see there
            linear_kv_up_proj=linears.column,
            core_attention=LatentCoreAttention,
            linear_proj=linears.row,
            q_layernorm=norm if model.mla.query_rank is not None else IdentityOp,
            kv_layernorm=norm,
        ),
    )
