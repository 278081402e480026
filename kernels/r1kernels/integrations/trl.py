"""r1kernels inside TRL's trainers (GRPO, RLOO, DPO, KTO and the experimental ones).

The loss itself stays TRL's, of whatever type: every one of them starts from log-probabilities and entropies, which are
what takes the time and the memory. So does what `linear_logprob` has no answer for; `Patch.notes` says what it was.
docs/trainers.md has the versions that were tried.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from r1kernels.integrations import functions
from r1kernels.integrations.patching import Patch, Seam, counted, patch_package
from r1kernels.linear_logprob import linear_logprob

UTILS = "trl.trainer.utils"
SERVED = ("log_probs", "entropy")
Outputs = tuple[torch.Tensor | None, ...]


class FusedHead:
    """In the place of TRL's autograd function for the output layer: the same call, by `linear_logprob`."""

    def __init__(self, original: Any, patch: Patch) -> None:
        self.original: Any = original
        self.patch: Patch = patch
        # Differs between versions: (ctx, hidden, weight, ...).
        self.signature: inspect.Signature = inspect.signature(original.forward)

    def apply(self, *args: Any) -> Outputs:
        """[N] log-probabilities and entropies of hidden [N, H] and weight [V, H]; None for what nobody asked for."""
        bound = self.signature.bind(None, *args)
        bound.apply_defaults()
        _, hidden, *_ = bound.args
        given = bound.arguments
        outputs = given.get("outputs", ("entropy",))
        if reason := _why_not(given["weight"], given["logit_scale"], outputs):
            self.patch.note(f"{reason} stays TRL's")
            return self.original.apply(*args)  # type: ignore[no-any-return]  # TRL's own result
        self.patch.calls["_ChunkedLogProbFunction"] += 1
        wants_entropy = "entropy" in outputs
        found = linear_logprob(
            hidden,
            given["weight"],
            given["targets"],
            bias=given.get("bias"),
            temperature=given["temperature"],
            logit_scale=given["logit_scale"],
            softcap=given["final_logit_softcapping"],
            return_entropy=wants_entropy,
            entropy_grad=wants_entropy,
        )
        return (found.logp, found.entropy) + ((None,) * 3 if "outputs" in given else ())


def _why_not(weight: torch.Tensor, logit_scale: float, outputs: tuple[str, ...]) -> str | None:
    """What of a call `linear_logprob` does not serve; None if it serves all."""
    if others := [name for name in outputs if name not in SERVED]:
        return f"an output layer that is asked for {', '.join(others)}"
    if hasattr(weight, "ds_id"):
        return "an output layer that DeepSpeed ZeRO-3 has dealt out"
    if not logit_scale > 0:
        return f"an output layer with logit_scale={logit_scale}"
    return None


def _on_every_device(original: Any, patch: Patch) -> object:
    """TRL scores prompts and padding, too, where it has no Triton; here they are left out on every device."""
    return lambda device: True


SEAMS = (
    Seam(UTILS, "_ChunkedLogProbFunction", FusedHead),
    Seam(UTILS, "selective_log_softmax", counted("selective_log_softmax", functions.selective_log_softmax)),
    Seam(
        UTILS,
        "selective_log_softmax_and_entropy",
        counted("selective_log_softmax_and_entropy", functions.selective_log_softmax_and_entropy),
    ),
    Seam(UTILS, "entropy_from_logits", counted("entropy_from_logits", functions.entropy_from_logits)),
    Seam(UTILS, "_use_triton", _on_every_device, everywhere=False),
)


def patch() -> Patch:
    """Puts r1kernels where the installed TRL computes log-probabilities. Works before and after a trainer is made.

    Returns:
        Patch: what was replaced, the calls served so far, and what stayed TRL's. As a context manager it undoes itself.

    Raises:
        RuntimeError: TRL is not installed, has none of the functions to replace, or is patched already.
    """
    return patch_package("trl", "trl", SEAMS, "1.16")
