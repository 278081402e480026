"""torch.ops.r1kernels.logprob_entropy: what torch.compile, torch.export and fake tensors see of the op."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from r1kernels.logprob_entropy import LogProb, logprob_of
from r1kernels.logprob_entropy.problem import Problem, RowSums, Selection, Softmax, check_problem, wide

NUM_SUMS = len(RowSums._fields)


@torch.library.custom_op("r1kernels::logprob_entropy", mutates_args=())
def row_sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperatures: torch.Tensor | None,  # one a row, in the place of `temperature`
    row_mask: torch.Tensor | None,
    keep_ids: torch.Tensor | None,
    keep_offsets: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    group: str,  # name of the process group; "": none
    entropy: bool,
    entropy_grad: bool,
    squares: bool,
    impl: str,
) -> torch.Tensor:
    """[7, N] the fields of RowSums; the first two are differentiable in the logits."""
    softmax = softmax_of(temperatures, temperature, logit_scale, softcap, group)
    selection = Selection(ignore_index, row_mask, keep_ids, keep_offsets)
    problem = check_problem("logprob_entropy", logits, labels, softmax, selection)
    logprob = logprob_of("logprob_entropy", impl, logits)
    parts = logprob.partials(problem, entropy=entropy, squares=squares)
    return stacked(logprob.merge(problem, problem.gather(parts)))


@row_sums.register_fake
def _(logits, labels, *rest):
    return logits.new_empty(NUM_SUMS, labels.numel(), dtype=wide(logits.dtype))


@torch.library.custom_op("r1kernels::logprob_entropy_backward", mutates_args=())
def row_gradients(
    grad: torch.Tensor,
    sums: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperatures: torch.Tensor | None,
    row_mask: torch.Tensor | None,
    keep_ids: torch.Tensor | None,
    keep_offsets: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    group: str,
    entropy: bool,
    entropy_grad: bool,
    squares: bool,
    impl: str,
) -> torch.Tensor:
    """Gradient of the logits from that of the sums, [7, N], of which the first two rows count."""
    softmax = softmax_of(temperatures, temperature, logit_scale, softcap, group)
    selection = Selection(ignore_index, row_mask, keep_ids, keep_offsets)
    problem = check_problem("logprob_entropy", logits, labels, softmax, selection)
    out = torch.empty_like(logits)
    to_entropy, rows = grad[1] if entropy_grad else None, unstacked(sums, problem)
    logprob = logprob_of("logprob_entropy", impl, logits)
    logprob.gradient(problem, rows, grad[0], to_entropy, out.view(problem.logits.shape))
    return out


@row_gradients.register_fake
def _(grad, sums, logits, *rest):
    return torch.empty_like(logits)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs[:6])
    ctx.constants = inputs[6:]


def _backward(ctx, grad):
    return row_gradients(grad, *ctx.saved_tensors, *ctx.constants), *[None] * 14


row_sums.register_autograd(_backward, setup_context=_setup)


def traced(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softmax: Softmax,
    selection: Selection,
    entropy: bool,
    entropy_grad: bool,
    squares: bool,
    impl: str,
) -> LogProb:
    """`logprob_entropy` as one node of a graph. The gradient is always beside the logits."""
    temperatures, temperature, logit_scale, softcap, group = arguments_of(softmax)
    ignore_index, *tensors = selection
    sums = row_sums(
        logits,
        labels,
        temperatures,
        *tensors,
        temperature,
        logit_scale,
        softcap,
        ignore_index,
        group,
        entropy,
        entropy_grad,
        squares,
        impl,
    )
    logp, entropies, lse, sum_pi_sq = (sums[i].view(labels.shape) for i in range(4))
    kept = entropies if entropy_grad else entropies.detach()
    return LogProb(logp, kept if entropy else None, lse.detach(), sum_pi_sq.detach() if squares else None)


def arguments_of(softmax: Softmax) -> tuple[torch.Tensor | None, float, float, float | None, str]:
    """What an op can be told of the options: the arguments of `softmax_of`."""
    temperature, logit_scale, softcap, tp_group = softmax
    group = "" if tp_group is None else tp_group.group_name
    if isinstance(temperature, torch.Tensor):
        return temperature.detach(), 1.0, logit_scale, softcap, group
    return None, float(temperature), logit_scale, softcap, group


def softmax_of(
    temperatures: torch.Tensor | None, temperature: float, logit_scale: float, softcap: float | None, group: str
) -> Softmax:
    """The options again."""
    resolve: Callable[..., dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group
    tp_group = resolve(group) if group else None
    return Softmax(temperature if temperatures is None else temperatures, logit_scale, softcap, tp_group)


def stacked(rows: RowSums) -> torch.Tensor:
    """[7, N]; a `share` that is not needed is 0."""
    return torch.stack([*rows[:-1], torch.zeros_like(rows.logp) if rows.share is None else rows.share])


def unstacked(sums: torch.Tensor, problem: Problem) -> RowSums:
    """The fields again."""
    rows = RowSums(*sums.unbind())
    return rows if problem.softmax.tp_group is not None else rows._replace(share=None)
