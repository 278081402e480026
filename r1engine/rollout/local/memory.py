"""What drawing takes of a GPU's memory: so many sequences are decoded at once as fit, and one must."""

from __future__ import annotations

import logging

import torch

from r1engine.hf.architecture import Architecture
from r1engine.rollout.local.cache import in_blocks

USED = 0.9  # of the memory that is free when drawing begins; the rest is for what is not counted here
GIB = 2**30


def rows_that_fit(arch: Architecture, *, slots: int, longest: int, prefill: int, size: int, free: int) -> int:
    """How many sequences are decoded at once: `slots`, or as many as have room for `longest` tokens each.

    Keys and values never take more than is reckoned here: a row has its whole length from the beginning.

    Args:
        arch:    of the model.
        slots:   wanted.
        longest: tokens of the longest sequence, with its prompt.
        prefill: padded tokens of prompts that are run at once.
        size:    bytes of a number.
        free:    bytes of the device that are free, of which USED may be taken.

    Raises:
        RuntimeError: one sequence does not fit.
    """
    token = kv_bytes(arch, size)
    # Of a row: keys, values and mask; logits, their softmax and its sums in float64, with what sorting them would take.
    row = in_blocks(longest) * (token + arch.num_kv_heads * size) + 32 * arch.vocab_size
    # Of prompts: their keys and values, and of one layer at a time the widest rows, before and behind the activation.
    prompts = prefill * (token + size * (8 * arch.hidden_size + 3 * _widest(arch)))
    rows = int((USED * free - prompts) // row)
    if rows < 1:
        raise RuntimeError(
            f"generate: a sequence of {longest} tokens takes {row / GIB:.2f} GiB of GPU memory beside "
            f"{prompts / GIB:.2f} GiB for its prompt, found {USED * free / GIB:.2f} GiB that may be used; required are "
            "fewer rollout.max_tokens, or rollout.engine=sglang, which shares a model out to several GPUs"
        )
    if rows < slots:
        message = "generator: %d sequences of %d tokens at once in place of %d, as the GPU has room for no more"
        logging.getLogger(__name__).warning(message, rows, longest, slots)
    return min(slots, rows)


def kv_bytes(arch: Architecture, size: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * size


def free_bytes(device: torch.device) -> int:
    """What this process may still take: free on the device, or kept by PyTorch and not used."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _widest(arch: Architecture) -> int:
    """Numbers of a token in the widest place of a layer."""
    routed = arch.moe.top_k * arch.moe.intermediate_size + arch.moe.shared_size if arch.moe is not None else 0
    return max(arch.intermediate_size, routed, arch.num_heads * arch.head_dim)
