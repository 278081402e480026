"""Launches the Triton kernels of logprob_entropy. Nothing here waits for the device or asks it anything.

Triton launches on the current device, wherever the tensors are: each launch makes theirs the current one.
"""

from __future__ import annotations

import torch
import triton

from r1kernels.logprob_entropy import triton_kernels as kernels
from r1kernels.logprob_entropy.problem import Problem, RowSums

NUM_WARPS = 8
GRADIENT_REGISTERS = 80  # three blocks of 256 threads on a multiprocessor; left alone it takes 84 to 127, and two fit
REPEAT = 4  # 128-bit loads a thread has in flight


def partials(problem: Problem, *, entropy: bool, squares: bool) -> torch.Tensor:
    """As `Logprob.partials`; float32."""
    num_rows = len(problem.labels)
    out = torch.empty(5, num_rows, dtype=torch.float32, device=problem.logits.device)
    if num_rows:
        with torch.cuda.device_of(out):
            kernels.partials_kernel[(num_rows,)](
                **row_arguments(problem),
                **_selection(problem),
                out_ptr=out,
                num_rows=num_rows,
                ENTROPY=entropy,
                SQUARES=squares,
                **_launch(problem),
            )
    return out


def merge(problem: Problem, parts: torch.Tensor) -> RowSums:
    """As `Logprob.merge`; `share` is not needed here."""
    ranks, _, num_rows = parts.shape
    out = torch.empty(6, num_rows, dtype=torch.float32, device=parts.device)
    if num_rows:
        with torch.cuda.device_of(out):
            kernels.merge_kernel[(triton.cdiv(num_rows, 128),)](
                parts,
                problem.labels,
                problem.selection.row_mask,
                out,
                problem.selection.ignore_index,
                problem.vocab_size,
                num_rows,
                ranks,
                BLOCK=128,
            )
    return RowSums(*out.unbind())


def gradient(
    problem: Problem,
    sums: RowSums,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As `Logprob.gradient`."""
    num_rows = len(problem.labels)
    if not num_rows:
        return
    arguments = (
        row_arguments(problem)
        | _selection(problem)
        | {
            "top_ptr": sums.top,
            "log_total_ptr": sums.log_total,
            "entropy_ptr": None if grad_entropy is None else sums.entropy,
            "grad_logp_ptr": None if grad_logp is None else grad_logp.contiguous(),
            "grad_entropy_ptr": None if grad_entropy is None else grad_entropy.contiguous(),
        }
    )
    with torch.cuda.device_of(out):
        if problem.selection.keep_ids is None:
            options = _launch(problem) | {"maxnreg": GRADIENT_REGISTERS}
            kernels.gradient_kernel[(num_rows,)](**arguments, out_ptr=out, **strides(out, "out"), **options)
        else:
            # The kept logits are read before they may be overwritten by zeros.
            kept = torch.empty(len(problem.selection.keep_ids), dtype=torch.float32, device=out.device)
            none = {"out_outer": 0, "out_inner": 0, "out_column": 0}
            kernels.gradient_kernel[(num_rows,)](**arguments, out_ptr=kept, **none, **_launch(problem))
            out.zero_()
            kernels.scatter_kernel[(num_rows,)](
                kept,
                problem.selection.keep_ids,
                problem.selection.keep_offsets,
                out,
                **strides(out, "out"),
                num_inner=out.shape[1],
                vocab_start=problem.vocab_start,
                vocab=out.shape[2],
                BLOCK=1024,
            )
    torch.autograd.graph.increment_version(out)


def strides(rows: torch.Tensor, prefix: str) -> dict[str, int]:
    """Strides of [outer, inner, V], without the one that no row is told by: it would grow with the number of rows."""
    outer, inner, column = rows.stride()
    if rows.shape[0] == 1:
        outer = inner
    return {f"{prefix}_outer": outer, f"{prefix}_inner": inner, f"{prefix}_column": column}


def row_arguments(problem: Problem) -> dict[str, object]:
    """What the kernels that read logits are told about them."""
    softmax = problem.softmax
    per_row = isinstance(softmax.temperature, torch.Tensor)
    return strides(problem.logits, "stride") | {
        "logits_ptr": problem.logits,
        "num_inner": problem.logits.shape[1],
        "vocab": problem.logits.shape[2],
        "labels_ptr": problem.labels,
        "temperature_ptr": softmax.temperature if per_row else None,
        "scale": (1.0 if softmax.softcap else softmax.logit_scale) / (1.0 if per_row else softmax.temperature),
        "softcap": 0.0 if softmax.softcap is None else softmax.softcap,
        "pre_scale": 0.0 if softmax.softcap is None else softmax.logit_scale / softmax.softcap,
        "SOFTCAP": softmax.softcap is not None,
    }


def _selection(problem: Problem) -> dict[str, object]:
    """Which rows and columns count."""
    return {
        "mask_ptr": problem.selection.row_mask,
        "ignore_index": problem.selection.ignore_index,
        "keep_ids_ptr": problem.selection.keep_ids,
        "keep_offsets_ptr": problem.selection.keep_offsets,
        "vocab_start": problem.vocab_start,
    }


def _launch(problem: Problem) -> dict[str, object]:
    width = 16 // problem.logits.element_size()
    return {
        "REPEAT": REPEAT,
        "THREADS": 32 * NUM_WARPS,
        "WIDTH": width,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }


class TritonLogprob:
    """`Logprob` by the functions of this file."""

    name = "triton"
    partials, merge, gradient = staticmethod(partials), staticmethod(merge), staticmethod(gradient)
