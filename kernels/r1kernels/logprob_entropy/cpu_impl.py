"""logprob_entropy for CPUs: compiled, and what is not compiled through PyTorch, a block of rows at a time.

A block is small enough for every pass to stay in a core's cache.

A row is summed up relative to one of its own logits, the label's where that one is likely enough: PyTorch's softmax
then does the maximum, the exponentials and the sum in one call, and nothing loses digits beside a large offset.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from r1kernels.logprob_entropy import compiled
from r1kernels.logprob_entropy.problem import Problem, RowSums

BLOCK_ELEMENTS = 1 << 18  # logits a thread handles at once: 1 MiB of float32, and as much for their softmax
FORBIDDEN = -1e30  # stands for -inf where -inf * 0 would be NaN
LIKELY = 1e-12  # least probability of the logit that a row is summed up relative to
LARGE_LOGIT = 32.0  # from here on sum(p * z) would lose digits; then it is sum(p * (z - top))

Place = slice | torch.Tensor  # some of the N rows


def partials(problem: Problem, *, entropy: bool, squares: bool) -> torch.Tensor:
    """As `Logprob.partials`."""
    if compiled.takes(problem):
        return compiled.partials(problem, entropy=entropy, squares=squares)
    out = torch.zeros(5, len(problem.labels), dtype=problem.dtype, device=problem.logits.device)
    column, is_here = problem.own_columns()
    used, rows = problem.is_used(), problem.used_rows()
    _sum_up(problem, rows, column, out, entropy=entropy, squares=squares, shift=_is_large(problem, column))
    out[4] = torch.where(is_here & used, out[0], 0.0)
    # Rows that the label does not suit: it is elsewhere, too unlikely or forbidden, or another logit is -inf.
    weak = used & (~(out[1] < 1 / LIKELY) | ~out[2].isfinite() | ~is_here)
    if weak.any():
        rows = weak.nonzero()[:, 0]
        column[rows] = torch.cat([z.argmax(1) for z, _, _ in _blocks(problem, rows)])
        _sum_up(problem, rows, column, out, entropy=entropy, squares=squares, shift=True)
        is_empty = weak & (out[0] == -torch.inf)  # no token of this slice is allowed
        out[:4] = torch.where(is_empty, out.new_tensor([FORBIDDEN, 0.0, 0.0, 0.0])[:, None], out[:4])
    return out


def _is_large(problem: Problem, column: torch.Tensor) -> bool:
    """True if z of a label can be beyond LARGE_LOGIT."""
    labels = problem.logits.gather(2, column.view(*problem.logits.shape[:2], 1))[..., 0]
    return bool(
        (labels.flatten().abs() * (problem.softmax.logit_scale / problem.softmax.temperature) > LARGE_LOGIT).any()
    )


def _sum_up(
    problem: Problem,
    rows: torch.Tensor | None,
    column: torch.Tensor,
    out: torch.Tensor,
    *,
    entropy: bool,
    squares: bool,
    shift: bool,
) -> None:
    """Write out[:4] of some rows (None: all), with z at `column` as top."""
    every = slice(None) if rows is None else rows
    columns = column[every, None]
    sums = out.new_zeros(4, len(columns), 1)
    end = 0
    for z, _, scratch in _blocks(problem, rows):
        # As few calls as can be: for a few rows at a time each of them counts.
        start, end = end, end + len(z)
        here = columns[start:end]
        top, share, weighted, squared = sums[:, start:end].unbind()
        p = torch.softmax(z, dim=1, out=scratch)
        torch.gather(z, 1, here, out=top)
        torch.gather(p, 1, here, out=share)
        if squares:
            torch.linalg.vecdot(p, p, out=squared[:, 0])
        if entropy and shift:
            torch.sum(p.mul_((z - top).clamp_(min=FORBIDDEN)), 1, keepdim=True, out=weighted)
        elif entropy:
            torch.linalg.vecdot(p, z, out=weighted[:, 0])
    top, share, weighted, squared = sums[..., 0].unbind()
    if entropy and not shift:
        weighted = weighted - top
    out[:4, every] = torch.stack([top, 1 / share, weighted / share, squared / share.square()])


def _blocks(problem: Problem, rows: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, Place, torch.Tensor]]:
    """(z [n, V_local], which of the N rows they are, room for a result [n, V_local]) of all rows (None) or some."""
    outer, inner, vocab = problem.logits.shape
    step = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // max(1, vocab))
    # The same memory for every block: it stays in the cache, and the kernel has no fresh pages to clear.
    scaled, scratch = (problem.logits.new_empty(min(step, outer * inner), vocab, dtype=problem.dtype) for _ in range(2))
    if rows is not None:
        for at in rows.split(step):
            x = problem.logits[at // inner, at % inner]
            yield _scaled(problem, x, at, scaled[: len(x)]), at, scratch[: len(x)]
        return
    for i in range(outer):
        for start in range(0, inner, step):
            x = problem.logits[i, start : start + step]
            at = slice(i * inner + start, i * inner + start + len(x))
            is_full = len(x) == len(scratch)
            room = (scaled, scratch) if is_full else (scaled[: len(x)], scratch[: len(x)])
            yield _scaled(problem, x, at, room[0]), at, room[1]


def _scaled(problem: Problem, x: torch.Tensor, at: Place, out: torch.Tensor) -> torch.Tensor:
    """z of some rows: in `out`, or `x` itself where nothing changes."""
    temperature, logit_scale, softcap, _ = problem.softmax
    is_chosen = problem.selection.keep_ids is not None
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[at, None]
    elif logit_scale == temperature and softcap is None and not is_chosen:
        return x if x.dtype == out.dtype else out.copy_(x)
    z = out.copy_(x)
    if softcap is not None:
        z.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
    else:
        z.mul_(logit_scale / temperature)
    if is_chosen:
        z.masked_fill_(~_is_kept(problem, at, z.shape[1]), -torch.inf)
    return z


def _is_kept(problem: Problem, at: Place, vocab: int) -> torch.Tensor:
    """[rows, V_local] bool: the keep sets of some rows."""
    assert problem.selection.keep_ids is not None and problem.selection.keep_offsets is not None
    starts, lengths = problem.selection.keep_offsets[:-1][at], problem.selection.keep_offsets.diff()[at]
    row = torch.repeat_interleave(lengths)
    position = torch.arange(len(row), device=row.device) + (starts - lengths.cumsum(0) + lengths)[row]
    column = problem.selection.keep_ids[position] - problem.vocab_start
    is_here = (column >= 0) & (column < vocab)
    kept = torch.zeros(len(lengths), vocab, dtype=torch.bool, device=row.device)
    kept[row[is_here], column[is_here]] = True
    return kept


def merge(problem: Problem, parts: torch.Tensor) -> RowSums:
    """As `Logprob.merge`."""
    tops, totals, weighted, squares, picked = parts.unbind(1)
    top = tops.amax(dim=0)
    scale = (tops - top).exp()
    # sum exp(z - top) * (z - top) of all, from the same relative to each slice's own top
    weighted = ((weighted + (tops - top) * totals) * scale).sum(0)
    squares, totals = (squares * scale.square()).sum(0), totals * scale
    total = totals.sum(0)
    log_total = total.log()
    nothing = torch.where(top > FORBIDDEN / 2, 0.0, torch.nan)  # added to rows without any allowed token
    logp = picked.sum(0) - top - log_total + nothing
    sums = (logp, log_total - weighted / total, top + log_total, squares / total.square(), top, log_total)
    rows = RowSums(*(x.masked_fill(~problem.is_used(), 0.0) for x in sums))
    if problem.softmax.tp_group is None:
        return rows
    return rows._replace(share=torch.nan_to_num(totals[problem.softmax.tp_group.rank()] / total))


def gradient(
    problem: Problem,
    sums: RowSums,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As `Logprob.gradient`."""
    rows, inner = problem.used_rows(), out.shape[1]
    if rows is not None:
        ignored = (~problem.is_used()).nonzero()[:, 0]
        out[ignored // inner, ignored % inner] = 0
    if compiled.takes(problem, out):
        compiled.gradient(problem, rows, sums, grad_logp, grad_entropy, out)
        return
    scale = problem.softmax.logit_scale / problem.softmax.temperature
    to_logp = torch.zeros_like(sums.top) if grad_logp is None else grad_logp.to(sums.top.dtype) * scale
    to_entropy = None if grad_entropy is None else grad_entropy.to(sums.top.dtype) * scale
    of_p = -to_logp if to_entropy is None else -to_logp - to_entropy * (sums.entropy - sums.log_total)
    column, is_here = problem.own_columns()
    column, onehot = column[:, None], torch.where(is_here, to_logp, 0.0)[:, None]
    for z, at, scratch in _blocks(problem, rows):
        grad = torch.softmax(z, dim=1, out=scratch)
        if sums.share is not None:  # the softmax of a slice without any allowed token is NaN
            share = sums.share[at, None]
            grad.mul_(share).masked_fill_(share == 0, 0.0)
        factor = of_p[at, None]
        if to_entropy is not None:
            factor = (z - sums.top[at, None]).clamp_(min=FORBIDDEN).mul_(-to_entropy[at, None]).add_(factor)
        place: tuple[int, slice] | tuple[torch.Tensor, torch.Tensor]
        if isinstance(at, slice):
            first = at.start % inner
            place = (at.start // inner, slice(first, first + len(z)))
        else:
            place = (at // inner, at % inner)
        # Straight to where it belongs, unless it has to be rounded, which is to happen once, at the end.
        is_direct = rows is None and out.dtype == grad.dtype
        grad = torch.mul(grad, factor, out=out[place] if is_direct else grad)
        grad.scatter_add_(1, column[at], onehot[at])
        if problem.softmax.softcap is not None:
            grad.mul_(_softcap_slope(problem.softmax.softcap, problem.softmax.temperature, z, at))
        if problem.selection.keep_ids is not None:
            grad.masked_fill_(z == -torch.inf, 0.0)
        if not is_direct:
            out[place] = grad.to(out.dtype)


def _softcap_slope(softcap: float, temperature: float | torch.Tensor, z: torch.Tensor, at: Place) -> torch.Tensor:
    """Derivative of softcap * tanh(c / softcap), from the scaled logits."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[at, None]
    return 1 - (z * (temperature / softcap)).square_()


class CpuLogprob:
    """`Logprob` by the functions of this file, on any device."""

    name = "reference"
    partials, merge, gradient = staticmethod(partials), staticmethod(merge), staticmethod(gradient)
