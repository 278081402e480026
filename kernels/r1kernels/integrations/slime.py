"""r1kernels inside slime. Names and arguments are those of its sources; docs/trainers.md says what was run."""

from __future__ import annotations

from r1kernels.integrations import functions
from r1kernels.integrations.patching import Patch, Seam, counted, patch_package

SEAMS = (
    Seam(
        "slime.utils.ppo_utils",
        "calculate_log_probs_and_entropy",
        counted("calculate_log_probs_and_entropy", functions.calculate_log_probs_and_entropy),
    ),
)


def patch() -> Patch:
    """Puts r1kernels where the installed slime computes log-probabilities; call it in every training process.

    Returns:
        Patch: what was replaced and the calls served so far. As a context manager it undoes itself.

    Raises:
        RuntimeError: slime is not installed, has not the function to replace, or is patched already.
    """
    return patch_package("slime", "slime", SEAMS, "main of August 2026, read, not run")
