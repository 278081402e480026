"""Grouped products against a loop in float64; FP8 against the dequantized operands; what DeepGEMM is called with."""

from __future__ import annotations

import contextlib
import sys
import types

import pytest
import torch

from r1kernels import (
    Fp8,
    dispatch,
    fp8_dequantize,
    fp8_quantize,
    moe_grouped_gemm,
    moe_grouped_gemm_fp8,
    moe_grouped_wgrad,
    moe_grouped_wgrad_fp8,
    moe_permute,
    moe_permute_quant,
    moe_plan,
)
from r1kernels.fp8_cast.reference import dequantize

TOKENS, CHOICES, EXPERTS, K, N = 60, 2, 4, 256, 128


def case(num_tokens: int = TOKENS, align: int = 128, dtype: torch.dtype = torch.float32):
    """(x [T, K], grad [T, N], weight [E, N, K], plan); expert 2 has no rows."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, 3, generator=generator).argsort(1)[:, :CHOICES].int()
    ids = torch.where(ids == 2, 3, ids).contiguous()
    x, grad = (torch.randn(num_tokens, n, generator=generator) for n in (K, N))
    weight = torch.randn(EXPERTS, N, K, generator=generator)
    return x.to(dtype), grad.to(dtype), weight.to(dtype), moe_plan(ids, EXPERTS, align=align)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "align"), [(0, 16), (1, 128), (60, 16), (60, 128)])
def test_each_row_meets_its_experts_weights(dtype, num_tokens, align):
    x, grad, weight, plan = case(num_tokens, align, dtype)
    rows, grad_rows = moe_permute(x, plan), moe_permute(grad, plan)
    out, back = moe_grouped_gemm(rows, weight, plan), moe_grouped_gemm(grad_rows, weight.mT, plan)
    wgrad = moe_grouped_wgrad(grad_rows, rows, plan)
    wanted = torch.zeros_like(weight, dtype=torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    for row in (plan.slot_of >= 0).nonzero()[:, 0].tolist():
        e, t = int(plan.expert_of[row]), int(plan.token_of[row])
        for found, exact in (
            (out[row], weight[e].double() @ x[t].double()),
            (back[row], weight[e].double().t() @ grad[t].double()),
        ):
            torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max())
        wanted[e] += torch.outer(grad[t].double(), x[t].double())
    torch.testing.assert_close(wgrad.double(), wanted, rtol=tolerance, atol=tolerance * 50)
    assert not wgrad[2].any()  # nobody chose expert 2


def test_fp8_product_is_that_of_the_dequantized_operands():
    x, _, weight, plan = case(dtype=torch.bfloat16)
    rows, quantized = moe_permute_quant(x, plan), fp8_quantize(weight, block=(128, 128))
    out = moe_grouped_gemm_fp8(rows, quantized, plan)
    assert out.dtype == torch.bfloat16
    wide_rows = dequantize(rows.values, rows.scale, (1, 128)).double()
    wide_weight = fp8_dequantize(*quantized, block=(128, 128), dtype=torch.float32).double()
    for row in (plan.slot_of >= 0).nonzero()[:, 0].tolist():
        exact = wide_weight[int(plan.expert_of[row])] @ wide_rows[row]
        torch.testing.assert_close(out[row].double(), exact, rtol=2**-8, atol=1e-3)


def test_fp8_weight_gradient_is_added_in_float32():
    x, grad, _, plan = case(dtype=torch.bfloat16)
    rows, grad_rows = moe_permute_quant(x, plan, dual=True), moe_permute_quant(grad, plan, dual=True)
    start = torch.randn(EXPERTS, N, K)
    out = moe_grouped_wgrad_fp8(grad_rows[2:], rows[2:], plan, out=start.clone())
    alone = moe_grouped_wgrad_fp8(grad_rows[2:], rows[2:], plan)
    torch.testing.assert_close(out, start + alone)
    exact = moe_grouped_wgrad(moe_permute(grad.double(), plan), moe_permute(x.double(), plan), plan)
    assert (alone - exact).norm() <= 0.05 * exact.norm()  # two operands of 3 mantissa bits
    assert torch.equal(out[2], start[2])


# ---- DeepGEMM, whose kernels need a GPU: a fake at the edge that requires what its C++ checks require ---------------


def fake_deep_gemm() -> types.ModuleType:
    """Its two grouped functions for sm_90, in float32 on a CPU; the asserts are those of its csrc/apis/gemm.hpp."""
    module = types.ModuleType("deep_gemm")

    def is_tma_aligned(scale: torch.Tensor) -> bool:
        return scale.stride(-2) == 1 and scale.stride(-1) == -(-scale.shape[-2] // 4) * 4

    def m_grouped(a, b, d, grouped_layout):
        (values, scale), (weight, weight_scale) = a, b
        assert values.is_contiguous() and weight.is_contiguous() and d.is_contiguous() and d.dtype == torch.bfloat16
        assert grouped_layout.dtype == torch.int32 and grouped_layout.shape == values.shape[:1]
        assert scale.shape == (values.shape[0], values.shape[1] // 128) and is_tma_aligned(scale)
        assert weight_scale.shape == (weight.shape[0], weight.shape[1] // 128, weight.shape[2] // 128)
        assert weight_scale.is_contiguous()
        for block in range(0, len(values), 128):  # the kernel looks at the first row of a block only
            expert = int(grouped_layout[block])
            if expert >= 0:
                at = slice(block, block + 128)
                wide = dequantize(weight[expert], weight_scale[expert], (128, 128))
                d[at] = (dequantize(values[at], scale[at], (1, 128)) @ wide.t()).bfloat16()

    def k_grouped(a, b, d, ks_cpu, ks, c):
        assert c is d and d.dtype == torch.float32 and d.is_contiguous()
        assert isinstance(ks_cpu, list) and ks.dtype == torch.int32 and ks.is_contiguous() and ks.tolist() == ks_cpu
        assert all(k % 128 == 0 for k in ks_cpu)
        for (values, scale), width in ((a, d.shape[1]), (b, d.shape[2])):
            assert values.is_contiguous() and values.numel() == sum(ks_cpu) * width
            assert scale.shape == (width, sum(ks_cpu) // 128) and is_tma_aligned(scale)
        start = 0
        for expert, k in enumerate(ks_cpu):
            blocks = slice(start // 128, (start + k) // 128)
            wide = [
                dequantize(v[start * w : (start + k) * w].view(w, k), s[:, blocks], (1, 128))
                for (v, s), w in ((a, d.shape[1]), (b, d.shape[2]))
            ]
            d[expert] += wide[0] @ wide[1].t()
            start += k

    module.m_grouped_fp8_gemm_nt_contiguous = m_grouped
    module.k_grouped_fp8_gemm_nt_contiguous = k_grouped
    return module


def test_deep_gemm_gets_the_layouts_that_it_requires(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm())
    monkeypatch.delitem(sys.modules, "r1kernels.moe_grouped_gemm.deep_gemm_impl", raising=False)
    from r1kernels.moe_grouped_gemm import deep_gemm_impl

    devices: list[torch.Tensor] = []  # of the tensors, made the current one for the call
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: devices.append(x) or contextlib.nullcontext())
    x, grad, weight, plan = case(dtype=torch.bfloat16)
    rows, grad_rows = moe_permute_quant(x, plan, dual=True), moe_permute_quant(grad, plan, dual=True)
    quantized = fp8_quantize(weight, block=(128, 128))
    real = plan.slot_of >= 0
    out = deep_gemm_impl.gemm_fp8(rows, quantized, plan)
    torch.testing.assert_close(out[real], moe_grouped_gemm_fp8(rows, quantized, plan)[real], rtol=2**-7, atol=1e-3)
    wanted = moe_grouped_wgrad_fp8(grad_rows[2:], rows[2:], plan)
    for sizes in (None, plan.offsets.diff().tolist()):
        found = deep_gemm_impl.wgrad_fp8(grad_rows[2:], rows[2:], plan, torch.zeros_like(wanted), sizes)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    assert len(devices) == 3
    odd = torch.empty(quantized.values.numel() + 1, dtype=quantized.values.dtype)[1:].view(quantized.values.shape)
    with pytest.raises(ValueError, match=r"moe_grouped_gemm_fp8: a tensor of .* begins 1 bytes past a multiple of 16"):
        deep_gemm_impl.gemm_fp8(rows, Fp8(odd, quantized.scale), plan)
    odd = torch.empty(wanted.numel() + 1)[1:].view(wanted.shape)
    with pytest.raises(ValueError, match=r"moe_grouped_wgrad_fp8: a tensor of .* begins 4 bytes past a multiple of 16"):
        deep_gemm_impl.wgrad_fp8(grad_rows[2:], rows[2:], plan, odd, None)
    monkeypatch.delitem(sys.modules, "r1kernels.moe_grouped_gemm.deep_gemm_impl")


def test_bad_input_is_named():
    x, grad, weight, plan = case(dtype=torch.bfloat16)
    rows, quantized = moe_permute(x, plan), fp8_quantize(weight, block=(128, 128))
    fp8 = moe_permute_quant(x, plan, dual=True)
    with pytest.raises(ValueError, match=r"moe_grouped_gemm: weight must be torch.bfloat16 as rows, got torch.float32"):
        moe_grouped_gemm(rows, weight.float(), plan)
    with pytest.raises(ValueError, match=r"weight must be \[E, N, K\] with E=4 as the plan and K=256 as the rows, got"):
        moe_grouped_gemm(rows, weight[1:], plan)
    with pytest.raises(ValueError, match=r"moe_grouped_gemm: the plan has .* rows, but the tensor has"):
        moe_grouped_gemm(rows[128:].contiguous(), weight, plan)
    with pytest.raises(ValueError, match=r"moe_grouped_gemm_fp8: weight must be float8_e4m3fn with float32 scales"):
        moe_grouped_gemm_fp8(fp8, Fp8(quantized.values, quantized.scale[:, :, :1]), plan)
    unaligned = moe_plan(torch.zeros(1, 1, dtype=torch.int32), EXPERTS, align=16)
    row = moe_permute_quant(x[:1], unaligned)
    with pytest.raises(ValueError, match="a plan with align=128 is required, got align=16"):
        moe_grouped_gemm_fp8(row, quantized, unaligned)
    with pytest.raises(ValueError, match=r"moe_grouped_wgrad_fp8: out must be contiguous float32 \(4, 256, 256\), got"):
        moe_grouped_wgrad_fp8(fp8[2:], fp8[2:], plan, out=torch.zeros(4, 256, 128))
    with pytest.raises(ValueError, match=r"moe_grouped_wgrad: rows must be contiguous torch.float32"):
        moe_grouped_wgrad(moe_permute(grad.float(), plan), rows, plan)
    with pytest.raises(RuntimeError, match="impl='deep_gemm' needs a cuda tensor, got one on cpu"):
        moe_grouped_gemm_fp8(fp8, quantized, plan, impl="deep_gemm")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('undefined symbol: _ZN3c104cuda')", "OSError: undefined symbol: _ZN3c104cuda"),
        ("def m_grouped_fp8_gemm_nt_contiguous(): pass", "with k_grouped_fp8_gemm_nt_contiguous"),
    ],
)
def test_a_deep_gemm_that_cannot_be_used_is_not_chosen_and_says_why(tmp_path, monkeypatch, caplog, source, message):
    (tmp_path / "deep_gemm.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    dispatch.deep_gemm_problem.cache_clear()
    try:
        found = dispatch.why_not("deep_gemm", "cuda")
    finally:
        dispatch.deep_gemm_problem.cache_clear()
        sys.modules.pop("deep_gemm", None)
    assert found is not None and message in found and f"pip install {dispatch.DEEP_GEMM}" in found
    assert "OSError" not in message or message in caplog.text
