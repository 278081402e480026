"""r1kernels inside Megatron-core: its cross-entropies over a vocabulary that is split over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from r1kernels.integrations import functions
from r1kernels.integrations.patching import Patch, Seam, patch_package


def _vocab_parallel_cross_entropy(original: Any, patch: Patch) -> object:
    def vocab_parallel_cross_entropy(
        vocab_parallel_logits: torch.Tensor, target: torch.Tensor, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Negated log-probability [s, b] of [s, b, V_local] over the tensor-parallel group; the logits survive."""
        if label_smoothing:
            patch.note("vocab_parallel_cross_entropy with label_smoothing stays Megatron's")
            return original(vocab_parallel_logits, target, label_smoothing)  # type: ignore[no-any-return]  # Megatron's
        from megatron.core import parallel_state

        patch.calls["vocab_parallel_cross_entropy"] += 1
        group = parallel_state.get_tensor_model_parallel_group()
        return functions.vocab_parallel_cross_entropy(vocab_parallel_logits, target, group)

    return vocab_parallel_cross_entropy


def _fused_vocab_parallel_cross_entropy(original: Any, patch: Patch) -> object:
    def fused_vocab_parallel_cross_entropy(
        vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """Negated log-probability [s, b] of [s, b, V_local] over a group; None is one rank."""
        patch.calls["fused_vocab_parallel_cross_entropy"] += 1
        return functions.vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group)

    return fused_vocab_parallel_cross_entropy


SEAMS = (
    Seam("megatron.core.tensor_parallel.cross_entropy", "vocab_parallel_cross_entropy", _vocab_parallel_cross_entropy),
    Seam(
        "megatron.core.fusions.fused_cross_entropy",
        "fused_vocab_parallel_cross_entropy",
        _fused_vocab_parallel_cross_entropy,
    ),
)


def patch() -> Patch:
    """Puts r1kernels where Megatron-core computes its cross-entropies.

    Returns:
        Patch: what was replaced, the calls served so far, and what stayed Megatron's. As a context manager it undoes
        itself.

    Raises:
        RuntimeError: Megatron-core is not installed, has none of the functions to replace, or is patched already.
    """
    return patch_package("megatron", "megatron-core", SEAMS, "0.16")
