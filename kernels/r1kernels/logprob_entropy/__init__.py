"""Log-probability of the labels and entropy of their distributions, from logits that may be split over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from r1kernels.dispatch import Impl, check_float, choose
from r1kernels.logprob_entropy.problem import (
    Logprob,
    RowSums,
    Selection,
    Softmax,
    as_rows,
    check_problem,
    check_writable,
)
from r1kernels.tracing import is_traced, traced_choice


class LogProb(NamedTuple):
    """What `logprob_entropy` returns: each [...] float32 (float64 for float64 logits); 0 on ignored rows."""

    logp: torch.Tensor  # of the label (nats), differentiable in the logits
    entropy: torch.Tensor | None  # of the row (nats), differentiable with entropy_grad; None without return_entropy
    lse: torch.Tensor  # logsumexp of the scaled logits (nats), not differentiable
    sum_pi_sq: torch.Tensor | None = None  # sum of squared probabilities, with return_sum_pi_sq; not differentiable


def logprob_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: torch.Tensor | None = None,
    keep_ids: torch.Tensor | None = None,
    keep_offsets: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    return_entropy: bool = True,
    entropy_grad: bool = False,
    return_sum_pi_sq: bool = False,
    inplace_backward: bool = False,
    impl: Impl | None = None,
) -> LogProb:
    """Log-probability of each label and entropy of each row of softmax(z).

        c       = logit_scale * logits
        c       = softcap * tanh(c / softcap)          if softcap is set
        z       = c / temperature
        lse     = logsumexp(z)                         over the row's keep set if there is one
        logp    = z[label] - lse
        entropy = lse - sum(softmax(z) * z)

    The logits are read once, whatever their strides; beside them no [..., V] tensor is made. The backward pass
    recomputes the probabilities and reads and writes the logits' size once, in place when asked. With `tp_group`
    the vocabulary is split evenly over its ranks in rank order, and one all-gather of five floats a row is all
    that crosses the wire. Every row is summed in a fixed order: results are bitwise repeatable and, on a GPU, do
    not depend on the other rows.

    A row that is ignored is not read. A row whose logits are all -inf has no distribution: its results are NaN.
    Triton takes logits below -1e30 for -inf.

    Args:
        logits:           [..., V_local] float, this rank's slice of the vocabulary (nats). At most two groups of
                          leading dimensions may be spaced unevenly, as in logits[:, :-1].
        labels:           [...] int64, global token ids.
        temperature:      softmax temperature, > 0: one, or [...] float, one a row.
        logit_scale:      factor before the cap.
        softcap:          bound of the logits' size, > 0 (Gemma), or None.
        ignore_index:     label of rows to be left out.
        row_mask:         [...] bool, False for rows to be left out, too.
        keep_ids:         [N] int64, global token ids that sampling left to choose from (top-p, top-k), row after row,
                          each at most once a row. A label outside its row's set has log-probability -inf.
        keep_offsets:     [rows + 1] int64, where each row's ids start in keep_ids, then N.
        tp_group:         process group of the vocabulary split; None: the whole vocabulary is here.
        return_entropy:   compute the entropy.
        entropy_grad:     let gradients through the entropy.
        return_sum_pi_sq: compute the sum of squared probabilities.
        inplace_backward: write the gradient over the logits, which are lost then; a second backward pass through
                          the same graph raises. In a compiled or exported graph it is written beside them.
        impl:             force an implementation; None picks one.

    Returns:
        LogProb(logp, entropy, lse, sum_pi_sq).

    Raises:
        ValueError: shapes, dtypes, strides or options do not fit. Values on the CPU are checked too: temperatures,
            labels, keep sets. On a GPU that would wait for the device: there a label outside the vocabulary
            gives NaN.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> found = logprob_entropy(logits, torch.tensor([0, 2]), temperature=0.5)
        >>> found.logp.detach(), found.entropy
        (tensor([-0.0206, -1.0986]), tensor([0.1069, 1.0986]))
        >>> found.logp.sum().backward()
        >>> logits.grad
        tensor([[ 0.0407, -0.0359, -0.0049],
                [-0.6667, -0.6667,  1.3333]])
    """
    op = "logprob_entropy"
    if entropy_grad and not return_entropy:
        raise ValueError(f"{op}: entropy_grad=True needs return_entropy=True")
    softmax = Softmax(temperature, logit_scale, softcap, tp_group)
    selection = Selection(ignore_index, row_mask, keep_ids, keep_offsets)
    if is_traced(logits):
        from r1kernels.logprob_entropy.torch_op import traced

        chosen = traced_choice(op, impl, logits.device.type, have(logits.dtype))
        return traced(logits, labels, softmax, selection, return_entropy, entropy_grad, return_sum_pi_sq, chosen)
    check_float(op, "logits", logits)
    problem = check_problem(op, logits, labels, softmax, selection)
    if inplace_backward:
        check_writable(op, "inplace_backward", logits)
    options = _Options(logprob_of(op, impl, logits), return_entropy, entropy_grad, return_sum_pi_sq, inplace_backward)
    return shaped(_LogProbEntropy.apply(logits, problem.without_logits(), options), labels.shape)


def have(dtype: torch.dtype) -> tuple[str, ...]:
    """The implementations for logits of a dtype, the fastest on a GPU first."""
    return ("triton", "reference") if dtype != torch.float64 else ("reference",)


def logprob_of(op: str, impl: str | None, tensor: torch.Tensor) -> Logprob:
    """What sums up and differentiates logits like `tensor`."""
    if choose(op, impl, tensor, have(tensor.dtype)) == "reference":
        from r1kernels.logprob_entropy.cpu_impl import CpuLogprob

        return CpuLogprob()
    from r1kernels.logprob_entropy.triton_impl import TritonLogprob

    return TritonLogprob()


def shaped(flat: Iterable[Any], shape: torch.Size) -> LogProb:
    """LogProb of flat tensors or None, each in the shape of the labels."""
    views: list[Any] = [None if x is None else x.view(shape) for x in flat]
    return LogProb(*views)


@dataclass(frozen=True)
class _Options:
    logprob: Logprob
    entropy: bool
    entropy_grad: bool
    sum_pi_sq: bool
    inplace_backward: bool


class _LogProbEntropy(torch.autograd.Function):
    """(logits, problem without logits, options) -> logp, entropy, lse, sum_pi_sq, flat."""

    @staticmethod
    def forward(ctx, logits, problem, options):
        problem = replace(problem, logits=as_rows("logprob_entropy", logits.detach()))
        parts = options.logprob.partials(problem, entropy=options.entropy, squares=options.sum_pi_sq)
        rows = options.logprob.merge(problem, problem.gather(parts))
        ctx.save_for_backward(logits, *rows)
        ctx.problem, ctx.options = problem.without_logits(), options
        ctx.set_materialize_grads(False)
        entropy = rows.entropy if options.entropy else None
        sum_pi_sq = rows.sum_pi_sq if options.sum_pi_sq else None
        constants = [rows.lse, *([] if options.entropy_grad else [entropy]), sum_pi_sq]
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))
        return rows.logp, entropy, rows.lse, sum_pi_sq

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy, _grad_lse, _grad_sum_pi_sq):
        logits, *rows = ctx.saved_tensors  # raises where the logits were overwritten, by another backward pass say
        grad = logits.detach() if ctx.options.inplace_backward else torch.empty_like(logits)
        problem = replace(ctx.problem, logits=as_rows("logprob_entropy", logits.detach()))
        out = grad.view(problem.logits.shape)
        ctx.options.logprob.gradient(problem, RowSums(*rows), grad_logp, grad_entropy, out)
        return grad, None, None
