"""What drawing takes of a GPU's memory: what is left is pages for keys and values, enough for one sequence at least."""

from __future__ import annotations

import logging

import torch

from r1engine.hf.architecture import Architecture
from r1engine.hf.kv_shape import kv_bytes
from r1engine.rollout.local.pages import PAGE_TOKENS, num_pages

USED = 0.9  # of the memory that is free when drawing begins; the rest is for what is not counted here
GIB = 2**30


def pages_that_fit(arch: Architecture, *, rows: int, longest: int, prefill: int, size: int, free: int) -> int:
    """Pages of the cache: for `rows` sequences of `longest` tokens, or as many as there is room for.

    Drawing never takes more than is reckoned here, however long the sequences become.

    Args:
        arch:    of the model.
        rows:    sequences that are decoded at once.
        longest: tokens of the longest sequence, with its prompt.
        prefill: padded tokens of prompts that are run at once.
        size:    bytes of a number.
        free:    bytes of the device that are free, of which USED may be taken.

    Raises:
        RuntimeError: one sequence does not fit.
    """
    token, one, rest = kv_bytes(arch, size), num_pages(longest), _other_bytes(arch, rows, longest, prefill, size)
    found = int((USED * free - rest) // (token * PAGE_TOKENS)) - 1  # and the page of rows without a sequence
    if found < one:
        raise RuntimeError(
            f"generate: a sequence of {longest} tokens takes {(one + 1) * PAGE_TOKENS * token / GIB:.2f} GiB of GPU "
            f"memory beside {rest / GIB:.2f} GiB for prompts and logits, found {USED * free / GIB:.2f} GiB that may be "
            "used; required are fewer rollout.max_tokens or rollout.slots, a smaller search.cache_gib, or "
            "rollout.engine=sglang, which shares a model out to several GPUs"
        )
    if found < rows * one:
        message = "generator: the GPU has room for keys and values of %d tokens, not for %d sequences of %d"
        logging.getLogger(__name__).info(message, found * PAGE_TOKENS, rows, longest)
    return min(found, rows * one)


def free_bytes(device: torch.device) -> int:
    """What this process may still take: free on the device, or kept by PyTorch and not used."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _other_bytes(arch: Architecture, rows: int, longest: int, prefill: int, size: int) -> int:
    """All but the pages."""
    # Of a row: logits, their softmax and its sums in float64, with what sorting them would take.
    logits = 32 * arch.vocab_size * rows
    # Of prompts: their keys and values, of one layer twice more on the way into pages; and of one layer at a time the
    # widest rows, before and behind the activation. What is kept of a step goes into pages when they are gone.
    token = kv_bytes(arch, size)
    prompts = prefill * (token + 2 * token // arch.num_layers + size * (8 * arch.hidden_size + _widest(arch)))
    # One sequence of one layer, on its way to the host.
    return logits + prompts + longest * token // arch.num_layers


def _widest(arch: Architecture) -> int:
    """Numbers of a token that are there at once in the widest place of a layer."""
    both = 3 * max(arch.intermediate_size, arch.num_heads * arch.head_dim)  # before and behind the activation
    if arch.mla is not None:  # queries, keys, values and results of one size, and the results of theirs
        both = max(both, arch.num_heads * (4 * arch.head_dim + arch.mla.value_dim))
    if arch.moe is None:
        return both
    # Of each choice both, and its result.
    routed = arch.moe.top_k * (3 * arch.moe.intermediate_size + arch.hidden_size)
    return max(both, 3 * arch.moe.shared_size, routed)
