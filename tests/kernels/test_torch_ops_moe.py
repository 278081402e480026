"""The ops of the experts in graphs: registered as PyTorch wants it (opcheck), and equal to eager mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from graph_steps import CountingCompiler, Tensors, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode

from r1kernels import (
    fp8_quantize,
    moe_balance_loss,
    moe_combine,
    moe_combine_backward_quant,
    moe_experts,
    moe_gate_topk,
    moe_grouped_gemm,
    moe_grouped_gemm_fp8,
    moe_grouped_wgrad_fp8,
    moe_permute,
    moe_permute_fp8,
    moe_permute_quant,
    moe_plan,
    moe_swiglu,
    moe_swiglu_quant,
    moe_swiglu_quant_backward,
    moe_update_bias,
)
from r1kernels.moe_experts.reference import experts_reference
from r1kernels.moe_plan.torch_op import plan_of, tensors_of

EXPERTS, TOPK = 4, 2
NAMES = ("x", "router", "gate_up", "down")


def tensors(length: int, hidden: int = 16, dtype: torch.dtype = torch.float32) -> Tensors:
    draw = torch.Generator().manual_seed(length)
    shapes = {"x": (length, hidden), "router": (EXPERTS, hidden), "residual": (length, hidden)}
    shapes |= {"gate_up": (EXPERTS, 2 * hidden, hidden), "down": (EXPERTS, hidden, hidden), "to": (length, hidden)}
    made = {name: torch.randn(shape, generator=draw, dtype=dtype) / 4 for name, shape in shapes.items()}
    made["cu_seqlens"] = torch.tensor([0, length // 2, length], dtype=torch.int32)
    return made | {"bias": 0.1 * torch.randn(EXPERTS, generator=draw)}


def routed(x: Tensors):
    logits = x["x"] @ x["router"].t()
    return moe_gate_topk(logits, x["bias"], topk=TOPK, n_group=2, topk_group=1, cu_seqlens=x["cu_seqlens"], scale=2)


def op_by_op(x: Tensors) -> torch.Tensor:
    gate = routed(x)
    plan = moe_plan(gate.ids, EXPERTS, align=16)
    h = moe_grouped_gemm(moe_permute(x["x"], plan), x["gate_up"], plan)
    rows = moe_grouped_gemm(moe_swiglu(h, plan), x["down"], plan)
    out = moe_combine(rows, plan, gate.weights, residual=x["residual"])
    bias = moe_update_bias(x["bias"], gate.counts, 0.1)
    return (out * x["to"]).sum() + moe_balance_loss(gate, x["cu_seqlens"]).sum() + bias.sum()


def weights_before_down(x: Tensors) -> torch.Tensor:
    gate = routed(x)
    plan = moe_plan(gate.ids, EXPERTS, align=16)
    h = moe_grouped_gemm(moe_permute(x["x"], plan), x["gate_up"], plan)
    rows = moe_grouped_gemm(moe_swiglu(h, plan, gate.weights), x["down"], plan)
    return (moe_combine(rows, plan) * x["to"]).sum()


def one_op(x: Tensors) -> torch.Tensor:
    gate = routed(x)
    out = moe_experts(x["x"], gate.ids, gate.weights, x["gate_up"], x["down"], residual=x["residual"])
    return (out * x["to"]).sum()


def one_op_fp8(x: Tensors) -> torch.Tensor:
    gate = routed(x)
    return (moe_experts(x["x"], gate.ids, gate.weights, x["gate_up"], x["down"], precision="fp8") * x["to"]).sum()


def fp8_op_by_op(x: Tensors) -> torch.Tensor:
    """Forward and backward of the FP8 path as a trainer of its own would write it; a number from everything made."""
    gate, gate_up = routed(x), fp8_quantize(x["gate_up"], block=(128, 128))
    plan, tokens = moe_plan(gate.ids, EXPERTS), fp8_quantize(x["x"], block=(1, 128))
    weights = gate.weights.detach()
    h = moe_grouped_gemm_fp8(moe_permute_fp8(*tokens, plan), gate_up, plan)
    act = moe_swiglu_quant(h, plan, weights=weights, dual=True)
    rows = moe_grouped_gemm_fp8(act, fp8_quantize(x["down"], block=(128, 128)), plan)
    quantized, to_weights = moe_combine_backward_quant(x["to"].bfloat16(), rows, plan, weights, dual=True)
    grad_act = moe_grouped_gemm_fp8(quantized, fp8_quantize(x["down"].mT.contiguous(), block=(128, 128)), plan)
    wide = moe_swiglu_quant_backward(grad_act, h, plan, weights=weights)
    dual = moe_swiglu_quant_backward(grad_act, h, plan, weights=weights, dual=True)
    rows_t = moe_permute_quant(x["x"].detach(), plan, dual=True).transposed
    wgrad = moe_grouped_wgrad_fp8(dual.grad.transposed, rows_t, plan)
    wgrad = moe_grouped_wgrad_fp8(dual.grad.transposed, rows_t, plan, out=wgrad)
    found = (to_weights, wide.wide_grad, wide.wide_act, wide.grad_weights, wgrad)
    return torch.stack([y.float().sum() for y in found]).sum() + gate.weights.sum() * 0


LAYERS: dict[str, tuple[Callable[[Tensors], torch.Tensor], int, tuple[str, ...]]] = {
    "op by op": (op_by_op, 16, NAMES),
    "weights before the down projection": (weights_before_down, 16, NAMES),
    "one op": (one_op, 16, (*NAMES, "residual")),
    "one op, FP8": (one_op_fp8, 128, NAMES),
    "FP8, op by op": (fp8_op_by_op, 128, ("router",)),
}


QUICK = "op by op"
ALL = [name if name == QUICK else pytest.param(name, marks=pytest.mark.rotating) for name in LAYERS]


@pytest.mark.parametrize("name", ALL)
def test_a_compiled_layer_is_the_eager_one_for_every_length(name):
    step, hidden, names = LAYERS[name]
    compiler = CountingCompiler()
    compiled = compiler(step, dynamic=True)
    for length in (9, 22):
        x = tensors(length, hidden)
        found, wanted = (value_and_grads(run, x, names) for run in (compiled, step))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), length
        assert wanted[0] != 0
    assert compiler.graphs == 1


def test_the_ops_of_a_layer_differentiate_to_the_gradients_of_every_expert_in_turn():
    x = tensors(9, dtype=torch.float64)

    def wanted(x: Tensors) -> torch.Tensor:
        gate = routed(x)
        return (experts_reference(x["x"], gate.ids, gate.weights, x["gate_up"], x["down"]) * x["to"]).sum()

    x["residual"].zero_()
    right = value_and_grads(wanted, x, NAMES)
    for step in (weights_before_down, one_op):
        for a, b in zip(value_and_grads(step, x, NAMES), right, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LAYERS)
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(name):
    step, hidden, names = LAYERS[name]
    x = tensors(9, hidden)
    wanted = value_and_grads(step, x, names)
    found = value_and_grads(step, {key: value.to("meta") for key, value in x.items()}, names)
    assert [(y.shape, y.dtype, y.device.type) for y in found] == [(y.shape, y.dtype, "meta") for y in wanted]
    with FakeTensorMode() as mode:
        found = value_and_grads(step, {key: mode.from_tensor(value) for key, value in x.items()}, names)
    assert [(y.shape, y.dtype, y.stride()) for y in found] == [(y.shape, y.dtype, y.stride()) for y in wanted]


@pytest.mark.rotating
def test_a_saved_program_runs_in_a_process_that_has_only_imported_the_package(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, x: Tensors) -> torch.Tensor:
            return op_by_op(x) + one_op(x)

    x = tensors(12)
    torch.export.save(torch.export.export(Layer(), (x,)), tmp_path / "layer.pt2")
    torch.save((x, Layer()(x)), tmp_path / "x.pt")
    code = (
        "import sys, torch, r1kernels\n"
        "x, wanted = torch.load(sys.argv[2])\n"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(x), wanted)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "layer.pt2", tmp_path / "x.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_values_are_checked_when_the_graph_runs():
    compiled = torch.compile(lambda ids: moe_plan(ids, 4).offsets, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([[3]], dtype=torch.int32))[-1] == 128
    with pytest.raises(ValueError, match=r"moe_plan: ids must be in \[0, 4\) or -1, got 4 \.\. 4"):
        compiled(torch.tensor([[4]], dtype=torch.int32))


def test_vmap_complex_numbers_and_other_devices_are_refused():
    plan = moe_plan(torch.tensor([[0], [1]], dtype=torch.int32), 2, align=1)
    weight, bias = torch.zeros(2, 4, 4), torch.zeros(4)
    calls = {
        "moe_gate_topk: logits": lambda x: moe_gate_topk(x, bias, topk=1, n_group=1, topk_group=1),
        "moe_permute: x": lambda x: moe_permute(x, plan),
        "moe_grouped_gemm: rows": lambda x: moe_grouped_gemm(x, weight, plan),
        "moe_swiglu: h": lambda x: moe_swiglu(x, plan),
        "moe_combine: rows": lambda x: moe_combine(x, plan),
    }
    x = torch.zeros(2, 4)
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} must be floating point, got torch.complex64"):
            call(x.to(torch.complex64))
        with pytest.raises(RuntimeError, match=f"{name} was found inside torch.vmap; required the whole batch"):
            torch.vmap(call)(x.expand(3, 2, 4))
        with pytest.raises(ValueError, match="on meta"):
            call(x.to("meta"))


# ---- opcheck ----------------------------------------------------------------------------------------------------


def _arguments() -> dict[str, tuple]:
    x = tensors(6, 128)
    # Every expert has rows: those after the last expert hold anything, and opcheck compares all.
    ids = torch.tensor([[0, 2], [3, -1], [2, 0], [-1, -1], [0, 1], [3, 2]], dtype=torch.int32)
    plan = tensors_of(moe_plan(ids, EXPERTS))
    given, few = plan_of(plan, 128), tensors_of(moe_plan(ids, EXPERTS, align=16))
    weights = torch.rand(6, TOPK)
    draw = torch.Generator().manual_seed(0)
    rows, h = (torch.randn(given.num_rows, n, generator=draw) for n in (128, 256))
    grown = {name: y.clone().requires_grad_() for name, y in (x | {"rows": rows, "h": h, "weights": weights}).items()
             if y.is_floating_point()}  # fmt: skip
    fp8, weight = moe_permute_quant(x["x"], given, dual=True), fp8_quantize(x["gate_up"], block=(128, 128))
    tokens = fp8_quantize(x["x"], block=(1, 128))
    logits = (x["x"] @ x["router"].t()).requires_grad_()
    gate = logits, x["bias"], TOPK, 2, 1, "sigmoid", True, 2.5, None
    experts = grown["x"], ids, grown["weights"], grown["gate_up"], grown["down"], grown["residual"]
    backward = x["to"], x["x"], weights, x["gate_up"], x["down"]
    own = plan, 128
    return {
        "moe_plan": (ids, EXPERTS, 16, None, None),
        "moe_plan of known choices": (ids, EXPERTS, 16, int((ids >= 0).sum()), None),
        "moe_gate_topk": (*gate, x["cu_seqlens"], "reference"),
        "moe_gate_topk without sums": (*gate, None, None),
        "moe_gate_topk_backward": (
            *(weights, torch.rand(2, EXPERTS), logits.detach(), ids.clamp(min=0), x["cu_seqlens"]),
            *("softmax", True, 2.5, None),
        ),
        "moe_permute": (grown["x"], *own, None),
        "moe_permute_quant": (x["x"], weights, *own, True, "reference"),
        "moe_permute_quant without dual": (x["x"], None, *own, False, None),
        "moe_permute_fp8": (*tokens, *own, None),
        "moe_swiglu": (grown["h"], grown["weights"], *own, "reference"),
        "moe_swiglu_backward": (rows, h, None, *own, "reference"),
        "moe_swiglu_quant": (h, weights, *own, True, "reference"),
        "moe_swiglu_quant_backward": (rows, h, weights, *own, True, "reference"),
        "moe_swiglu_quant_backward without dual": (rows, h, None, *own, False, "reference"),
        "moe_combine": (grown["rows"], grown["weights"], grown["residual"], *own, None),
        "moe_combine without weights": (grown["rows"], None, None, *own, None),
        "moe_combine_backward": (x["to"], rows, weights, *own, None),
        "moe_combine_backward_quant": (x["to"], rows, weights, *own, True, None),
        "moe_grouped_gemm": (grown["rows"], grown["gate_up"], *own),
        "moe_grouped_wgrad": (moe_permute(x["to"], given), moe_permute(x["x"], given), *own),
        "moe_grouped_gemm_fp8": (*fp8[:2], *weight, *own, None),
        "moe_grouped_wgrad_fp8": (*fp8.transposed, *fp8.transposed, *own, None, None),
        "moe_experts": (*experts, "same"),
        "moe_experts in FP8": (*experts, "fp8_wgrad"),
        "moe_experts_backward": (*backward, h[: few[1].shape[0]].contiguous(), few, "same", True),
        "moe_experts_backward in FP8": (*backward, h.bfloat16(), plan, "fp8", False),
    }


OFTEN = ("moe_gate_topk", "moe_permute")


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.rotating) for n in _arguments()]
)
def test_opcheck(name):
    op, arguments = getattr(torch.ops.r1kernels, name.partition(" ")[0]).default, _arguments()[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = torch.utils._pytree.tree_leaves(arguments)
    if any(isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn for x in given):
        tests = tests[1:]  # test_schema compares its inputs, and PyTorch does not compare FP8
    torch.library.opcheck(op, arguments, test_utils=tests)
