"""csrc/ executed on a CPU by the fibers of tests/csrc, against the references; once under the address sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cuda_on_cpu
import pytest
import torch

from r1kernels import RowPlan, cuda_lib, moe_plan
from r1kernels.fp8_cast import cuda_impl as cast_cuda
from r1kernels.fp8_cast import reference as cast_reference
from r1kernels.moe_combine import cuda_impl as combine_cuda
from r1kernels.moe_combine import reference as combine_reference
from r1kernels.moe_gate_topk import cuda_impl as gate_cuda
from r1kernels.moe_gate_topk import reference as gate_reference
from r1kernels.moe_permute_quant import cuda_impl as permute_cuda
from r1kernels.moe_permute_quant import reference as permute_reference
from r1kernels.moe_plan import cuda_impl as plan_cuda
from r1kernels.moe_plan import max_rows
from r1kernels.moe_plan import reference as plan_reference

INF, NAN = float("inf"), float("nan")
SANITIZED = os.environ.get("CUDA_ON_CPU_SANITIZED")  # a library, set by the last test for the pytest it starts
SHAPES = [(1, 1, 1), (37, 3, 7), (20, 4, 4), (66, 8, 40)]  # tokens, choices, experts
ROWS = [*((shape, 264) for shape in SHAPES), ((5, 2, 3), 8), ((5, 2, 3), 4104)]  # with the columns

pytestmark = [pytest.mark.skipif(not cuda_on_cpu.has_compiler(), reason="no g++ on PATH"), pytest.mark.rotating]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(SANITIZED) if SANITIZED else cuda_on_cpu.build(tmp_path_factory.mktemp("csrc"))


@pytest.fixture
def on_cpu(library: Path) -> Iterator[None]:
    with cuda_on_cpu.use(library):
        yield


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp(3 * torch.randn(*shape[:-1], 1, generator=generator))
    return x.to(dtype)


def routed(num_tokens: int, topk: int, num_experts: int, align: int = 128) -> tuple[RowPlan, torch.Tensor]:
    """A plan with some absent choices, and weights."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :topk].int()
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    plan = moe_plan(ids.contiguous(), num_experts, align=align, num_choices=int((ids >= 0).sum()))
    return plan, torch.rand(ids.shape, generator=generator)


# ---- fp8_cast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((5, 256), (1, 128)), ((3, 50, 384), (1, 128)), ((2, 130, 272), (128, 128)), ((200, 130), (128, 128))],
)
def test_fp8_cast_is_bitwise_the_reference(on_cpu, shape, block, dtype):
    x = random(*shape, dtype=dtype)
    x[..., 0, :128] = 0
    x[..., 1, 5], x[..., 2, 130 % shape[-1]] = NAN, -INF
    values, scale = cast_cuda.quantize(x, block)
    wanted_values, wanted_scale = cast_reference.quantize(x, block)
    torch.testing.assert_close(scale, wanted_scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values.float(), wanted_values.float(), rtol=0, atol=0, equal_nan=True)
    for out in (torch.bfloat16, torch.float32):
        back, wanted = (m.dequantize(wanted_values, wanted_scale, block, out) for m in (cast_cuda, cast_reference))
        torch.testing.assert_close(back, wanted, rtol=0, atol=0, equal_nan=True)


# ---- moe_plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize("shape", [(0, 8, 256), *SHAPES, (1100, 2, 1024), (130, 32, 33)])
def test_plan_is_the_reference(on_cpu, shape, align):
    num_tokens, topk, num_experts = shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, num_experts, (num_tokens, topk), generator=generator, dtype=torch.int32)
    ids = (ids.float() ** 1.5 / max(num_experts, 1) ** 0.5).nan_to_num(-1).int().clamp(max=num_experts - 1)
    for choices in (ids.numel(), int((ids >= 0).sum())):
        rows = max_rows(choices, num_experts, align)
        found, wanted = (m.plan(ids, num_experts, align, rows) for m in (plan_cuda, plan_reference))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---- moe_permute_quant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "hidden"), ROWS)
def test_permute_is_bitwise_the_reference(on_cpu, shape, hidden):
    plan, _ = routed(*shape, align=16)
    x = random(shape[0], hidden)
    used = plan.offsets[-1]
    assert torch.equal(permute_cuda.permute(x, plan)[:used], permute_reference.permute(x, plan)[:used])


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(
    ("shape", "hidden"), [*((shape, 640) for shape in SHAPES), ((5, 2, 3), 128), ((5, 2, 3), 4480)]
)
def test_permute_quant_is_bitwise_the_reference(on_cpu, shape, hidden, is_weighted):
    plan, weights = routed(*shape)
    x = random(shape[0], hidden)
    x[0, :128] = 0
    weights = weights if is_weighted else None
    found, wanted = (m.permute_quant(x, plan, weights, True) for m in (permute_cuda, permute_reference))
    real, used = plan.slot_of >= 0, plan.offsets[-1]
    assert torch.equal(bits(found[0])[real], bits(wanted[0])[real])
    assert torch.equal(found[1][real], wanted[1][real])
    assert found[1].stride() == (1, plan.num_rows)
    assert torch.equal(bits(found[2])[: used * hidden], bits(wanted[2])[: used * hidden])
    assert torch.equal(found[3][: used // 128], wanted[3][: used // 128])


@pytest.mark.parametrize("shape", SHAPES)
def test_permute_fp8_is_bitwise_the_reference(on_cpu, shape):
    plan, _ = routed(*shape)
    values, scale = cast_reference.quantize(random(shape[0], 640), (1, 128))
    found, wanted = (m.permute_fp8(values, scale, plan) for m in (permute_cuda, permute_reference))
    real = plan.slot_of >= 0
    assert torch.equal(bits(found[0])[real], bits(wanted[0])[real])
    assert torch.equal(found[1][real], wanted[1][real])


# ---- moe_combine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("shape", "hidden"), ROWS)
def test_combine_is_bitwise_the_reference(on_cpu, shape, hidden, is_weighted, has_residual):
    plan, weights = routed(*shape, align=16)
    rows = random(plan.num_rows, hidden)
    rows[plan.slot_of < 0] = NAN  # nobody may read padding
    residual = random(shape[0], hidden, seed=1) if has_residual else None
    args = (rows, plan, weights if is_weighted else None, residual)
    assert torch.equal(combine_cuda.combine(*args), combine_reference.combine(*args))


@pytest.mark.parametrize(("shape", "hidden"), ROWS)
def test_combine_backward(on_cpu, shape, hidden):
    plan, weights = routed(*shape, align=16)
    grad, rows = random(shape[0], hidden), random(plan.num_rows, hidden, seed=1)
    rows[plan.slot_of < 0] = NAN
    found, wanted = (m.combine_backward(grad, rows, plan, weights) for m in (combine_cuda, combine_reference))
    used = plan.offsets[-1]
    assert torch.equal(found[0][:used], wanted[0][:used])
    size = (grad.float().norm(dim=1, keepdim=True) * rows.float().nan_to_num().norm(dim=1).max()).clamp(min=1)
    assert ((found[1] - wanted[1]).abs() <= 1e-6 * size).all()
    assert combine_cuda.combine_backward(grad, None, plan, None)[1] is None


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_combine_backward(on_cpu, shape, dual):
    plan, weights = routed(*shape)
    grad, rows = random(shape[0], 640), random(plan.num_rows, 640, seed=1)
    rows[plan.slot_of < 0] = NAN
    found, wanted = (
        m.combine_backward_quant(grad, rows, plan, weights, dual) for m in (combine_cuda, combine_reference)
    )
    real = plan.slot_of >= 0
    assert torch.equal(bits(found[0][0])[real], bits(wanted[0][0])[real])
    assert torch.equal(found[0][1][real], wanted[0][1][real])
    size = (grad.float().norm(dim=1, keepdim=True) * rows.float().nan_to_num().norm(dim=1).max()).clamp(min=1)
    assert ((found[1] - wanted[1]).abs() <= 1e-6 * size).all()


# ---- moe_gate_topk ---------------------------------------------------------------------------------------------

GATES = [  # experts, topk, groups, chosen groups
    (256, 8, 8, 4),
    (256, 8, 1, 1),
    (1, 1, 1, 1),
    (8, 8, 1, 1),
    (64, 6, 32, 11),
    (12, 3, 3, 2),
    (6, 2, 6, 3),
    (200, 32, 5, 3),
    (512, 5, 2, 1),
    (1024, 8, 16, 4),
]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_its_gradient(on_cpu, shape, score, dtype):
    num_experts, topk, n_group, topk_group = shape
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(21, num_experts, generator=generator)).to(dtype)
    bias = 0.3 * torch.randn(num_experts, generator=generator)
    borders = torch.tensor([0, 4, 4, 19], dtype=torch.int32)  # an empty sequence, and tokens after the last
    replay = torch.full((21, topk), -1, dtype=torch.int32)
    replay[::4] = torch.rand(6, num_experts, generator=generator).argsort(1)[:, :topk].int()
    for norm, replay_ids, cu_seqlens in [(True, None, None), (False, None, borders), (True, replay, borders)]:
        out = []
        for module in (gate_cuda, gate_reference):
            x = logits.clone().requires_grad_()
            got = module.gate(x, bias, topk, n_group, topk_group, score, norm, 2.5, replay_ids, cu_seqlens)
            loss = (got[1] * torch.linspace(-1, 2, topk)).sum()
            if cu_seqlens is not None:
                loss = loss + (got[4] * torch.linspace(-3, 1, num_experts)).sum()
            loss.backward()
            out.append((*got, x.grad))
        found, wanted = out
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[2], wanted[2])
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[5], wanted[5], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
        if cu_seqlens is not None:
            assert torch.equal(found[3], wanted[3])
            torch.testing.assert_close(found[4], wanted[4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_group", [8, 1, 6])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_gate_takes_any_logits(on_cpu, bad, n_group):
    num_experts = 96 if n_group == 6 else 256
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, num_experts, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < torch.linspace(0, 1, 24)[:, None]] = bad
    logits[3] = 0  # ties
    args = (logits, torch.zeros(num_experts), 8, n_group, max(1, n_group // 2), "sigmoid", True, 1.0, None, None)
    found, wanted = gate_cuda.gate(*args), gate_reference.gate(*args)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-6, equal_nan=True)


# ---- races -----------------------------------------------------------------------------------------------------


def test_the_order_of_threads_and_blocks_does_not_matter(library):
    # A missing barrier shows when its threads run the other way round.
    plan, weights = routed(66, 8, 40)
    x, rows, tall = random(66, 640), random(plan.num_rows, 640, seed=1), random(200, 130)
    logits, borders = random(20, 96, dtype=torch.float32).requires_grad_(), torch.tensor([0, 9, 20], dtype=torch.int32)

    def everything() -> list[torch.Tensor]:
        ids = (plan.row_of % 40).contiguous()
        gate = gate_cuda.gate(logits, None, 8, 6, 3, "sigmoid", True, 1.0, None, borders)
        (grad,) = torch.autograd.grad(gate[1].square().sum() + gate[4].square().sum(), logits)
        out = [
            *cast_cuda.quantize(tall, (128, 128)),
            *plan_cuda.plan(ids, 40, 128, max_rows(528, 40, 128)),
            *gate,
            grad,
        ]
        (values, _, values_t, scale_t), dots = combine_cuda.combine_backward_quant(x, rows, plan, weights, True)
        used = int(plan.offsets[-1])
        out += [values[plan.slot_of >= 0], values_t[: used * 640], scale_t[: used // 128], dots]
        codes, scale = cast_cuda.quantize(x, (1, 128))
        out += [permute_cuda.permute_fp8(codes, scale, plan)[0][plan.slot_of >= 0]]
        out += [permute_cuda.permute(x, plan)[:used], combine_cuda.combine_backward(x, rows, plan, weights)[1]]
        out += [cast_cuda.dequantize(codes, scale, (1, 128), torch.bfloat16)]
        return [*out, combine_cuda.combine(rows, plan, weights, x)]

    found = {}
    for order in cuda_on_cpu.ORDERS:
        with cuda_on_cpu.use(library, order):
            found[order] = everything()
    for order in ("backward", "shuffled"):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found[order], found["forward"], strict=True))


# ---- no waiting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cuda", "reference"])
def test_nothing_reads_a_number_from_the_device(on_cpu, monkeypatch, impl):
    # On a GPU each of these would wait for the device. The references run there too, where no library is installed.
    modules = {
        "cuda": (cast_cuda, plan_cuda, permute_cuda, combine_cuda, gate_cuda),
        "reference": (cast_reference, plan_reference, permute_reference, combine_reference, gate_reference),
    }
    cast, planner, permutation, combination, gate = modules[impl]
    plan, weights = routed(20, 4, 4)
    ids, real = plan.row_of % 4, plan.slot_of >= 0
    x, rows = random(20, 256), random(plan.num_rows, 256)
    logits, borders = random(20, 64, dtype=torch.float32), torch.tensor([0, 20], dtype=torch.int32)

    def refuse(*args: object, **kwargs: object) -> object:
        raise AssertionError("reads a number from the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with pytest.raises(AssertionError):
        bool(real[0])
    cast.dequantize(*cast.quantize(x, (1, 128)), (1, 128))
    cast.quantize(x, (128, 128))
    planner.plan(ids.contiguous(), 4, 128, 512)
    permutation.permute(x, plan)
    permutation.permute_quant(x, plan, weights, True)
    combination.combine(rows, plan, weights, x)
    combination.combine_backward(x, rows, plan, weights)
    combination.combine_backward_quant(x, rows, plan, weights, True)
    gate.gate(logits, None, 8, 8, 4, "sigmoid", True, 2.5, None, borders)


# ---- the harness itself ----------------------------------------------------------------------------------------


def test_a_refused_launch_is_reported(library):
    with cuda_on_cpu.use(library):
        empty = torch.empty(0, 128)
        with pytest.raises(RuntimeError, match="r1_fp8_quantize_f32: CUDA error 9: invalid configuration argument"):
            cuda_lib.launch("r1_fp8_quantize_f32", empty, empty, empty, 1, 0, 128, 1)


def test_a_view_that_vectors_cannot_read_is_refused(library):
    values, scale = torch.empty(1, 128), torch.empty(1, 1)
    shifted = torch.empty(132)[1:129].view(1, 128)
    with cuda_on_cpu.use(library), pytest.raises(ValueError, match=r"\(1, 128\) begins 4 bytes past a multiple of 16"):
        cuda_lib.launch("r1_fp8_quantize_f32", shifted, values, scale, 1, 1, 128, 1)


def test_rows_that_are_no_whole_vectors_may_begin_anywhere(on_cpu):
    """A part of tokens with six choices each, or scores of six experts: 24 bytes a row."""
    plan, weights = routed(8, 6, 8, align=16)
    rows, grad = random(plan.num_rows, 16), random(8, 16)
    logits = random(9, 6, dtype=torch.float32)
    shifted, part = torch.empty(9, 6)[1:].copy_(weights), logits[1:]
    assert shifted.data_ptr() % 16 == part.data_ptr() % 16 == 8
    assert torch.equal(combine_cuda.combine(rows, plan, shifted, None), combine_cuda.combine(rows, plan, weights, None))
    (found, to_shifted), (wanted, to_weights) = (
        combine_cuda.combine_backward(grad, rows, plan, x) for x in (shifted, weights)
    )
    used = int(plan.offsets[-1])
    assert torch.equal(found[:used], wanted[:used]) and torch.equal(to_shifted, to_weights)
    for x in (torch.empty(781)[1:].view(130, 6), torch.empty(782)[2:].view(130, 6)):
        x.normal_()
        for found, wanted in zip(
            cast_cuda.quantize(x, (128, 128)), cast_cuda.quantize(x.clone(), (128, 128)), strict=True
        ):
            assert torch.equal(bits(found), bits(wanted))
    options = (2, 1, 1, "sigmoid", True, 1.0, None, None)
    for found, wanted in zip(
        gate_cuda.gate(part, None, *options)[:3], gate_cuda.gate(part.clone(), None, *options)[:3], strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED is not None, reason="this is what the sanitized run is started by")
def test_the_address_sanitizer_finds_nothing(tmp_path):
    preload = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(preload).is_absolute():
        pytest.skip("g++ has no libasan")
    library = cuda_on_cpu.build(tmp_path, *cuda_on_cpu.SANITIZE)
    env = os.environ | {"CUDA_ON_CPU_SANITIZED": str(library), "LD_PRELOAD": preload}
    env["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's own
    # Every launcher once, and tensors that end inside a block of threads.
    tests = "order_of_threads or plan_is_the_reference or fp8_cast or combine_backward or begin_anywhere"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
