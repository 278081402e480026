"""What logprob_entropy means, in PyTorch, a block of rows at a time so that no [T, V] float32 copy exists."""

from __future__ import annotations

import torch
import torch.distributed as dist

BLOCK_ELEMENTS = 1 << 20  # logits handled at once: 4 MiB of float32 stays near a core's cache


def _blocks(logits: torch.Tensor) -> list[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(i, i + rows) for i in range(0, logits.shape[0], rows)]


def _scaled(logits: torch.Tensor, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    """logits / temperature in the accumulation dtype; a fresh tensor only where something changes."""
    z = logits.to(dtype)
    return z if temperature == 1.0 else z / temperature


class LogProbEntropy(torch.autograd.Function):
    """(logits [T, V_local], labels [T] relative to this rank's slice) -> (logp [T], entropy [T])."""

    @staticmethod
    def forward(ctx, logits, labels, temperature, tp_group, inplace_backward):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        maximum, total, weighted, picked = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(4))
        is_here = (labels >= 0) & (labels < logits.shape[1])
        column = torch.where(is_here, labels, 0)
        for rows in _blocks(logits):
            z = _scaled(logits[rows], dtype, temperature)
            # Finite even where a rank's whole slice is forbidden: -inf - -inf would be NaN.
            m = z.amax(dim=1).clamp_(min=torch.finfo(dtype).min)
            shifted = z - m[:, None]
            exp = shifted.exp()
            maximum[rows], total[rows] = m, exp.sum(dim=1)
            # exp(-inf) * -inf would be NaN: a forbidden token (logit -inf) adds nothing to the entropy.
            weighted[rows] = exp.mul_(shifted.masked_fill_(shifted == -torch.inf, 0.0)).sum(dim=1)
            picked[rows] = z.gather(1, column[rows, None])[:, 0]
        picked = torch.where(is_here, picked, 0.0)
        if tp_group is not None:
            maximum, total, weighted, picked = _reduce(maximum, total, weighted, picked, tp_group)
        log_total = total.log()
        # Never added up to logsumexp: beside a large maximum, log_total would lose its digits.
        ctx.save_for_backward(logits, column, is_here, maximum, log_total)
        ctx.temperature, ctx.inplace = temperature, inplace_backward
        entropy = log_total - weighted / total
        ctx.mark_non_differentiable(entropy)
        return picked - maximum - log_total, entropy

    @staticmethod
    def backward(ctx, grad_logp, _grad_entropy):
        logits, column, is_here, maximum, log_total = ctx.saved_tensors
        grad = logits if ctx.inplace else torch.empty_like(logits)
        scale = grad_logp.to(maximum.dtype) / ctx.temperature
        onehot = torch.where(is_here, scale, 0.0)
        for rows in _blocks(logits):
            z = _scaled(logits[rows], maximum.dtype, ctx.temperature)
            block = (z - maximum[rows, None]).sub_(log_total[rows, None]).exp_().mul_(-scale[rows, None])
            block.scatter_add_(1, column[rows, None], onehot[rows, None])
            grad[rows] = block.to(grad.dtype)
        return grad, None, None, None, None


def _reduce(
    maximum: torch.Tensor,
    total: torch.Tensor,
    weighted: torch.Tensor,
    picked: torch.Tensor,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Combine the partial sums of the vocabulary slices: one MAX and one SUM of three scalars a row."""
    top = maximum.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    shift = maximum - top
    scale = shift.exp()
    # sum exp(z - top) * (z - top) = scale * (weighted + shift * total)
    sums = torch.stack([total * scale, (weighted + shift * total) * scale, picked])
    dist.all_reduce(sums, group=group)
    return top, sums[0], sums[1], sums[2]
