"""The permutations against indexing, the quantization against fp8_cast, the transposed form against the rows."""

from __future__ import annotations

import pytest
import torch

from r1kernels import RowPlan, fp8_dequantize, fp8_quantize, moe_permute, moe_permute_fp8, moe_permute_quant, moe_plan
from r1kernels.fp8_cast.reference import dequantize
from r1kernels.moe_permute_quant.reference import untransposed

SHAPES = [(0, 2, 4), (1, 1, 1), (37, 3, 7), (130, 2, 4), (50, 4, 4)]  # tokens, choices, experts


def case(
    num_tokens: int,
    topk: int,
    num_experts: int,
    hidden: int = 256,
    align: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, RowPlan, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden, generator=generator)
    x = x * torch.exp(2 * torch.randn(num_tokens, 1, generator=generator))
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :topk].int().contiguous()
    weights = torch.rand(num_tokens, topk, generator=generator)
    return x.to(dtype), moe_plan(ids, num_experts, align=align), weights


@pytest.mark.parametrize("align", [1, 16, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_each_choice_is_a_copy_of_its_token(shape, align, dtype):
    x, plan, _ = case(*shape, align=align, dtype=dtype)
    rows = moe_permute(x, plan)
    for t in range(plan.num_tokens):
        for row in plan.row_of[t].tolist():
            assert torch.equal(rows[row], x[t])
    assert not rows[plan.slot_of < 0].any()


def test_gradient_is_the_sum_over_the_copies():
    x, plan, _ = case(9, 3, 5, hidden=8, align=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: moe_permute(x, plan)[plan.slot_of >= 0], (x.requires_grad_(),))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantized_rows_are_copies_of_the_quantized_token(shape, dtype):
    x, plan, _ = case(*shape, dtype=dtype)
    out = moe_permute_quant(x, plan)
    values, scale = fp8_quantize(x, block=(1, 128))
    real = plan.slot_of >= 0
    token = plan.token_of[real]
    assert torch.equal(out.values.view(torch.uint8)[real], values.view(torch.uint8)[token])
    assert torch.equal(out.scale[real], scale[token])
    assert out.scale.t().is_contiguous()  # M-major, what DeepGEMM's TMA reads
    assert out.values_t is out.scale_t is None


def test_weights_multiply_the_scale():
    x, plan, weights = case(37, 3, 7)
    plain, weighted = moe_permute_quant(x, plan), moe_permute_quant(x, plan, weights=weights)
    real = plan.slot_of >= 0
    assert torch.equal(weighted.values.view(torch.uint8)[real], plain.values.view(torch.uint8)[real])
    factor = weights.flatten()[plan.slot_of[real].long()]
    assert torch.equal(weighted.scale[real], plain.scale[real] * factor[:, None])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_transposed_form_is_each_experts_rows_in_128x1_blocks(shape, weighted):
    x, plan, weights = case(*shape)
    out = moe_permute_quant(x, plan, weights=weights if weighted else None, dual=True)
    for e in range(plan.num_experts):
        start, end = plan.offsets[e].item(), plan.offsets[e + 1].item()
        token, slot = plan.token_of[start:end].long(), plan.slot_of[start:end].long()
        rows = x[token.clamp(min=0)].float() * (weights.flatten()[slot.clamp(min=0), None] if weighted else 1)
        rows[slot < 0] = 0
        values, scale = fp8_quantize(rows.t().contiguous(), block=(1, 128))  # 128x1 is 1x128 of the transpose
        found = out.values_t[start * 256 : end * 256].view(256, end - start)
        assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(out.scale_t[start // 128 : end // 128], scale.t())


def test_both_forms_stand_for_the_same_rows():
    x, plan, _ = case(130, 2, 4)
    out = moe_permute_quant(x, plan, dual=True)
    real = plan.slot_of >= 0
    rows = moe_permute(x, plan).float()
    for found in (dequantize(out.values, out.scale, (1, 128)), untransposed(out.values_t, out.scale_t, plan)):
        error = (found - rows)[real].norm() / rows[real].norm()
        assert error < 0.03  # e4m3 rounds to 3 bits: 1/16 at most, 0.026 of a random number


def test_tokens_that_are_fp8_already():
    x, plan, _ = case(37, 3, 7)
    out, wanted = moe_permute_fp8(*fp8_quantize(x, block=(1, 128)), plan), moe_permute_quant(x, plan)
    real = plan.slot_of >= 0
    assert torch.equal(out.values.view(torch.uint8)[real], wanted.values.view(torch.uint8)[real])
    assert torch.equal(out.scale[real], wanted.scale[real])
    assert out.scale.t().is_contiguous()


def test_absent_choices_are_not_written():
    x = torch.randn(6, 128, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [-1, -1], [1, -1], [-1, 0], [-1, -1], [0, 1]], dtype=torch.int32)
    plan = moe_plan(ids, 2, align=4)
    out = moe_permute_quant(x, plan)
    assert torch.equal(plan.token_of[:8], torch.tensor([0, 3, 5, -1, 0, 2, 5, -1], dtype=torch.int32))
    back = fp8_dequantize(out.values, out.scale.contiguous(), block=(1, 128))
    torch.testing.assert_close(back[[0, 1, 2, 4, 5, 6]], x[[0, 3, 5, 0, 2, 5]], rtol=1 / 16, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(3, 128), {}, "the plan is for 2 tokens, but the tensor has 3"),
        (
            torch.zeros(2, 100),
            {},
            "x must be bfloat16 or float32 [T, H] with H divisible by 128, got torch.float32 (2, 100)",
        ),
        (
            torch.zeros(2, 128).half(),
            {},
            "x must be bfloat16 or float32 [T, H] with H divisible by 128, got torch.float16 (2, 128)",
        ),
        (torch.zeros(128, 2).t(), {}, "x must be contiguous [T, H], got shape (2, 128) stride (1, 2)"),
        (
            torch.zeros(2, 128),
            {"weights": torch.ones(2, 3)},
            "weights must be contiguous (2, 2) as the plan's ids, got (2, 3)",
        ),
        (torch.zeros(2, 128), {"weights": torch.ones(2, 2).bfloat16()}, "weights must be float32, got torch.bfloat16"),
        (torch.zeros(2, 128), {"dual": True}, "dual needs a plan with align=128, got align=16"),
        (torch.zeros(2, 128, device="meta"), {}, "x is on meta, but the plan is on cpu"),
    ],
)
def test_quant_error(x, options, message):
    plan = moe_plan(torch.zeros(2, 2, dtype=torch.int32), 4, align=16)
    with pytest.raises(ValueError) as caught:
        moe_permute_quant(x, plan, **options)
    assert str(caught.value) == f"moe_permute_quant: {message}"


def test_other_errors():
    plan = moe_plan(torch.zeros(2, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"moe_permute: x must be floating point, got torch.int64"):
        moe_permute(torch.zeros(2, 8).long(), plan)
    with pytest.raises(ValueError, match=r"moe_permute_fp8: values must be torch.float8_e4m3fn \[T, H\] with H divis"):
        moe_permute_fp8(torch.zeros(2, 128), torch.ones(2, 1), plan)
    with pytest.raises(
        ValueError, match=r"moe_permute_fp8: scale must be contiguous float32 \(2, 1\), got torch.float32 \(2,\)"
    ):
        moe_permute_fp8(torch.zeros(2, 128).to(torch.float8_e4m3fn), torch.ones(2), plan)
