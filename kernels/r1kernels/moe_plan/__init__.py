"""The row order of a mixture-of-experts layer: each (token, choice) gets a row, an expert's rows lie together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1kernels.dispatch import Impl, choose
from r1kernels.tracing import has_values, is_traced

MAX_EXPERTS = 1024
MAX_CHOICES = 32


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Rows sorted by expert, each expert's first row at a multiple of `align`; made by `moe_plan`, all on the device.

    R is the number of rows that any routing of the choices can need, known without asking the device. An expert's
    rows follow the order of the tokens. Rows between an expert's last and the next expert's first, and after the last
    expert, are padding.
    """

    row_of: torch.Tensor  # [T, K] int32, row of each choice; -1 where the choice is -1
    slot_of: torch.Tensor  # [R] int32, t * K + k of the choice in each row; -1 in padding
    expert_of: torch.Tensor  # [R] int32, expert of each row; -1 in padding (DeepGEMM's m_indices)
    offsets: torch.Tensor  # [E + 1] int32, first row of each expert; the last is the number of rows in use
    counts: torch.Tensor  # [E] int32, choices of each expert
    align: int

    @property
    def num_tokens(self) -> int:
        return self.row_of.shape[0]

    @property
    def top_k(self) -> int:
        return self.row_of.shape[1]

    @property
    def num_rows(self) -> int:
        return self.slot_of.shape[0]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def token_of(self) -> torch.Tensor:
        """[R] int32, token of each row; -1 in padding."""
        return self.slot_of.div(max(self.top_k, 1), rounding_mode="floor")


def moe_plan(
    ids: torch.Tensor,
    num_experts: int,
    *,
    align: int = 128,
    num_choices: int | None = None,
    impl: Impl | None = None,
) -> RowPlan:
    """Sort the choices by expert, stably and without asking the device how many each expert has.

    A histogram and a scan: the same ids give bitwise the same plan. No map of [T, E] exists.

    Args:
        ids:         [T, K] int32, contiguous, K <= 32: the experts of each token in [0, num_experts); -1 for a choice
                     that goes nowhere (routed to another rank, or a token without experts).
        num_experts: E, at most 1024.
        align:       first rows are multiples of it (128 for grouped FP8 GEMM).
        num_choices: how many ids are not -1, or more, where the host knows: R is what so many need. None: any of T * K
                     may go somewhere.
        impl:        force an implementation; None picks one by device.

    Returns:
        RowPlan.

    Raises:
        ValueError: shape, dtype or sizes are not the ones above, the choices padded reach 2^31, an id is out of range,
            or more ids than num_choices are not -1 (the last two on a CPU only: on a GPU the check would wait for the
            device, which stops with an assertion where the rows are too few).
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> plan = moe_plan(torch.tensor([[1], [0], [1]], dtype=torch.int32), 2, align=2)
        >>> plan.row_of.flatten(), plan.offsets
        (tensor([2, 0, 3], dtype=torch.int32), tensor([0, 2, 4], dtype=torch.int32))
        >>> plan.expert_of
        tensor([ 0, -1,  1,  1], dtype=torch.int32)
    """
    op = "moe_plan"
    if ids.dim() != 2 or ids.dtype != torch.int32 or not ids.is_contiguous() or ids.shape[1] > MAX_CHOICES:
        raise ValueError(
            f"{op}: ids must be contiguous int32 [T, K] with K <= {MAX_CHOICES}, got {ids.dtype} {tuple(ids.shape)}"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{op}: num_experts must be in [1, {MAX_EXPERTS}], got {num_experts}")
    if align < 1:
        raise ValueError(f"{op}: align must be >= 1, got {align}")
    choices = ids.numel() if num_choices is None else num_choices
    num_rows = max_rows(choices, num_experts, align)
    if num_rows >= 1 << 31:
        raise ValueError(f"{op}: {choices} choices are too many: padded rows must be fewer than 2^31")
    if has_values(ids) and ids.numel():
        _check_values(op, ids, num_experts, num_choices)
    if is_traced(ids):
        from r1kernels.moe_plan.torch_op import traced

        return traced(ids, num_experts, align, num_choices, impl)
    if choose(op, impl, ids, have=("cuda", "reference")) == "cuda":
        from r1kernels.moe_plan.cuda_impl import plan
    else:
        from r1kernels.moe_plan.reference import plan
    row_of, slot_of, expert_of, offsets, counts = plan(ids, num_experts, align, num_rows)
    if num_choices is not None and ids.device.type == "cuda":
        torch._assert_async(offsets[-1] <= num_rows, f"{op}: more ids are not -1 than num_choices={num_choices}")
    return RowPlan(row_of=row_of, slot_of=slot_of, expert_of=expert_of, offsets=offsets, counts=counts, align=align)


def _check_values(op: str, ids: torch.Tensor, num_experts: int, num_choices: int | None) -> None:
    if not -1 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise ValueError(f"{op}: ids must be in [0, {num_experts}) or -1, got {int(ids.min())} .. {int(ids.max())}")
    if num_choices is not None and (found := int((ids >= 0).sum())) > num_choices:
        raise ValueError(f"{op}: num_choices is {num_choices}, but {found} ids are not -1")


def max_rows(num_choices: int, num_experts: int, align: int) -> int:
    """Rows that the worst routing of so many choices needs, a multiple of `align`."""
    # Every expert with a choice wastes at most align - 1 rows.
    worst: int = num_choices + torch.sym_min(num_experts, num_choices) * (align - 1)
    return worst // align * align


def check_plan(op: str, plan: RowPlan, num_tokens: int | None = None, num_rows: int | None = None) -> None:
    """Require a plan made for so many tokens or rows.

    Raises:
        ValueError: naming the op, what was found and what is required.
    """
    if num_tokens is not None and num_tokens != plan.num_tokens:
        raise ValueError(f"{op}: the plan is for {plan.num_tokens} tokens, but the tensor has {num_tokens}")
    if num_rows is not None and num_rows != plan.num_rows:
        raise ValueError(f"{op}: the plan has {plan.num_rows} rows, but the tensor has {num_rows}")


def check_weights(op: str, plan: RowPlan, weights: torch.Tensor | None) -> None:
    """Require float32 (or float64) weights of the plan's choices.

    Raises:
        ValueError: naming the op, what was found and what is required.
    """
    if weights is None:
        return
    if weights.shape != plan.row_of.shape or not weights.is_contiguous():
        raise ValueError(
            f"{op}: weights must be contiguous {tuple(plan.row_of.shape)} as the plan's ids, got {tuple(weights.shape)}"
        )
    if weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: weights must be float32, got {weights.dtype}")
    check_device(op, plan, weights=weights)


def check_device(op: str, plan: RowPlan, **tensors: torch.Tensor | None) -> None:
    """Require tensors where the plan is.

    Raises:
        ValueError: naming the op, what was found and what is required.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != plan.row_of.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but the plan is on {plan.row_of.device}")
