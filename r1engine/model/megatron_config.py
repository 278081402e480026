"""Megatron's configuration of a model in a layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from r1engine.config import Model, Parallel
from r1engine.hf.architecture import Architecture


def transformer_config(
    arch: Architecture, model: Model, layout: Parallel, *, dtype: torch.dtype, on_cpu: bool
) -> TransformerConfig:
    """Megatron's configuration of a model in a layout.

    Args:
        arch:   what the model is.
        model:  how it is to be computed.
        layout: parallel sizes.
        dtype:  of the weights.
        on_cpu: whether it runs on CPUs.
    """
    settings = _sizes(arch) | _layout(layout) | _running(dtype, on_cpu=on_cpu)
    if model.recompute == "selective":
        settings |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    elif model.recompute:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if arch.moe is not None:
        settings |= _expert_settings(arch, model, layout)
    if model.fp8:
        settings |= {"fp8": "e4m3", "fp8_recipe": "blockwise"}
    if arch.mla is None:
        return TransformerConfig(**settings)
    return MLATransformerConfig(**settings | _latent_settings(arch))


def _sizes(arch: Architecture) -> dict[str, Any]:
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "ffn_hidden_size": arch.intermediate_size,
        "add_bias_linear": False,
        "add_qkv_bias": arch.has_qkv_bias,
        "softmax_scale": arch.softmax_scale,
        "qk_layernorm": arch.has_qk_norm,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _layout(par: Parallel) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": par.tensor,
        "pipeline_model_parallel_size": par.pipeline,
        "virtual_pipeline_model_parallel_size": par.virtual if par.virtual > 1 else None,
        "num_layers_in_first_pipeline_stage": par.first_stage_layers,
        "num_layers_in_last_pipeline_stage": par.last_stage_layers,
        "context_parallel_size": par.context,
        "sequence_parallel": par.is_sequence_parallel,
        # Between interleaved stages the shape messages of rows of different lengths cross each other (Megatron 0.16),
        # and two stages in a batch of messages mistake a gradient for an activation.
        "variable_seq_lengths": par.virtual == 1,
        "batch_p2p_comm": par.virtual == 1,
    }


def _running(dtype: torch.dtype, *, on_cpu: bool) -> dict[str, Any]:
    return {
        "moe_token_dispatcher_type": "alltoall",  # required by variable_seq_lengths, for dense models too
        "calculate_per_token_loss": True,  # gradients are summed over rows and ranks, never averaged
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": on_cpu,
        # The values are overwritten from a Hugging Face folder. But only initialization marks weights as sharded, and
        # without the marks the gradient norm counts the first rank's shards alone.
        "perform_initialization": True,
        "gradient_accumulation_fusion": False,  # needs APEX
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "deallocate_pipeline_outputs": False,
    }


def _latent_settings(arch: Architecture) -> dict[str, Any]:
    mla = arch.mla
    assert mla is not None
    return {
        "multi_latent_attention": True,
        "q_lora_rank": mla.query_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_head_dim": mla.nope_dim,
        "qk_pos_emb_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "qk_layernorm": True,
        "kv_channels": mla.value_dim,
        "rope_type": "rope",  # Megatron's embedding is built and not used
    }


def _expert_settings(arch: Architecture, model: Model, layout: Parallel) -> dict[str, Any]:
    moe = arch.moe
    assert moe is not None
    has_balance_loss = model.balance_loss > 0
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_size or None,
        "moe_layer_freq": [int(has_experts) for has_experts in moe.layers],
        "moe_router_topk": moe.top_k,
        "moe_router_num_groups": moe.num_groups if moe.num_groups > 1 else None,
        "moe_router_group_topk": moe.group_top_k if moe.num_groups > 1 else None,
        "moe_router_score_function": moe.score,
        "moe_router_pre_softmax": not moe.is_normalized,
        "moe_router_topk_scaling_factor": moe.scale if moe.scale != 1 else None,
        "moe_router_enable_expert_bias": moe.has_bias,
        "moe_router_bias_update_rate": model.expert_bias_rate,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss" if has_balance_loss else "none",
        "moe_aux_loss_coeff": model.balance_loss,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }
