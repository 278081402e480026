"""RMSNorm and SwiGLU: compiled for float32 on the CPU (csrc/cpu/elementwise.cpp), where time goes into passes over
memory. Elsewhere they are PyTorch's own operations; the values are the same up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from r1kernels import cpu_lib

PIECE = 32  # rows whose part of the weight's gradient is added up together, as in csrc/cpu/elementwise.cpp


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if x.shape[-1] % 8 == 0 and cpu_lib.takes(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., 2 * I], the gate first -> [..., I]."""
    if gate_up.shape[-1] % 16 == 0 and cpu_lib.takes(gate_up):
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _sizes(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1])
        cpu_lib.call("r1_cpu_rms_norm", x, weight, out, rstd, *_sizes(x), eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        rows, size = _sizes(x)
        grad_x, parts = torch.empty_like(x), x.new_zeros(-(-rows // PIECE), size)
        cpu_lib.call("r1_cpu_rms_norm_backward", x, weight, rstd, grad.contiguous(), grad_x, parts, rows, size)
        return grad_x, parts.sum(0), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        rows, size = _sizes(gate_up)
        out = gate_up.new_empty(*gate_up.shape[:-1], size // 2)
        cpu_lib.call("r1_cpu_swiglu", gate_up, out, rows, size // 2)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, size = _sizes(gate_up)
        out = torch.empty_like(gate_up)
        cpu_lib.call("r1_cpu_swiglu_backward", gate_up, grad.contiguous(), out, rows, size // 2)
        return out
