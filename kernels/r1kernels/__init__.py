"""r1kernels: the fused operations of GRPO training; importable alone, needs only PyTorch."""

from r1kernels.group_advantage import GroupAdvantage, group_advantage
from r1kernels.grpo_loss import GrpoMetrics, grpo_loss
from r1kernels.logprob_entropy import LogProb, logprob_entropy

__all__ = ["GroupAdvantage", "GrpoMetrics", "LogProb", "group_advantage", "grpo_loss", "logprob_entropy"]
