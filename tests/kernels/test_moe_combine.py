"""moe_combine against a loop in float64, its gradients, and the quantized backward."""

from __future__ import annotations

import pytest
import torch

from r1kernels import RowPlan, moe_combine, moe_combine_backward_quant, moe_permute, moe_permute_quant, moe_plan

SHAPES = [(0, 2, 4), (1, 1, 1), (37, 3, 7), (130, 2, 4), (50, 4, 4)]  # tokens, choices, experts


def case(
    num_tokens: int,
    topk: int,
    num_experts: int,
    hidden: int = 256,
    align: int = 128,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, RowPlan, torch.Tensor, torch.Tensor]:
    """rows, plan, weights, residual; some choices absent; padding rows are NaN, which nobody may read."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :topk].int()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    plan = moe_plan(ids.contiguous(), num_experts, align=align)
    rows = torch.randn(plan.num_rows, hidden, generator=generator, dtype=torch.float64).to(dtype)
    rows[plan.slot_of < 0] = torch.nan
    weights = torch.rand(num_tokens, topk, generator=generator, dtype=torch.float64)
    residual = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    return rows, plan, weights if dtype == torch.float64 else weights.float(), residual


def oracle(
    rows: torch.Tensor, plan: RowPlan, weights: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    out = []
    for t, own in enumerate(plan.row_of.tolist()):
        total = torch.zeros(rows.shape[1], dtype=torch.float64) if residual is None else residual[t].double()
        for k, row in enumerate(own):
            if row >= 0:
                total = total + (1.0 if weights is None else weights[t, k].double()) * rows[row].double()
        out.append(total)
    return torch.stack(out) if out else torch.zeros(0, rows.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)]
)
def test_matches_the_loop(shape, has_weights, has_residual, dtype, tolerance):
    rows, plan, weights, residual = case(*shape, dtype=dtype)
    weights, residual = weights if has_weights else None, residual if has_residual else None
    out = moe_combine(rows, plan, weights, residual=residual)
    assert out.dtype == dtype
    wanted = oracle(rows, plan, weights, residual)
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance * 0.1)


def test_bfloat16_is_rounded_once():
    rows, plan, weights, residual = case(37, 3, 7, dtype=torch.bfloat16)
    wide = moe_combine(rows.float(), plan, weights, residual=residual.float())
    assert torch.equal(moe_combine(rows, plan, weights, residual=residual), wide.bfloat16())


@pytest.mark.parametrize("has_weights", [False, True])
def test_gradients(has_weights):
    rows, plan, weights, residual = case(9, 3, 5, hidden=8, align=4)
    real = plan.slot_of >= 0
    packed = rows[real]

    def run(packed: torch.Tensor, weights: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        full = torch.zeros_like(rows).index_copy(0, real.nonzero()[:, 0], packed)
        return moe_combine(full, plan, weights, residual=residual)

    inputs = (packed.requires_grad_(), weights.requires_grad_() if has_weights else None, residual.requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)


def test_gradient_of_padding_is_zero_and_no_padding_is_read():
    rows, plan, weights, _ = case(37, 3, 7, dtype=torch.bfloat16)
    moe_combine(rows.requires_grad_(), plan, weights.requires_grad_()).float().sum().backward()
    assert not rows.grad[plan.slot_of < 0].any()
    assert weights.grad.isfinite().all()


def test_combine_undoes_permute():
    x = torch.randn(50, 256, dtype=torch.float64)
    _, plan, weights, _ = case(50, 4, 4)
    out = moe_combine(moe_permute(x, plan), plan, weights)
    kept = (weights * (plan.row_of >= 0)).sum(1, keepdim=True)
    torch.testing.assert_close(out, x * kept)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantized_backward(shape, dual, dtype):
    rows, plan, weights, grad = case(*shape, dtype=dtype)
    quantized, grad_weights = moe_combine_backward_quant(grad, rows, plan, weights, dual=dual)
    wanted = moe_permute_quant(grad, plan, weights=weights, dual=dual)
    for found, exact in zip(quantized, wanted, strict=True):
        assert found is exact is None or torch.equal(found.float(), exact.float())
    exact = torch.zeros(weights.shape, dtype=torch.float64)
    for t, own in enumerate(plan.row_of.tolist()):
        for k, row in enumerate(own):
            exact[t, k] = grad[t].double() @ rows[row].double() if row >= 0 else 0
    torch.testing.assert_close(grad_weights.double(), exact, rtol=1e-5, atol=1e-4)
    assert moe_combine_backward_quant(grad, None, plan, weights)[1] is None


@pytest.mark.parametrize(
    ("rows", "weights", "options", "message"),
    [
        (torch.zeros(3, 8), None, {}, "the plan has 16 rows, but the tensor has 3"),
        (torch.zeros(16, 8).long(), None, {}, "rows must be floating point, got torch.int64"),
        (torch.zeros(8, 16).t(), None, {}, "rows must be contiguous [R, H], got shape (16, 8) stride (1, 16)"),
        (torch.zeros(16, 8), torch.ones(2), {}, "weights must be contiguous (2, 2) as the plan's ids, got (2,)"),
        (
            torch.zeros(16, 8),
            None,
            {"residual": torch.zeros(2, 8).bfloat16()},
            "residual must be contiguous torch.float32 (2, 8), got torch.bfloat16 (2, 8)",
        ),
        (torch.zeros(16, 8, device="meta"), None, {}, "rows are on meta, but the plan is on cpu"),
    ],
)
def test_error(rows, weights, options, message):
    plan = moe_plan(torch.zeros(2, 2, dtype=torch.int32), 4, align=4)
    with pytest.raises(ValueError) as caught:
        moe_combine(rows, plan, weights, **options)
    assert str(caught.value) == f"moe_combine: {message}"


def test_quantized_backward_errors():
    plan = moe_plan(torch.zeros(2, 2, dtype=torch.int32), 4)
    weights = torch.ones(2, 2)
    with pytest.raises(
        ValueError, match=r"moe_combine_backward_quant: grad must be bfloat16 or float32 .* got torch.float32"
    ):
        moe_combine_backward_quant(torch.zeros(2, 100), None, plan, weights)
    with pytest.raises(
        ValueError, match=r"moe_combine_backward_quant: rows must be torch.float32 \[R, 128\] as grad, got"
    ):
        moe_combine_backward_quant(torch.zeros(2, 128), torch.zeros(plan.num_rows, 256), plan, weights)
