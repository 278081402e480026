"""The output layer a chunk of tokens at a time: logits forwards, gradients backwards; [T, V] never exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from r1kernels.dispatch import check_float, check_plain
from r1kernels.logprob_entropy.problem import Problem, Selection, Softmax, check_problem

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # of the logits of a chunk


class Chunking(NamedTuple):
    """How the tokens are taken."""

    sequence_parallel: bool = False  # they are split over the ranks of the vocabulary, too
    chunk_tokens: int | None = None  # tokens of a chunk on each rank; None: by CHUNK_BYTES


class HeadChunk(NamedTuple):
    """Some tokens of every rank that holds tokens."""

    own: slice  # of this rank's hidden states
    flat: slice | torch.Tensor  # of all N tokens
    hidden: torch.Tensor  # [n, H], of all ranks
    problem: Problem  # with the chunk's logits [1, n, V_local], labels and temperatures

    @property
    def logits(self) -> torch.Tensor:
        """[n, V_local]"""
        return self.problem.logits[0]


@dataclass(frozen=True)
class Head:
    """An output layer over N tokens whose vocabulary, and with `token_group` also the tokens, are split over ranks."""

    hidden: torch.Tensor  # [N or N / ranks, H], in the dtype of the products, as weight and bias
    weight: torch.Tensor  # [V_local, H]
    bias: torch.Tensor | None  # [V_local]
    problem: Problem  # its logits are a placeholder of the right shape
    token_group: dist.ProcessGroup | None  # that of the vocabulary where it splits the tokens, too
    chunk_tokens: int  # tokens of a chunk on this rank

    def of(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Head:
        """The same layer with these tensors, outside the graph and in the dtype of the products."""
        dtype = self.hidden.dtype
        hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
        return replace(self, hidden=hidden, weight=weight, bias=None if bias is None else bias.detach().to(dtype))

    def without_tensors(self) -> Head:
        """The same for a graph to keep: `of` brings the tensors back."""
        empty = self.hidden.new_empty(0)
        return replace(self, hidden=empty, weight=empty, bias=None)

    @property
    def is_single(self) -> bool:
        """Whether everything is one chunk."""
        return len(self.hidden) <= self.chunk_tokens

    def chunks(self, kept: torch.Tensor | None = None) -> Iterator[HeadChunk]:
        """Every token once, in order; a chunk's logits last until the next is asked for."""
        # The same memory for every chunk: fresh pages would cost a CPU as much as the product.
        buffer = None
        for start in range(0, len(self.hidden), self.chunk_tokens):
            own = slice(start, min(start + self.chunk_tokens, len(self.hidden)))
            flat: slice | torch.Tensor = own
            hidden = self.hidden[own]
            if self.token_group is not None:
                ranks, rows = self.token_group.size(), torch.arange(own.start, own.stop, device=hidden.device)
                starts = torch.arange(ranks, device=hidden.device) * len(self.hidden)
                flat = (starts[:, None] + rows).view(-1)
                everyone = hidden.new_empty(ranks * len(hidden), hidden.shape[1])
                dist.all_gather_into_tensor(everyone, hidden.contiguous(), group=self.token_group)
                hidden = everyone
            logits = kept
            if logits is None:
                buffer = hidden.new_empty(len(hidden), len(self.weight)) if buffer is None else buffer
                logits = self._logits(hidden, buffer[: len(hidden)])
            yield HeadChunk(own, flat, hidden, _rows_of(self.problem, flat, logits))

    def _logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] of all tokens -> those of this rank."""
        return x if self.token_group is None else x.chunk(self.token_group.size())[self.token_group.rank()]


def _rows_of(problem: Problem, flat: slice | torch.Tensor, logits: torch.Tensor) -> Problem:
    """The part of a problem that is about some rows, with their logits [n, V_local]."""
    softmax, selection = problem.softmax, problem.selection
    if isinstance(softmax.temperature, torch.Tensor):
        softmax = softmax._replace(temperature=softmax.temperature[flat])
    if selection.row_mask is not None:
        selection = selection._replace(row_mask=selection.row_mask[flat])
    return Problem(logits[None], problem.labels[flat], softmax, selection)


class HeadGradients:
    """What the chunks' gradients add up to: of the hidden states, of the weight (in float32) and of the bias.

    `needs` says which of the three are wanted.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], main_grad: torch.Tensor | None = None) -> None:
        hidden, weight, bias = needs
        self.head: Head = head
        self.main_grad: torch.Tensor | None = main_grad
        new_hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if hidden else None
        self.hidden: torch.Tensor | None = new_hidden
        exact = torch.promote_types(head.weight.dtype, torch.float32)
        self._weight = None
        if weight:
            new = torch.zeros_like(head.weight, dtype=exact, memory_format=torch.contiguous_format)
            self._weight = new if main_grad is None else main_grad
        self._bias = torch.zeros_like(head.bias, dtype=exact) if bias and head.bias is not None else None
        self._pending: list[dist.Work] = []

    def add(self, chunk: HeadChunk, grad_logits: torch.Tensor) -> None:
        """Take the gradient [n, V_local] of a chunk's logits."""
        if self.hidden is not None:
            self._add_hidden(self.hidden[chunk.own], grad_logits @ self.head.weight)
        if self._weight is not None:
            _add_product(self._weight, grad_logits.t(), chunk.hidden)
        if self._bias is not None:
            self._bias += grad_logits.sum(0, dtype=self._bias.dtype)

    def _add_hidden(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Sum over the ranks' slices of the vocabulary, while the weight's product runs."""
        group = self.head.problem.softmax.tp_group
        if group is None:
            out.copy_(part)
        elif self.head.token_group is not None:
            self._pending.append(dist.reduce_scatter_tensor(out, part, group=group, async_op=True))
        else:
            out.copy_(part)
            self._pending.append(dist.all_reduce(out, group=group, async_op=True))

    def results(self, *like: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states, weight (None if it went to main_grad) and bias, in the dtypes of `like`."""
        for work in self._pending:
            work.wait()
        found = self.hidden, self._weight if self.main_grad is None else None, self._bias
        return tuple(None if x is None or y is None else x.to(y.dtype) for x, y in zip(found, like, strict=True))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, the products summed in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What the products are computed in: autocast's dtype where that is on, else the hidden states' own."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or hidden.is_meta or not torch.is_autocast_enabled(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device)


def as_given(device: str) -> AbstractContextManager[object]:
    """Products in the dtypes that they are given in, whatever autocast says."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softmax: Softmax,
    selection: Selection,
    chunking: Chunking,
) -> Head:
    """Check the arguments. Raises ValueError naming the op, the argument, what was found and what is required."""
    check_float(op, "hidden", hidden)
    if not hidden.dim() or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: hidden [..., H] and weight [V, H] are required, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    vocab, size = weight.shape
    dtype = product_dtype(hidden)
    # Rounding a float32 layer to the 16 bits of the products is what FSDP and autocast do; to widen one is a mistake.
    allowed = {hidden.dtype, dtype} | ({torch.float32} if dtype.itemsize == 2 else set())
    for name, tensor, shape in (("weight", weight, (vocab, size)), ("bias", bias, (vocab,))):
        if tensor is None:
            continue
        check_plain(op, name, tensor)
        if tensor.shape != shape or tensor.dtype not in allowed or tensor.device != hidden.device:
            raise ValueError(
                f"{op}: {name} must be {hidden.dtype} {shape} on {hidden.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    sequence_parallel, chunk_tokens = chunking
    if sequence_parallel and softmax.tp_group is None:
        raise ValueError(f"{op}: sequence_parallel=True needs tp_group, got None")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{op}: chunk_tokens must be >= 1, got {chunk_tokens}")
    rows = hidden.detach().reshape(-1, size).to(dtype)
    token_group = softmax.tp_group if sequence_parallel else None
    ranks = 1 if token_group is None else token_group.size()
    if labels.numel() != len(rows) * ranks:
        raise ValueError(
            f"{op}: labels must have {len(rows) * ranks} entries, one for each token"
            f"{f' of all {ranks} ranks' if sequence_parallel else ''}, got {tuple(labels.shape)}"
        )
    placeholder = rows.new_empty(1).expand(*labels.shape, vocab)
    problem = check_problem(op, placeholder, labels, softmax, selection)
    if chunk_tokens is None:
        bytes_a_token = max(1, vocab * dtype.itemsize)
        chunk_tokens = CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"] // bytes_a_token // ranks
    weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    return Head(rows, weight, bias, problem, token_group, max(1, chunk_tokens))


def check_main_grad(op: str, weight: torch.Tensor, main_grad: torch.Tensor | None) -> None:
    """Require a buffer like the weight, in float32. Raises ValueError."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    if main_grad is not None and (
        main_grad.shape != weight.shape or main_grad.dtype != exact or main_grad.device != weight.device
    ):
        raise ValueError(
            f"{op}: main_grad must be {exact} {tuple(weight.shape)} on {weight.device}, "
            f"got {main_grad.dtype} {tuple(main_grad.shape)} on {main_grad.device}"
        )


def refuse_traced(op: str, main_grad: torch.Tensor | None) -> None:
    """A graph would not show that the buffer is written. Raises RuntimeError."""
    if main_grad is not None:
        raise RuntimeError(f"{op}: main_grad was found in a graph that is traced; required None there")
