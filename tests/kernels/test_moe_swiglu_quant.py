"""The experts' activation against autograd in float64; its FP8 forms against fp8_cast; the compiled kernels."""

from __future__ import annotations

import aot
import pytest
import torch
from compiled_kernels import SWIGLU

from r1kernels import RowPlan, fp8_quantize, moe_plan, moe_swiglu, moe_swiglu_quant, moe_swiglu_quant_backward
from r1kernels.fp8_cast.reference import dequantize
from r1kernels.moe_permute_quant.reference import untransposed

IMPLS = ["reference", "triton"]
NAN = float("nan")


def case(num_tokens: int = 37, topk: int = 2, experts: int = 2, inner: int = 256, dtype: torch.dtype = torch.float32):
    """(h, grad, weights, plan); padding rows hold NaN, the first choice goes nowhere."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, experts, generator=generator).argsort(1)[:, :topk].int().contiguous()
    if num_tokens:
        ids[0, 0] = -1
    plan = moe_plan(ids, experts)
    h, grad = (torch.randn(plan.num_rows, n, generator=generator) for n in (2 * inner, inner))
    h = h * torch.exp(torch.randn(plan.num_rows, 1, generator=generator))
    for tensor in (h, grad):
        tensor[plan.slot_of < 0] = NAN
    return h.to(dtype), grad.to(dtype), torch.rand(num_tokens, topk, generator=generator), plan


def used(plan: RowPlan) -> int:
    return int(plan.offsets[-1])


def exact(h: torch.Tensor, grad: torch.Tensor, weights: torch.Tensor, plan: RowPlan):
    """(act, d h, d weights) in float64 by autograd; zero in padding."""
    h64, w64 = h.double().nan_to_num(0).requires_grad_(), weights.double().requires_grad_()
    gate, up = h64.chunk(2, 1)
    real = plan.slot_of >= 0
    factor = torch.zeros(plan.num_rows, 1, dtype=torch.float64)
    factor = factor.index_put((real.nonzero()[:, 0],), w64.flatten()[plan.slot_of[real].long()][:, None])
    act = torch.nn.functional.silu(gate) * up * factor
    act.backward(grad.double().nan_to_num(0))
    return act.detach(), h64.grad, w64.grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 37])
def test_values_and_gradients_match_float64_autograd(impl, dtype, num_tokens):
    h, grad, weights, plan = case(num_tokens, dtype=dtype)
    h, weights = h.requires_grad_(), weights.requires_grad_()
    out = moe_swiglu(h, plan, weights, impl=impl)
    out.backward(grad)
    end = used(plan)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-5, "rtol": 2**-8}
    for found, wanted in zip((out[:end], h.grad[:end]), exact(h.detach(), grad, weights.detach(), plan), strict=False):
        torch.testing.assert_close(found.double(), wanted[:end], **tolerance)
    grad_weights = exact(h.detach(), grad, weights.detach(), plan)[2]
    torch.testing.assert_close(weights.grad.double(), grad_weights, atol=1e-4, rtol=1e-5)


def test_no_weights_means_ones():
    h, grad, weights, plan = case()
    ones = torch.ones_like(weights)
    for impl in IMPLS:
        assert torch.equal(moe_swiglu(h, plan, impl=impl), moe_swiglu(h, plan, ones, impl=impl))
        out = moe_swiglu_quant_backward(grad, h, plan, impl=impl)
        assert out.grad_weights is None
        other = moe_swiglu_quant_backward(grad, h, plan, weights=ones, impl=impl)
        assert torch.equal(out.wide_grad[: used(plan)], other.wide_grad[: used(plan)])


def test_by_hand():
    # silu(1) = 0.731059; times up 2, times weight 0.5.
    plan = moe_plan(torch.zeros(1, 1, dtype=torch.int32), 1, align=1)
    h = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weights = torch.tensor([[0.5]], requires_grad=True)
    out = moe_swiglu(h, plan, weights)
    out.backward(torch.ones(1, 1))
    assert out.item() == pytest.approx(0.731059, abs=1e-6)
    assert weights.grad.item() == pytest.approx(2 * 0.731059, abs=1e-6)
    # d gate = 0.5 * 2 * s (1 + gate (1 - s)) with s = 0.731059; d up = 0.5 * silu(1).
    assert h.grad[0].tolist() == pytest.approx([0.927671, 0.365529], abs=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_forms_are_the_quantized_float32_result(impl, dtype):
    h, grad, weights, plan = case(dtype=dtype)
    act, grad_h, grad_weights = exact(h, grad, weights, plan)
    out = moe_swiglu_quant(h, plan, weights=weights, dual=True, impl=impl)
    back = moe_swiglu_quant_backward(grad, h, plan, weights=weights, dual=True, impl=impl)
    wide = moe_swiglu_quant_backward(grad, h, plan, weights=weights, impl=impl)
    real, end = plan.slot_of >= 0, used(plan)
    assert out.scale.t().is_contiguous() and back.grad.scale.t().is_contiguous()  # what DeepGEMM's TMA reads
    for rows, wanted in ((out, act), (back.grad, grad_h), (wide.grad, grad_h)):
        # Half a unit of e4m3's last place, of the largest values of a block: 2**-4 of them, and float32 rounding.
        found = dequantize(rows.values, rows.scale, (1, 128)).double()
        top = wanted.abs().unflatten(1, (-1, 128)).amax(-1, keepdim=True)
        error = (found - wanted).unflatten(1, (-1, 128)).abs()
        assert (error <= wanted.unflatten(1, (-1, 128)).abs() * 2**-4 + top * 2**-9 / 448 * 1.01 + 1e-12)[real].all()
    for values_t, scale_t, wanted in (
        (out.values_t, out.scale_t, act),
        (back.act_t, back.act_scale_t, act),
        (back.grad.values_t, back.grad.scale_t, grad_h),
    ):
        found = untransposed(values_t, scale_t, plan).double()[:end]
        top = wanted[:end].abs().unflatten(0, (-1, 128)).amax(1, keepdim=True)
        error = (found - wanted[:end]).abs().unflatten(0, (-1, 128))
        assert (error <= wanted[:end].abs().unflatten(0, (-1, 128)) * 2**-4 + top * 2**-9 / 448 * 1.01 + 1e-12).all()
    torch.testing.assert_close(wide.wide_grad[:end].double(), grad_h[:end], atol=1e-5, rtol=2**-8)
    torch.testing.assert_close(wide.wide_act[:end].double(), act[:end], atol=1e-5, rtol=2**-8)
    torch.testing.assert_close(wide.grad_weights.double(), grad_weights, atol=1e-4, rtol=1e-5)
    assert torch.equal(wide.grad_weights, back.grad_weights)


def test_fp8_bytes_are_those_of_fp8_quantize():
    h, _, _, plan = case()
    real = plan.slot_of >= 0
    values, scale = fp8_quantize(moe_swiglu(h, plan), block=(1, 128))
    for impl, differing in (("reference", 0.0), ("triton", 1e-3)):  # Triton's exp rounds a few values the other way
        out = moe_swiglu_quant(h, plan, impl=impl)
        assert (out.values.view(torch.uint8) != values.view(torch.uint8))[real].float().mean() <= differing
        torch.testing.assert_close(out.scale[real], scale[real], atol=0, rtol=1e-6)


def test_quantizing_in_one_read_errs_no_more_than_rounding_to_bfloat16_first():
    h, _, weights, plan = case(dtype=torch.bfloat16)
    act, *_ = exact(h, torch.zeros(plan.num_rows, 256), weights, plan)
    real = plan.slot_of >= 0
    unfused = fp8_quantize(moe_swiglu(h, plan, weights), block=(1, 128))
    for impl in IMPLS:
        fused = moe_swiglu_quant(h, plan, weights=weights, impl=impl)
        errors = [(dequantize(*rows[:2], (1, 128)).double() - act)[real].norm() for rows in (fused, unfused)]
        assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_infinity_stay_visible_and_stay_in_their_block(impl):
    h, _, _, plan = case()
    row = int((plan.slot_of >= 0).nonzero()[0])
    h[row, 3] = NAN
    h[row, 256 + 130] = float("inf")
    out = moe_swiglu_quant(h, plan, impl=impl)
    assert out.scale[row, 0].isnan() and not out.scale[row, 1].isfinite()
    assert out.scale[row + 1].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_agree_bit_for_bit(impl):
    h, grad, weights, plan = case()
    real = plan.slot_of >= 0
    first, second = (moe_swiglu_quant_backward(grad, h, plan, weights=weights, impl=impl) for _ in range(2))
    assert torch.equal(first.grad.values.view(torch.uint8)[real], second.grad.values.view(torch.uint8)[real])
    assert torch.equal(first.wide_grad[: used(plan)], second.wide_grad[: used(plan)])
    assert torch.equal(first.grad_weights, second.grad_weights)


def test_bad_input_is_named():
    h, grad, weights, plan = case()
    with pytest.raises(ValueError, match=r"moe_swiglu_quant: h must be bfloat16 or float32 \[R, 2I\] with I divisible"):
        moe_swiglu_quant(h[:, :300].contiguous(), plan)
    with pytest.raises(ValueError, match="moe_swiglu: the plan has 256 rows, but the tensor has 255"):
        moe_swiglu(h[1:].contiguous(), plan)
    with pytest.raises(ValueError, match=r"moe_swiglu: h must be contiguous \[R, 2I\], got shape \(256, 511\)"):
        moe_swiglu(h[:, 1:], plan)
    with pytest.raises(ValueError, match=r"weights must be contiguous \(37, 2\) as the plan's ids, got \(36, 2\)"):
        moe_swiglu(h, plan, weights[1:])
    with pytest.raises(ValueError, match=r"grad must be contiguous torch.float32 \(256, 256\) on cpu as h, got"):
        moe_swiglu_quant_backward(grad.bfloat16(), h, plan)
    small = moe_plan(torch.zeros(4, 1, dtype=torch.int32), 1, align=16)
    with pytest.raises(ValueError, match="moe_swiglu_quant: dual needs a plan with align=128, got align=16"):
        moe_swiglu_quant(torch.zeros(small.num_rows, 256), small, dual=True)


# ---- compiled for sm_90a ---------------------------------------------------------------------------------------

# Most registers a thread; blocks of so many threads that fit a multiprocessor by them follow.
REGISTERS = {"swiglu": 48, "quant": 48, "dual": 128, "transposed backward": 128}
REGISTERS |= {"backward": 96, "quant backward": 96, "wide quant backward": 144}
# 16-byte loads and stores of a thread: bf16 bytes read, and all bytes written.
WIDTHS = {"swiglu": (4, 2), "quant": (4, 1), "dual": (16, 8), "transposed backward": (6, 3)}
WIDTHS |= {"backward": (6, 6), "quant backward": (6, 2), "wide quant backward": (6, 8)}


@pytest.fixture(scope="module")
def compiled() -> dict[str, aot.Compiled]:
    return dict(zip(SWIGLU, aot.compile_triton(list(SWIGLU.values())), strict=True))


@pytest.mark.machine_code
def test_compiled_kernels_spill_nothing_and_move_16_bytes_at_a_time(compiled):
    for name, made in compiled.items():
        assert made.spill_free, name
        assert (made.count("LDG", "128"), made.count("STG", "128")) == WIDTHS[name], name
        assert made.registers <= REGISTERS[name], (name, made.registers)
        assert ".f64" not in made.ptx, name


@pytest.mark.machine_code
def test_no_division_has_a_slow_path_and_the_backward_pass_no_barrier(compiled):
    for name, made in compiled.items():
        assert made.count("FCHK") == made.count("CALL") == 0, name  # checks whether a division needs the slow path
    # Of a pass over 16 elements a thread; more than 50 an element would bound it below the copy rate of an H200.
    for name, most in (("backward", 36), ("quant backward", 42), ("wide quant backward", 52)):
        (loop,) = compiled[name].loops
        assert sum(loop.values()) <= 16 * most, (name, sum(loop.values()) / 16)
        assert compiled[name].count("BAR") == 0, name
