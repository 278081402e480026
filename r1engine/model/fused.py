"""RMSNorm and SwiGLU as single autograd functions for float32 on the CPU, where time goes into passes over memory.

Elsewhere they are PyTorch's own operations. Each function keeps its input alone and works on blocks of tokens that
stay in a core's cache; the values are those of the plain formulas up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 1 << 16  # 256 KiB of float32: a few such blocks fit a level-2 cache


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [..., 2 * I], the gate first -> [..., I]."""
    if gate_up.device.type == "cpu" and gate_up.dtype == torch.float32:
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _blocks(rows: int, columns: int) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // columns)
    return [slice(i, i + step) for i in range(0, rows, step)]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """dx = rstd * (g w) - x * rstd^3 / D * sum(g w x);  dw = sum over tokens of g x rstd."""
        x, weight, rstd = ctx.saved_tensors
        size = x.shape[-1]
        flat_x, flat_grad, flat_rstd = x.reshape(-1, size), grad.reshape(-1, size), rstd.reshape(-1, 1)
        grad_x, grad_weight = torch.empty_like(flat_x), torch.zeros_like(weight)
        for rows in _blocks(*flat_x.shape):
            xs, gs, rs = flat_x[rows], flat_grad[rows], flat_rstd[rows]
            products = xs * gs
            grad_weight.addmv_(products.t(), rs[:, 0])
            correction = torch.mv(products, weight).unsqueeze(1).mul_(rs.pow(3)).div_(-size)
            torch.mul(gs, weight, out=grad_x[rows]).mul_(rs).addcmul_(xs, correction)
        return grad_x.view_as(x), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """With s = sigmoid(gate), t = gate s: d gate = g up (s + t (1 - s)), d up = g t."""
        (gate_up,) = ctx.saved_tensors
        out = torch.empty_like(gate_up)
        size = grad.shape[-1]
        flat, flat_grad, flat_out = gate_up.view(-1, 2 * size), grad.reshape(-1, size), out.view(-1, 2 * size)
        for rows in _blocks(*flat_grad.shape):
            (gate, up), (grad_gate, grad_up), g = flat[rows].chunk(2, 1), flat_out[rows].chunk(2, 1), flat_grad[rows]
            s = torch.sigmoid(gate)
            t = gate * s
            torch.mul(g, t, out=grad_up)
            torch.mul(g, up, out=grad_gate).mul_(torch.addcmul(t, t, s, value=-1).add_(s))
        return out
