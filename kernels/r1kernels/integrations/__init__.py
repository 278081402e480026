"""The ops inside other trainers: functions under their names, and `patch` for a whole trainer.

    from r1kernels.integrations import trl
    with trl.patch() as patched:
        trainer.train()
    print(patched)

`patch` finds the functions that the installed version calls (its seams), replaces them, says which, and raises where it
finds none. Importing this package imports no trainer.
"""

from __future__ import annotations

from r1kernels.integrations import megatron, slime, trl, verl
from r1kernels.integrations.functions import (
    calculate_log_probs_and_entropy,
    entropy_from_logits,
    linear_cross_entropy,
    logprobs_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
    vocab_parallel_cross_entropy,
)
from r1kernels.integrations.patching import Patch

__all__ = [
    "Patch",
    "calculate_log_probs_and_entropy",
    "entropy_from_logits",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "megatron",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "slime",
    "trl",
    "verl",
    "vocab_parallel_cross_entropy",
]
