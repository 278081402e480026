"""The mixture-of-experts layer over the r1kernels ops, in place of Megatron's MoELayer.

    router           weight [E, D], buffer expert_bias [E]; fused gate, sparse choices
    experts          weight1 [local experts, 2I, D] (gate rows, then up rows), weight2 [local experts, D, I]
    shared_experts   Megatron's SharedExpertMLP, if the model has one

`moe_layer_spec(config)` is what TransformerLayerSubmodules takes as `mlp`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from r1engine.model.layers.expert_parallel import AllToAll, Arrived
from r1engine.model.layers.experts import RoutedExperts
from r1engine.model.layers.fp8 import linears
from r1engine.model.layers.replay_router import ReplayRouter
from r1kernels import Fp8, fp8_quantize, moe_balance_loss, moe_gate_topk, moe_plan
from r1kernels.moe_experts.layer import Precision, alignment, experts_backward, experts_forward


def moe_layer_spec(config: TransformerConfig, *, is_fp8: bool = False) -> type[MoE]:
    """The module to name as `mlp` of a layer spec; with is_fp8, DeepSeek-V3's FP8 for the routed experts.

    Raises:
        ValueError: the configuration asks for what this layer does not compute, or lacks what it needs.
    """
    check_config(config, is_fp8)
    return Fp8MoE if is_fp8 else MoE


def check_config(config: TransformerConfig, is_fp8: bool) -> None:
    """Require what the layer computes: dropless top-k routing to gated SiLU experts, each whole on its rank.

    Raises:
        ValueError: naming the setting, what was found and what is required.
    """
    topk, groups = config.moe_router_topk, config.moe_router_num_groups or 1
    best = config.moe_router_group_topk or 1
    required = [
        ("expert_tensor_parallel_size", config.expert_tensor_parallel_size, 1),
        ("gated_linear_unit", config.gated_linear_unit, True),
        ("activation_func", config.activation_func, torch.nn.functional.silu),
        ("add_bias_linear", config.add_bias_linear, False),
        ("moe_expert_capacity_factor", config.moe_expert_capacity_factor, None),
        ("moe_shared_expert_gate", config.moe_shared_expert_gate, False),
        ("moe_shared_expert_overlap", config.moe_shared_expert_overlap, False),
        ("moe_apply_probs_on_input", config.moe_apply_probs_on_input, False),
        ("moe_z_loss_coeff", config.moe_z_loss_coeff, None),
        ("moe_input_jitter_eps", config.moe_input_jitter_eps, None),
        ("moe_latent_size", config.moe_latent_size, None),
        ("moe_router_force_load_balancing", config.moe_router_force_load_balancing, False),
    ]
    for name, found, wanted in required:
        if found != wanted:
            raise ValueError(f"moe: {name} is {found}, {wanted} is required")
    if config.moe_router_load_balancing_type not in ("none", "seq_aux_loss"):
        found = config.moe_router_load_balancing_type
        raise ValueError(f"moe: moe_router_load_balancing_type is {found}, none or seq_aux_loss is required")
    if groups > 1 and topk // best != 2:
        raise ValueError(
            f"moe: moe_router_topk={topk} and moe_router_group_topk={best}: a ratio of 2 is required with groups, "
            "because Megatron ranks a group by so many of its experts and DeepSeek-V3 by 2"
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ValueError("moe: tensor parallelism needs sequence_parallel, or every rank would route the same tokens")
    sizes = config.hidden_size, config.moe_ffn_hidden_size
    if is_fp8 and any(size % 128 for size in sizes):
        raise ValueError(f"moe: FP8 needs hidden_size and moe_ffn_hidden_size divisible by 128, got {sizes}")


class FusedRouter(ReplayRouter):
    """The same router by the fused gate: the choices stay sparse."""

    def forward(self, x: torch.Tensor, padding_mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, 1, D] -> (ids [T, K] int32, weights [T, K] float32). The weights carry the gradient of the scores.

        A replayed row that starts with a negative id is chosen freely (a token without a recorded routing).
        """
        self._maintain_float32_expert_bias()
        cfg, recorded = self.config, self.router_replay.experts
        has_groups = bool(cfg.moe_router_num_groups)
        logits = torch.nn.functional.linear(x.flatten(0, 1).float(), self.weight.float())
        gate = moe_gate_topk(
            logits,
            self.expert_bias,
            topk=cfg.moe_router_topk,
            n_group=cfg.moe_router_num_groups if has_groups else 1,
            topk_group=cfg.moe_router_group_topk if has_groups else 1,
            score=cfg.moe_router_score_function,
            # After a softmax over all experts Megatron leaves the weights as they are.
            norm=cfg.moe_router_topk > 1 and not (self.score_function == "softmax" and cfg.moe_router_pre_softmax),
            scale=cfg.moe_router_topk_scaling_factor or 1.0,
            replay_ids=None if recorded is None else recorded.int().contiguous(),
        )
        if not torch.is_grad_enabled():  # also in the first of the two passes of recomputation
            return gate.ids, gate.weights
        if self.enable_expert_bias:
            chosen = torch.zeros(len(gate.ids), self.num_experts, dtype=torch.bool, device=gate.ids.device)
            self.local_tokens_per_expert += self.count(chosen.scatter_(1, gate.ids.long(), True))
        if cfg.moe_router_load_balancing_type == "none":
            return gate.ids, gate.weights
        return gate.ids, MoEAuxLossAutoScaler.apply(gate.weights, self._balance_loss(logits))

    def _balance_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The loss that the class above attaches. Equation 18 counts by score alone: no bias, no groups, no replay."""
        cfg, layout = self.config, self.layout
        assert layout is not None
        start = self.tp_group.rank() * len(logits) if cfg.sequence_parallel else 0
        borders = (layout.held_cu_seqlens - start).clamp(0, len(logits))
        gate = moe_gate_topk(
            logits, topk=cfg.moe_router_topk, n_group=1, topk_group=1, score=self.score_function, cu_seqlens=borders
        )
        assert gate.sequence_counts is not None  # as with cu_seqlens
        self._add_up(gate.sequence_counts)
        of_sequences = moe_balance_loss(gate, layout.cu_seqlens)
        return cfg.moe_aux_loss_coeff * (layout.sequence_weight * of_sequences).sum()


class MoE(MoELayer):
    """Router, routed experts spread over the expert-parallel ranks, and shared experts."""

    precision: Precision = "same"

    def __init__(self, config: TransformerConfig) -> None:
        check_config(config, is_fp8=self.precision != "same")
        column, row = linears(config)
        shared = ModuleSpec(SharedExpertMLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row))
        super().__init__(config, MoESubmodules(experts=RoutedExperts, shared_experts=shared, router=FusedRouter))

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: None = None, padding_mask: None = None
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [T, 1, D], under sequence parallelism this rank's part of the row -> (the same shape, None)."""
        x = hidden_states.flatten(0, 1)
        ids, weights = self.router(hidden_states)
        matrices = self.experts.weight1, self.experts.weight2  # for their gradients
        out = _SpreadExperts.apply(x, ids, weights, self._journey(x), self, *matrices)
        out = out.view_as(hidden_states)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden_states)
        return out, None

    def _journey(self, x: torch.Tensor) -> Any:
        if self.ep_group.size() == 1:
            return None
        experts = self.config.num_moe_experts
        if x.device.type == "cuda" and x.dtype == torch.bfloat16 and importlib.util.find_spec("deep_ep") is not None:
            from r1engine.model.layers.deep_ep import DeepEp

            return DeepEp(self.ep_group, experts, x.shape[1])
        return AllToAll(self.ep_group, experts)


class Fp8MoE(MoE):
    """The same with the matmuls of the routed experts in FP8; tokens and gradients leave for other ranks in FP8."""

    precision: Precision = "fp8"


class _SpreadExperts(torch.autograd.Function):
    """moe_experts of this rank between the two halves of a journey; None stays at home."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        journey: Any,
        layer: MoE,
        weight1: torch.Tensor,
        weight2: torch.Tensor,
    ) -> torch.Tensor:
        precision, quantize = layer.precision, layer.experts.fp8
        there = Arrived(x, ids, weights, None)
        if journey is not None:
            there = journey.depart(_for_the_wire(x, precision), ids, weights)
        plan = moe_plan(there.ids, len(weight1), align=alignment(precision), num_choices=there.num_choices)
        out, h = experts_forward(there.x, plan, there.weights, weight1, weight2, None, precision, quantize)
        sent = there.x if isinstance(there.x, Fp8) else (there.x,)
        ctx.save_for_backward(*sent, there.weights, h)
        ctx.num_sent, ctx.plan, ctx.journey, ctx.layer = len(sent), plan, journey, layer
        return out if journey is None else journey.arrive(out, None)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: recomputation hands them out once
        sent, (weights, h) = saved[: ctx.num_sent], saved[ctx.num_sent :]
        x = Fp8(*sent) if len(sent) == 2 else sent[0]
        experts, precision, wants_wgrad = ctx.layer.experts, ctx.layer.precision, any(ctx.needs_input_grad[5:])
        grad = grad.contiguous()
        if ctx.journey is not None:
            grad = ctx.journey.follow(_for_the_wire(grad, precision))
        matrices = experts.weight1, experts.weight2
        grad_x, grad_weights, *wgrads = experts_backward(
            grad, x, weights, *matrices, h, ctx.plan, precision, wants_wgrad, experts.fp8
        )
        if ctx.journey is not None:
            grad_x, grad_weights = ctx.journey.arrive(grad_x, grad_weights)
        return grad_x, None, grad_weights, None, None, *wgrads


def _for_the_wire(tokens: torch.Tensor, precision: Precision) -> torch.Tensor | Fp8:
    return tokens if precision == "same" else fp8_quantize(tokens, block=(1, 128))
