"""logprob_entropy by csrc/cpu/logprob.cpp: float32 logits on a CPU, one temperature, the whole vocabulary allowed."""

from __future__ import annotations

import torch

from r1kernels import cpu_lib
from r1kernels.logprob_entropy.problem import Problem, RowSums


def takes(problem: Problem, out: torch.Tensor | None = None) -> bool:
    """Whether the compiled functions compute this; `out`: where the gradient is to go."""
    softmax, tensors = problem.softmax, [problem.logits] if out is None else [problem.logits, out]
    return (
        softmax.softcap is None
        and not isinstance(softmax.temperature, torch.Tensor)
        and problem.selection.keep_ids is None
        and all(x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(2) == 1 for x in tensors)
        and cpu_lib.takes()
    )


def partials(problem: Problem, *, entropy: bool, squares: bool) -> torch.Tensor:
    """As `Logprob.partials`."""
    logits, out = problem.logits, problem.logits.new_zeros(5, len(problem.labels))
    rows, columns = problem.used_rows(), _columns(problem)
    sizes = (_count(problem, rows), out.shape[1], logits.shape[2], logits.shape[1], *logits.stride()[:2])
    asked = (int(entropy), int(squares), _scale(problem))
    cpu_lib.call("r1_cpu_logprob_sums", logits, rows, columns, out, *sizes, *asked)
    return out


def gradient(
    problem: Problem,
    rows: torch.Tensor | None,
    sums: RowSums,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As `Logprob.gradient`, of `rows` (None: all).

    d/dx = scale ((1{label} - p) grad_logp - p (t - log_total + entropy) grad_entropy)
    """
    nothing = torch.zeros_like(sums.top)
    to_logp = nothing if grad_logp is None else grad_logp.float() * _scale(problem)
    to_entropy = nothing if grad_entropy is None else grad_entropy.float() * _scale(problem)
    one_over_total = (-sums.log_total).exp()
    slope = -(to_logp + to_entropy * (sums.entropy - sums.log_total)) * one_over_total
    by_row = torch.stack([sums.top, slope, -to_entropy * one_over_total, to_logp])
    logits, columns = problem.logits, _columns(problem)
    sizes = (_count(problem, rows), len(columns), logits.shape[2], logits.shape[1])
    strides = (*logits.stride()[:2], *out.stride()[:2])
    torch.autograd.graph.increment_version(out)  # autograd sees nothing of what is written by address
    cpu_lib.call("r1_cpu_logprob_gradient", logits, rows, columns, by_row, out, *sizes, *strides, _scale(problem))


def _scale(problem: Problem) -> float:
    assert not isinstance(problem.softmax.temperature, torch.Tensor)
    return problem.softmax.logit_scale / problem.softmax.temperature


def _count(problem: Problem, rows: torch.Tensor | None) -> int:
    return len(problem.labels if rows is None else rows)


def _columns(problem: Problem) -> torch.Tensor:
    """[N] int64: the label's column in this slice, -1 where another rank has it."""
    column, is_here = problem.own_columns()
    return torch.where(is_here, column, -1)
