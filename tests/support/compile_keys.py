"""Counts the compilations that launches of many lengths would ask Triton for; without a GPU.

The driver is a fake that names a GPU (compute capability 9) and has no other use: Triton works out the key under which
it would look for compiled code, the hook notes it, and no code is made or run.
"""

from __future__ import annotations

import os

import torch
import triton

from r1kernels import GrpoObjective, group_advantage, grpo_loss, logits_grpo_loss, logprob_entropy, paged_attention

LENGTHS = (1, 2, 15, 16, 17, 100, 1000, 1024, 4097, 70_001)
VOCAB = 48


class Driver:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def number_of_keys() -> dict[str, int]:
    """Of each kernel. For a process that has no TRITON_INTERPRET (ranks.py), which interprets nothing."""
    # What is defined before TRITON_INTERPRET is set is compiled.
    __import__("r1kernels.group_advantage.triton_impl")
    __import__("r1kernels.logits_grpo_loss.triton_impl")
    __import__("r1kernels.paged_attention.triton_impl")
    keys: dict[str, set[str]] = {}

    def note(*, key: str, fn: object, **rest: object) -> bool:
        keys.setdefault(fn.name.rpartition(".")[2], set()).add(key)
        return True  # do not compile

    triton.knobs.runtime.jit_cache_hook = note
    triton.runtime.driver.set_active(Driver())
    os.environ["TRITON_INTERPRET"] = "1"  # lets impl="triton" have CPU tensors; the kernels were made before
    objective = GrpoObjective(kl_coef=0.1, entropy_coef=0.1)
    for length in LENGTHS:
        labels = torch.zeros(2 * length, dtype=torch.int64)[length:]  # a view need not be aligned
        for shape in ((length,), (1, length), (length, 1)):
            logits = torch.zeros(*shape, VOCAB, requires_grad=True)
            found = logprob_entropy(logits, labels.view(shape), entropy_grad=True, impl="triton")
            torch.autograd.grad((found.logp + found.entropy).sum(), logits)
        x = torch.zeros(length)
        tokens = {"old_logp": x, "advantage": x, "loss_weight": x + 1, "ref_logp": x}
        grpo_loss(x, **tokens, entropy=x, objective=objective, impl="triton")
        logits = torch.zeros(length, VOCAB, requires_grad=True)
        logits_grpo_loss(logits, labels, **tokens, objective=objective, impl="triton").loss.backward()
        group_advantage(x, labels.clone(), impl="triton")
        group_advantage(x, cu_groups=torch.tensor([0, length]), impl="triton")
        rows, pages = min(length, 64), length % 33 + 1
        query, pool = torch.zeros(rows, 4, 64), torch.zeros(2, 3, 2, 16, 64)
        places = torch.zeros(rows, pages, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
        paged_attention(query, *pool, *places, impl="triton")
    return {name: len(found) for name, found in keys.items()}
