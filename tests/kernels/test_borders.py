"""What every op says of an argument that is right but for its place: on another device, or with other strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from r1kernels import (
    GrpoObjective,
    fp8_dequantize,
    fp8_quantize,
    group_advantage,
    grpo_loss,
    linear_logprob,
    logits_grpo_loss,
    logprob_entropy,
    moe_combine,
    moe_experts,
    moe_gate_topk,
    moe_grouped_gemm,
    moe_grouped_gemm_fp8,
    moe_grouped_wgrad,
    moe_grouped_wgrad_fp8,
    moe_permute,
    moe_permute_fp8,
    moe_permute_quant,
    moe_plan,
    moe_swiglu,
    moe_swiglu_quant,
    paged_attention,
)
from r1kernels.fp8_cast import Fp8

TOKENS, EXPERTS, WIDTH, WORDS = 6, 4, 128, 11
random = torch.Generator().manual_seed(0)


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=random).bfloat16()


IDS = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3], [1, 3], [0, 2]], dtype=torch.int32)
PLAN = moe_plan(IDS, EXPERTS, align=128)
X, WEIGHTS, ROWS = bf16(TOKENS, WIDTH), torch.rand(TOKENS, 2, generator=random), bf16(PLAN.num_rows, WIDTH)
MATRIX, H = bf16(EXPERTS, WIDTH, WIDTH), bf16(PLAN.num_rows, 2 * WIDTH)
LOGITS, LABELS, ONES = torch.randn(TOKENS, WORDS, generator=random), torch.arange(TOKENS), torch.ones(TOKENS)
FP8_ROWS = moe_permute_quant(X, PLAN, dual=True)


def gate(*tensors: torch.Tensor, **options: torch.Tensor):
    return moe_gate_topk(*tensors, **options, topk=2, n_group=2, topk_group=1, score="sigmoid")


# An op with its tensors, the first one where the op runs.
CALLS: dict[str, tuple[Callable, Sequence[torch.Tensor]]] = {
    "moe_gate_topk": (gate, (torch.randn(TOKENS, EXPERTS, generator=random), torch.zeros(EXPERTS))),
    "moe_gate_topk of given ids": (lambda x, ids: gate(x, None, replay_ids=ids), (WEIGHTS.repeat(1, 2), IDS)),
    "moe_permute": (lambda x: moe_permute(x, PLAN), (X,)),
    "moe_permute_quant": (lambda x, w: moe_permute_quant(x, PLAN, weights=w), (X, WEIGHTS)),
    "moe_permute_fp8": (lambda x, scale: moe_permute_fp8(x, scale, PLAN), fp8_quantize(X, block=(1, 128))),
    "moe_combine": (lambda rows, w, x: moe_combine(rows, PLAN, w, residual=x), (ROWS, WEIGHTS, X)),
    "moe_swiglu": (lambda h, w: moe_swiglu(h, PLAN, w), (H, WEIGHTS)),
    "moe_swiglu_quant": (lambda h, w: moe_swiglu_quant(h, PLAN, weights=w), (H, WEIGHTS)),
    "moe_grouped_gemm": (lambda rows, matrix: moe_grouped_gemm(rows, matrix, PLAN), (ROWS, MATRIX)),
    "moe_grouped_wgrad": (lambda grad, rows: moe_grouped_wgrad(grad, rows, PLAN), (ROWS, ROWS.clone())),
    "moe_grouped_gemm_fp8": (
        lambda matrix, scale: moe_grouped_gemm_fp8(FP8_ROWS, Fp8(matrix, scale), PLAN),
        fp8_quantize(MATRIX, block=(128, 128)),
    ),
    "moe_grouped_wgrad_fp8": (
        lambda values, scale, out: moe_grouped_wgrad_fp8((values, scale), FP8_ROWS[2:], PLAN, out=out.clone()),
        (*FP8_ROWS[2:], torch.zeros(EXPERTS, WIDTH, WIDTH)),
    ),
    "fp8_dequantize": (lambda x, scale: fp8_dequantize(x, scale, block=(1, 128)), fp8_quantize(X, block=(1, 128))),
    "moe_experts": (
        lambda x, ids, w, *more: moe_experts(x, ids, w, *more[:2], residual=more[2]),
        (X, IDS, WEIGHTS, bf16(EXPERTS, 2 * WIDTH, WIDTH), MATRIX, X.clone()),
    ),
    "logprob_entropy": (logprob_entropy, (LOGITS, LABELS)),
    "grpo_loss": (lambda *x: grpo_loss(*x, objective=GrpoObjective()), (-ONES, -ONES, ONES, ONES)),
    "group_advantage": (lambda x, ids: group_advantage(x, group_ids=ids), (ONES, LABELS // 2)),
    "logits_grpo_loss": (lambda x, y, *more: logits_grpo_loss(x, y, None, *more), (LOGITS, LABELS, ONES, ONES)),
    "linear_logprob": (linear_logprob, (bf16(TOKENS, 16).float(), bf16(WORDS, 16).float(), LABELS)),
    "paged_attention": (
        paged_attention,
        (torch.ones(3, 2, 16), *torch.ones(2, 3, 1, 16, 16), torch.zeros(3, 1).int(), torch.ones(3).int()),
    ),
}
PLACES = [(name, place) for name, (_, tensors) in CALLS.items() for place in range(len(tensors))]


@pytest.mark.parametrize(("name", "place"), [case for case in PLACES if case[1]])
def test_an_argument_on_another_device_is_refused(name, place):
    call, tensors = CALLS[name]
    moved = [x.to("meta") if i == place else x for i, x in enumerate(tensors)]
    with pytest.raises(ValueError, match="meta"):
        call(*moved)


def with_other_strides(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second one in memory, or column after column."""
    if x.dim() == 1:
        return x.repeat_interleave(2)[::2]
    flat = x.view(torch.uint8) if x.element_size() == 1 else x
    return flat.mT.contiguous().mT.view(x.dtype)


def tensors_in(found: object) -> list[torch.Tensor]:
    return [x for x in (found if isinstance(found, tuple) else [found]) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_other_strides_change_nothing_or_are_refused(name, place):
    call, tensors = CALLS[name]
    wanted = tensors_in(call(*tensors))
    try:
        found = tensors_in(call(*(with_other_strides(x) if i == place else x for i, x in enumerate(tensors))))
    except ValueError as error:
        assert "contiguous" in str(error) or "strides" in str(error)
        return
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
