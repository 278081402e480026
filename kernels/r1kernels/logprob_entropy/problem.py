"""The checked arguments of logprob_entropy, as its implementations take them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist


class Softmax(NamedTuple):
    """How logits become the distribution softmax(z), z = cap(logit_scale * logits) / temperature."""

    temperature: float | torch.Tensor = 1.0  # a tensor has one a row: [...] of the caller, [N] in a Problem
    logit_scale: float = 1.0
    softcap: float | None = None  # cap(c) = softcap * tanh(c / softcap)
    tp_group: dist.ProcessGroup | None = None  # the ranks that the vocabulary is split over


class Selection(NamedTuple):
    """Which rows count, and which tokens each may choose from."""

    ignore_index: int = -100  # label of rows to be left out
    row_mask: torch.Tensor | None = None  # [...] bool of the caller, [N] in a Problem
    keep_ids: torch.Tensor | None = None  # [num_ids] int64
    keep_offsets: torch.Tensor | None = None  # [N + 1] int64

    def is_used(self, labels: torch.Tensor) -> torch.Tensor:
        """[N] bool: the rows that are not left out."""
        used = labels != self.ignore_index
        return used if self.row_mask is None else used & self.row_mask


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits of a dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Problem:
    """One call: N rows of logits and what is asked about them. Tensors of rows are flat and contiguous."""

    logits: torch.Tensor  # [outer, inner, V_local] view of the caller's, outer * inner = N; any strides
    labels: torch.Tensor  # [N] int64, global token ids
    softmax: Softmax  # a tensor of temperatures is in `dtype`
    selection: Selection

    @property
    def vocab_start(self) -> int:
        """First token of this rank's slice."""
        group = self.softmax.tp_group
        return 0 if group is None else group.rank() * self.logits.shape[-1]

    @property
    def vocab_size(self) -> int:
        """Tokens of all slices."""
        group = self.softmax.tp_group
        return self.logits.shape[-1] * (1 if group is None else group.size())

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in and returned."""
        return wide(self.logits.dtype)

    def is_used(self) -> torch.Tensor:
        """[N] bool: the rows that are not left out."""
        return self.selection.is_used(self.labels)

    def used_rows(self) -> torch.Tensor | None:
        """[used rows] int64; None: all of them."""
        used = self.is_used()
        return None if used.all() else used.nonzero()[:, 0]

    def own_columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] int64, [N] bool: the label's column in this slice (0 where it has none), and whether it is here."""
        local = self.labels - self.vocab_start
        is_here = (local >= 0) & (local < self.logits.shape[-1])
        return torch.where(is_here, local, 0), is_here

    def without_logits(self) -> Problem:
        """The same for a graph to keep, which must not keep the logits alive; what reads them raises."""
        return replace(self, logits=None)  # type: ignore[arg-type]  # back by `replace` before anything reads them

    def gather(self, parts: torch.Tensor) -> torch.Tensor:
        """[5, N] of this rank -> [ranks, 5, N] of all: the one collective of the forward pass."""
        group = self.softmax.tp_group
        if group is None:
            return parts[None]
        everyone = parts.new_empty(group.size(), *parts.shape)
        dist.all_gather_into_tensor(everyone.view(-1, parts.shape[1]), parts, group=group)
        return everyone


class RowSums(NamedTuple):
    """Sums of each row over the whole vocabulary, [N] each."""

    logp: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    sum_pi_sq: torch.Tensor
    top: torch.Tensor  # lse = top + log_total; never added up where digits matter
    log_total: torch.Tensor
    share: torch.Tensor | None = None  # probability of this rank's slice; None where it is the whole vocabulary

    def of_rows(self, rows: slice | torch.Tensor) -> RowSums:
        """Those of some rows."""
        share = None if self.share is None else self.share[rows]
        return RowSums(*(x[rows] for x in self[:6]))._replace(share=share)


class Logprob(Protocol):
    """How logits are summed up and differentiated: what every op over a vocabulary is built of."""

    name: str  # as `impl=` calls it

    def partials(self, problem: Problem, *, entropy: bool, squares: bool) -> torch.Tensor:
        """[5, N]: of each row, over this rank's slice of z, with t = z - top:

            top, sum(exp(t)), sum(exp(t) * t), sum(exp(t)^2), z[label] (0 where another rank has it)

        What is not asked for is 0, and so is everything of an ignored row.
        """
        ...

    def merge(self, problem: Problem, parts: torch.Tensor) -> RowSums:
        """[ranks, 5, N] partial sums of all slices -> what is known of each row, on every rank bitwise the same."""
        ...

    def gradient(
        self,
        problem: Problem,
        sums: RowSums,
        grad_logp: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Write d (grad_logp . logp + grad_entropy . entropy) / d logits to `out`, shaped as problem.logits or these.

        d/dz[j] = grad_logp * (1{j = label} - p[j]) - grad_entropy * p[j] * (log p[j] + entropy)
        """
        ...


def as_rows(op: str, logits: torch.Tensor) -> torch.Tensor:
    """View [..., V] as [outer, inner, V] without a copy.

    Raises:
        ValueError: there is no such view.
    """
    shape = logits.shape
    if not shape:
        raise ValueError(f"{op}: logits must have at least one dimension, got a scalar")
    for cut in range(max(1, logits.dim() - 1)):
        try:
            return logits.view(math.prod(shape[:cut]), math.prod(shape[cut:-1]), shape[-1])
        except RuntimeError:
            continue
    raise ValueError(
        f"{op}: logits may have at most two groups of evenly spaced leading dimensions, got shape {tuple(shape)} with "
        f"strides {logits.stride()}; pass logits.contiguous()"
    )


def check_writable(op: str, option: str, tensor: torch.Tensor) -> None:
    """Require that no two elements share memory, as the gradient is to be written over them."""
    sizes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    end = 0  # offset of the last element of the dimensions so far
    for stride, size in sizes:
        if stride <= end:
            raise ValueError(
                f"{op}: {option}=True needs logits that do not overlap themselves, got shape {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}"
            )
        end += stride * (size - 1)


def check_problem(
    op: str, logits: torch.Tensor, labels: torch.Tensor, softmax: Softmax, selection: Selection
) -> Problem:
    """Check the arguments. Raises ValueError naming the op, the argument, what was found and what is required."""
    group, row_mask = softmax.tp_group, selection.row_mask
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{op}: tp_group must be a torch.distributed.ProcessGroup or None, got {group!r}")
    if labels.shape != logits.shape[:-1] or labels.dtype != torch.int64 or labels.device != logits.device:
        raise ValueError(
            f"{op}: labels must be int64 {tuple(logits.shape[:-1])} on {logits.device} for logits "
            f"{tuple(logits.shape)}, got {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )
    if not softmax.logit_scale > 0:
        raise ValueError(f"{op}: logit_scale must be > 0, got {softmax.logit_scale}")
    if softmax.softcap is not None and not softmax.softcap > 0:
        raise ValueError(f"{op}: softcap must be > 0 or None, got {softmax.softcap}")
    if row_mask is not None:
        _check_rows(op, "row_mask", row_mask, labels, (torch.bool,))
        row_mask = row_mask.reshape(-1).contiguous()
    made = Problem(
        logits=as_rows(op, logits.detach()),
        labels=labels.reshape(-1).contiguous(),
        softmax=softmax._replace(temperature=_temperature(op, softmax.temperature, labels, logits.dtype)),
        selection=selection._replace(row_mask=row_mask),
    )
    if logits.shape[-1] == 0 and labels.numel():
        raise ValueError(f"{op}: logits must have a vocabulary, got shape {tuple(logits.shape)}")
    _check_keep_shapes(op, made)
    if logits.device.type == "cpu":
        _check_values(op, made)
    return made


def _check_rows(
    op: str, name: str, tensor: torch.Tensor, labels: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.shape != labels.shape or tensor.dtype not in dtypes or tensor.device != labels.device:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} "
            f"{tuple(labels.shape)} on {labels.device}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def _temperature(
    op: str, temperature: float | torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> float | torch.Tensor:
    if not isinstance(temperature, torch.Tensor):
        if not temperature > 0:
            raise ValueError(f"{op}: temperature must be > 0, got {temperature}")
        return float(temperature)
    _check_rows(op, "temperature", temperature, labels, (torch.float32, torch.float64))
    return temperature.detach().reshape(-1).to(wide(dtype)).contiguous()


def _check_keep_shapes(op: str, problem: Problem) -> None:
    ids, offsets, num_rows = problem.selection.keep_ids, problem.selection.keep_offsets, len(problem.labels)
    if (ids is None) != (offsets is None):
        raise ValueError(f"{op}: keep_ids and keep_offsets go together, got only one of them")
    if ids is None or offsets is None:
        return
    for name, tensor in (("keep_ids", ids), ("keep_offsets", offsets)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.device != problem.logits.device:
            raise ValueError(
                f"{op}: {name} must be one-dimensional int64 on {problem.logits.device}, got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    if len(offsets) != num_rows + 1:
        raise ValueError(f"{op}: keep_offsets must have rows + 1 = {num_rows + 1} entries, got {len(offsets)}")


def _check_values(op: str, problem: Problem) -> None:
    """What can be seen only by looking at the values: done where that costs no wait for a device."""
    used, vocab_size = problem.is_used(), problem.vocab_size
    labels = problem.labels if used.all() else problem.labels[used]
    if len(labels):
        first, last = (int(x) for x in labels.aminmax())
        if first < 0 or last >= vocab_size:
            raise ValueError(f"{op}: labels must be in [0, {vocab_size}), got {first} .. {last}")
    if isinstance(problem.softmax.temperature, torch.Tensor) and len(labels):
        low = float(problem.softmax.temperature[used].min())
        if not low > 0:
            raise ValueError(f"{op}: temperature must be > 0, got {low}")
    offsets, ids = problem.selection.keep_offsets, problem.selection.keep_ids
    if offsets is None or ids is None:
        return
    lengths = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != len(ids) or (lengths < 0).any():
        raise ValueError(
            f"{op}: keep_offsets must rise from 0 to len(keep_ids) = {len(ids)}, got {int(offsets[0])} .. "
            f"{int(offsets[-1])}{', falling in between' if (lengths < 0).any() else ''}"
        )
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{op}: keep_ids must be in [0, {vocab_size}), got {int(ids.min())} .. {int(ids.max())}")
    if (lengths[used] == 0).any():
        row = int((used & (lengths == 0)).nonzero()[0])
        raise ValueError(f"{op}: row {row} keeps no token; a row that is not ignored needs at least one")
