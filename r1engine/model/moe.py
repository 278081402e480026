"""The mixture-of-experts layer of DeepSeek-V3 over the r1kernels ops, in place of Megatron's MoELayer.

    router           gate over all experts: weight [E, D], expert_bias [E]
    experts          this rank's routed experts, stacked for grouped matmuls
    shared_experts   Megatron's SharedExpertMLP, if the model has one

`moe_layer_spec(config)` is what a TransformerLayerSubmodules takes as `mlp`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from r1engine.model.expert_parallel import combine, dispatch


def moe_layer_spec(config: TransformerConfig) -> type[MoE]:
    """The module to name as `mlp` of a layer spec.

    Raises:
        ValueError: the configuration asks for what this layer does not compute, or lacks what it needs.
    """
    check_config(config)
    return MoE


def check_config(config: TransformerConfig) -> None:
    """Require what the layer computes: dropless top-k routing of gated SiLU experts, unsharded within an expert.

    Raises:
        ValueError: naming the setting, what was found and what is required.
    """
    experts, ranks, topk = config.num_moe_experts, config.expert_model_parallel_size, config.moe_router_topk
    groups, group_topk = config.moe_router_num_groups or 1, config.moe_router_group_topk or 1
    required = [
        ("num_moe_experts", experts, bool(experts), "at least 1"),
        ("num_moe_experts", experts, (experts or 0) % ranks == 0, f"a multiple of the {ranks} expert-parallel ranks"),
        ("num_moe_experts", experts, (experts or 0) % groups == 0, f"a multiple of the {groups} groups"),
        ("moe_router_topk", topk, topk <= (experts or 0) // groups * group_topk, "at most the experts of its groups"),
        ("moe_router_group_topk", group_topk, group_topk <= groups, f"at most the {groups} groups"),
        ("moe_router_score_function", config.moe_router_score_function, None, "sigmoid"),
        ("moe_router_load_balancing_type", config.moe_router_load_balancing_type, None, "none"),
        ("expert_tensor_parallel_size", config.expert_tensor_parallel_size, None, 1),
        ("gated_linear_unit", config.gated_linear_unit, None, True),
        ("activation_func", config.activation_func, None, torch.nn.functional.silu),
        ("add_bias_linear", config.add_bias_linear, None, False),
        ("moe_expert_capacity_factor", config.moe_expert_capacity_factor, None, None),
        ("moe_shared_expert_gate", config.moe_shared_expert_gate, None, False),
        ("moe_shared_expert_overlap", config.moe_shared_expert_overlap, None, False),
        ("moe_apply_probs_on_input", config.moe_apply_probs_on_input, None, False),
        ("moe_z_loss_coeff", config.moe_z_loss_coeff, None, None),
        ("moe_input_jitter_eps", config.moe_input_jitter_eps, None, None),
        ("moe_latent_size", config.moe_latent_size, None, None),
    ]
    for name, found, fits, wanted in required:
        if not (found == wanted if fits is None else fits):
            raise ValueError(f"moe: {name} is {found}, {wanted} is required")
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ValueError("moe: tensor parallelism needs sequence_parallel, or every rank would route the same tokens")


class Router(torch.nn.Module):
    """The gate of DeepSeek-V3: sigmoid scores, a bias that only chooses, group-limited top-k."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        experts = config.num_moe_experts
        weight = torch.empty(experts, config.hidden_size, dtype=config.params_dtype, device=device)
        if config.perform_initialization:
            config.init_method(weight)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # its gradient is summed over the tensor ranks
        bias = torch.zeros(experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", bias if config.moe_router_enable_expert_bias else None)
        # Megatron's finalize_model_grads reads and clears this name, and moves expert_bias by it.
        self.register_buffer("local_tokens_per_expert", torch.zeros_like(bias), persistent=False)
        self.replay_ids: torch.Tensor | None = None  # [T, K]: choose these instead (routing replay)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D] -> (ids [T, K] int32, weights [T, K] float32). Weights carry the gradient of the scores."""
        cfg = self.config
        logits = torch.nn.functional.linear(x.float(), self.weight.float())
        scores = logits.sigmoid()
        ids = self._choose(scores) if self.replay_ids is None else self.replay_ids.long()
        weights = scores.gather(1, ids)
        if cfg.moe_router_topk > 1:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        if torch.is_grad_enabled():  # not in the forward pass that recomputation repeats
            counts = torch.bincount(ids.flatten(), minlength=cfg.num_moe_experts)
            self.local_tokens_per_expert += counts
        return ids.int(), weights * (cfg.moe_router_topk_scaling_factor or 1.0)

    @torch.no_grad()
    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        cfg = self.config
        biased = scores if self.expert_bias is None else scores + self.expert_bias
        if cfg.moe_router_num_groups:
            grouped = biased.unflatten(1, (cfg.moe_router_num_groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1)[0].sum(-1).topk(cfg.moe_router_group_topk)[1]
            allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
            biased = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        return biased.topk(cfg.moe_router_topk, dim=1)[1]

    def _apply(self, *args: Any, **kwargs: Any) -> Router:
        super()._apply(*args, **kwargs)
        if self.expert_bias is not None:
            self.expert_bias = self.expert_bias.float()  # .bfloat16() on the model would coarsen the choice of experts
        return self


class Experts(torch.nn.Module):
    """This rank's routed experts: expert e of the model is entry e - ep_rank * E_local.

    gate_up_proj: [E_local, 2 * I, D], gate rows before up rows.
    down_proj:    [E_local, D, I].
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        local = config.num_moe_experts // config.expert_model_parallel_size
        d, i = config.hidden_size, config.moe_ffn_hidden_size
        for name, shape, init in (
            ("gate_up_proj", (local, 2 * i, d), config.init_method),
            ("down_proj", (local, d, i), config.output_layer_init_method),
        ):
            weight = torch.empty(shape, dtype=config.params_dtype, device=device)
            if config.perform_initialization:
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init(weight)
            parameter = torch.nn.Parameter(weight)
            # Megatron reduces such gradients over the ranks that hold the same experts, tensor ranks included,
            # and counts them once a rank in the norm.
            parameter.allreduce = config.expert_model_parallel_size == 1 and config.tensor_model_parallel_size == 1
            parameter.tensor_model_parallel = True
            self.register_parameter(name, parameter)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the local experts of each token.

        Args:
            x:       [T, D].
            ids:     [T, K] int32, local expert; -1 where the choice lives on another rank.
            weights: [T, K] float32.
        """
        out = torch.zeros_like(x)
        for e in range(len(self.gate_up_proj)):
            tokens, slots = (ids == e).nonzero(as_tuple=True)
            gate, up = torch.nn.functional.linear(x[tokens], self.gate_up_proj[e]).chunk(2, dim=-1)
            act = (torch.nn.functional.silu(gate) * up * weights[tokens, slots, None]).to(x.dtype)
            out = out.index_add(0, tokens, torch.nn.functional.linear(act, self.down_proj[e]))
        return out


class MoE(torch.nn.Module):
    """Router, routed experts spread over the expert-parallel ranks, and shared experts."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.moe_shared_expert_intermediate_size:
            linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            groups = get_default_pg_collection()
            self.shared_experts = SharedExpertMLP(config, linears, gate=False, pg_collection=groups)

    def forward(self, hidden: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, None]:
        """hidden [T, 1, D] (this rank's part of the row under sequence parallelism) -> (the same shape, no bias)."""
        x = hidden.flatten(0, 1)
        ids, weights = self.router(x)
        group = ps.get_expert_model_parallel_group()
        if group.size() == 1:
            out = self.experts(x, ids, weights)
        else:
            sent, there = dispatch(x, ids, weights, self.config.num_moe_experts // group.size(), group)
            out = combine(self.experts(*sent), there, len(x))
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden).flatten(0, 1)
        return out.view_as(hidden), None
