"""r1kernels: the fused operations of GRPO training; importable alone, needs only PyTorch."""

from __future__ import annotations

import importlib

from r1kernels import integrations
from r1kernels.fp8_cast import Fp8, fp8_dequantize, fp8_quantize
from r1kernels.group_advantage import GroupAdvantage, group_advantage
from r1kernels.grpo_loss import GrpoMetrics, GrpoObjective, grpo_loss
from r1kernels.grpo_loss.slopes import FusedGrpo
from r1kernels.linear_grpo_loss import linear_grpo_loss
from r1kernels.linear_logprob import linear_logprob
from r1kernels.logits_grpo_loss import logits_grpo_loss
from r1kernels.logprob_entropy import LogProb, logprob_entropy
from r1kernels.moe_combine import moe_combine, moe_combine_backward_quant
from r1kernels.moe_experts import moe_experts
from r1kernels.moe_gate_topk import Gate, moe_balance_loss, moe_gate_topk, moe_update_bias
from r1kernels.moe_grouped_gemm import (
    moe_grouped_gemm,
    moe_grouped_gemm_fp8,
    moe_grouped_wgrad,
    moe_grouped_wgrad_fp8,
)
from r1kernels.moe_permute_quant import Fp8Rows, moe_permute, moe_permute_fp8, moe_permute_quant
from r1kernels.moe_plan import RowPlan, moe_plan
from r1kernels.moe_swiglu_quant import SwigluGrad, moe_swiglu, moe_swiglu_quant, moe_swiglu_quant_backward
from r1kernels.paged_attention import paged_attention

__version__ = "0.1.0"

__all__ = [
    "Fp8",
    "Fp8Rows",
    "FusedGrpo",
    "Gate",
    "GroupAdvantage",
    "GrpoMetrics",
    "GrpoObjective",
    "LogProb",
    "RowPlan",
    "SwigluGrad",
    "fp8_dequantize",
    "fp8_quantize",
    "group_advantage",
    "grpo_loss",
    "integrations",
    "linear_grpo_loss",
    "linear_logprob",
    "logits_grpo_loss",
    "logprob_entropy",
    "moe_balance_loss",
    "moe_combine",
    "moe_combine_backward_quant",
    "moe_experts",
    "moe_gate_topk",
    "moe_grouped_gemm",
    "moe_grouped_gemm_fp8",
    "moe_grouped_wgrad",
    "moe_grouped_wgrad_fp8",
    "moe_permute",
    "moe_permute_fp8",
    "moe_permute_quant",
    "moe_plan",
    "moe_swiglu",
    "moe_swiglu_quant",
    "moe_swiglu_quant_backward",
    "moe_update_bias",
    "paged_attention",
]


def _register() -> None:
    """With torch.library, so that graphs that were exported before find their nodes."""
    ops = ("fp8_cast", "group_advantage", "linear_grpo_loss", "logits_grpo_loss", "paged_attention")
    of_experts = ("moe_combine", "moe_experts", "moe_gate_topk", "moe_grouped_gemm", "moe_swiglu_quant")
    for op in (*ops, *of_experts):
        importlib.import_module(f"r1kernels.{op}.torch_op")


_register()
