"""The Megatron-core model: configuration, layers, and a GPTModel that maps a packed row to log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from r1engine.architecture import Architecture, rotary_frequencies
from r1engine.batch import PackedBatch
from r1engine.model.attention import RowLayout, packed_attention, row_layout
from r1engine.model.fused import rms_norm, swiglu
from r1engine.model.parallel import World
from r1kernels import logprob_entropy


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight is marked for sequence parallelism (Megatron's own without TE refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(MLP):
    """Megatron's MLP with one operation between its products. (Its own adds an offset of 0 to all of `up`.)"""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))

    def forward(self, hidden_states: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, None]:
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(gate_up))


class PackedAttention(torch.nn.Module):
    """Megatron's core_attention over a packed row."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None,
        softmax_scale: float | None,
        pg_collection: Any,
    ) -> None:
        super().__init__()

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: None,
        /,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: None,
        packed_seq_params: RowLayout,
    ) -> torch.Tensor:
        return packed_attention(q, k, v, packed_seq_params)


class PackedGPT(GPTModel):
    """A GPTModel whose last stage returns log-probabilities; the logits never leave it."""

    def __init__(self, model: Architecture, temperature: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature
        self.frequencies = rotary_frequencies(model).to(torch.cuda.current_device())

    def forward(self, row: PackedBatch) -> torch.Tensor:
        """One packed row through this pipeline stage.

        Returns:
            Last stage: [2, T] float32, log-probability and entropy of each token given those before it in its
            sequence (nats, at the sampling temperature; 0 on the first token). Others: hidden states.
        """
        layout = row_layout(row, self.frequencies, self.config.params_dtype)
        hidden = self.embedding(row.tokens[None], row.positions[None]) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        tp_group = self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None
        predicted = logprob_entropy(
            logits.squeeze(1),
            row.tokens.roll(-1),
            temperature=self.temperature,
            tp_group=tp_group,
            inplace_backward=True,
        )
        # Position t predicts token t+1; entry t of the result belongs to token t.
        out = torch.stack(predicted).roll(1, dims=1)
        return out.masked_fill(row.positions == 0, 0.0)


def transformer_config(
    model: Architecture, world: World, *, sequence: bool, dtype: torch.dtype, recompute: bool
) -> TransformerConfig:
    """Megatron's configuration of the model in this layout."""
    on_cpu = world.device.type == "cpu"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.intermediate_size,
        add_bias_linear=False,
        add_qkv_bias=model.has_qkv_bias,
        qk_layernorm=model.has_qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=world.tp_size,
        pipeline_model_parallel_size=world.pp_size,
        sequence_parallel=sequence,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, for dense models too
        calculate_per_token_loss=True,  # gradients are summed over rows and ranks, never averaged
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        # The values are overwritten from a Hugging Face folder. But only initialization marks weights as sharded, and
        # without the marks the gradient norm counts the first rank's shards alone.
        perform_initialization=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        gradient_accumulation_fusion=False,  # needs APEX
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=False,
    )


def build(model: Architecture, config: TransformerConfig, world: World, temperature: float) -> PackedGPT:
    """This rank's stage of the model, weights not yet set."""
    qk_norm = RMSNorm if model.has_qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=GatedMLP,
        mlp_bda=get_bias_dropout_add,
    )
    layers = [ModuleSpec(TransformerLayer, submodules=layer)] * get_num_layers_to_build(config)
    return PackedGPT(
        model,
        temperature,
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_positions,
        pre_process=world.pp_rank == 0,
        post_process=world.pp_rank == world.pp_size - 1,
        share_embeddings_and_output_weights=model.is_tied,
        position_embedding_type="none",  # the rotary embedding is part of packed_attention
    )
