"""Triton launches on the current device: every launch makes that of its tensors the current one.

A CPU shows that each launch lies inside `torch.cuda.device_of`; that the kernel then runs there is for a GPU to show.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch

from r1kernels import (
    GrpoObjective,
    group_advantage,
    grpo_loss,
    logits_grpo_loss,
    logprob_entropy,
    moe_plan,
    moe_swiglu,
    moe_swiglu_quant,
    paged_attention,
)

LABELS = torch.tensor([1, 5, 0])
ONES = torch.ones(3)
PLAN = moe_plan(torch.tensor([[0], [1]], dtype=torch.int32), 2, align=128)


def logits() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)


def scores_with_gradient(**options: object) -> None:
    found = logprob_entropy(logits(), LABELS, impl="triton", **options)
    (found.logp.sum() + found.entropy.sum()).backward()


def swiglu_with_gradient(call: Callable) -> None:
    call(torch.ones(256, 256, requires_grad=True), PLAN).sum().backward()


CALLS: dict[str, Callable[[], object]] = {
    "logprob_entropy": scores_with_gradient,
    "logprob_entropy of kept ids": lambda: scores_with_gradient(
        keep_ids=torch.tensor([1, 2, 5, 0, 3]), keep_offsets=torch.tensor([0, 2, 3, 5])
    ),
    "logits_grpo_loss": lambda: (2 * logits_grpo_loss(logits(), LABELS, None, ONES, ONES, impl="triton")[0]).backward(),
    "grpo_loss": lambda: grpo_loss(-ONES, None, ONES, ONES, objective=GrpoObjective(), impl="triton"),
    "group_advantage by ids": lambda: group_advantage(ONES, group_ids=torch.zeros(3).long(), impl="triton"),
    "paged_attention": lambda: paged_attention(
        torch.ones(3, 2, 16), *torch.ones(2, 3, 1, 16, 16), LABELS.int()[:, None] % 3, LABELS.int(), impl="triton"
    ),
    "moe_swiglu": lambda: swiglu_with_gradient(lambda h, plan: moe_swiglu(h, plan, impl="triton")),
    "moe_swiglu_quant": lambda: [
        moe_swiglu_quant(torch.ones(256, 256), PLAN, dual=dual, impl="triton") for dual in (False, True)
    ],
    "group_advantage by borders": lambda: group_advantage(ONES, cu_groups=torch.tensor([0, 3]), impl="triton"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch, call):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    depth, launches, run = [0], [], interpreter.GridExecutor.__call__

    @contextmanager
    def device_of(tensor: torch.Tensor):
        depth[0] += 1
        yield
        depth[0] -= 1

    def noted(self, *arguments, **options):
        launches.append((self.fn.__name__, depth[0]))
        return run(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted)
    call()
    assert launches and [name for name, inside in launches if not inside] == []
