"""r1kernels inside verl. Names and arguments are those of its sources; docs/trainers.md says what was run."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from r1kernels.integrations import functions
from r1kernels.integrations.patching import Patch, Seam, counted, patch_package

FUSED = ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")


def _logprobs_from_logits(original: Any, patch: Patch) -> object:
    """In place only where this version of verl has that option, and callers who know of it."""
    may_overwrite = "inplace_backward" in inspect.signature(original).parameters

    def logprobs_from_logits(
        logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = may_overwrite
    ) -> torch.Tensor:
        return functions.logprobs_from_logits(logits, labels, inplace_backward)

    return counted("logprobs_from_logits", logprobs_from_logits)(original, patch)


def _linear_cross_entropy(original: Any, patch: Patch) -> object:
    owner = getattr(original, "__self__", None)  # of LinearCrossEntropy.apply
    names = tuple(inspect.signature(owner.forward if owner is not None else original).parameters)
    if names[-len(FUSED) :] != FUSED:
        patch.note(f"linear_cross_entropy({', '.join(names)}) stays verl's; served is one of ({', '.join(FUSED)})")
        return original
    return counted("linear_cross_entropy", functions.linear_cross_entropy)(original, patch)


SEAMS = (
    Seam("verl.utils.torch_functional", "logprobs_from_logits", _logprobs_from_logits),
    Seam(
        "verl.utils.torch_functional",
        "entropy_from_logits",
        counted("entropy_from_logits", functions.entropy_from_logits),
    ),
    Seam("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", _linear_cross_entropy),
)


def patch() -> Patch:
    """Puts r1kernels where the installed verl computes log-probabilities; call it in every worker process.

    Returns:
        Patch: what was replaced, the calls served so far, and what stayed verl's. As a context manager it undoes
        itself.

    Raises:
        RuntimeError: verl is not installed, has none of the functions to replace, or is patched already.
    """
    return patch_package("verl", "verl", SEAMS, "main of August 2026, read, not run")
