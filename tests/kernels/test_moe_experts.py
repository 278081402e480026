"""The routed experts against DeepSeek-V3's equations in plain Python, transformers' block, and the unfused FP8 path."""

from __future__ import annotations

import math
import random
import sys

import pytest
import torch

from r1kernels import fp8_dequantize, fp8_quantize, moe_experts, moe_gate_topk, moe_plan
from r1kernels.moe_experts.layer import alignment, experts_backward, experts_forward
from r1kernels.moe_experts.reference import experts_reference

NAMES = ("x", "weights", "gate_up", "down", "residual")
PRECISIONS = ["same", "fp8", "fp8_wgrad"]


# ---- eq. 12 to 16 of DeepSeek-V3, one token and one number at a time ------------------------------------------


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def expert(x: list[float], gate_up: list[list[float]], down: list[list[float]]) -> list[float]:
    inner = len(gate_up) // 2
    act = []
    for g, u in zip(gate_up[:inner], gate_up[inner:], strict=True):
        gate = dot(g, x)
        act.append(gate / (1 + math.exp(-gate)) * dot(u, x))
    return [dot(row, act) for row in down]


def route(logits: list[float], bias: list[float], groups: int, best_groups: int, topk: int, scale: float):
    """expert -> weight of one token."""
    score = [1 / (1 + math.exp(-v)) for v in logits]
    biased = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(score) // groups
    of_group = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    allowed = sorted(range(groups), key=lambda g: -of_group[g])[:best_groups]
    inside = [e for e in range(len(score)) if e // size in allowed]
    chosen = sorted(inside, key=lambda e: -biased[e])[:topk]
    total = sum(score[e] for e in chosen)
    return {e: scale * score[e] / total for e in chosen}


def layer(x, router, bias, gate_up, down, **sizes: float) -> list[list[float]]:
    """x [T][H] through router [E][H], experts gate_up [E][2I][H], down [E][H][I]."""
    out = []
    for token in x:
        weights = route([dot(row, token) for row in router], bias, **sizes)
        parts = {e: expert(token, gate_up[e], down[e]) for e in weights}
        out.append([sum(weights[e] * parts[e][i] for e in weights) for i in range(len(token))])
    return out


def test_values_and_gradients_match_the_equations():
    draw, generator = random.Random(1), torch.Generator().manual_seed(1)
    tokens, hidden, inner, experts = 5, 4, 3, 8
    shapes = [(tokens, hidden), (experts, hidden), (experts,), (experts, 2 * inner, hidden), (experts, hidden, inner)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs[2] *= 0.2
    sizes = {"groups": 4, "best_groups": 2, "topk": 3, "scale": 2.5}
    x, router, bias, gate_up, down = (t.clone().requires_grad_() for t in inputs)
    gate = moe_gate_topk(x @ router.t(), bias.detach(), topk=3, n_group=4, topk_group=2, scale=2.5)
    out = moe_experts(x, gate.ids, gate.weights, gate_up, down)
    wanted = torch.tensor(layer(*(t.tolist() for t in inputs), **sizes), dtype=torch.float64)
    # The routing weights are float32.
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    direction = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    out.backward(direction)
    for tensor, leaf in zip(inputs, (x, router, None, gate_up, down), strict=True):
        for _ in range(6 if leaf is not None else 0):
            place = tuple(draw.randrange(n) for n in tensor.shape)
            at = []
            for step in (1e-5, -1e-5):
                tensor[place] += step
                there = torch.tensor(layer(*(t.tolist() for t in inputs), **sizes), dtype=torch.float64)
                at.append((there * direction).sum())
                tensor[place] -= step
            assert leaf.grad[place].item() == pytest.approx(float(at[0] - at[1]) / 2e-5, rel=1e-5, abs=1e-6)


def test_equals_transformers_block_in_values_and_gradients():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    torch.manual_seed(0)
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
    cfg = DeepseekV3Config(hidden_size=64, moe_intermediate_size=48, routed_scaling_factor=2.5, **sizes)
    block = DeepseekV3MoE(cfg)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    block.gate.e_score_correction_bias.normal_(std=0.1)
    x = torch.randn(1, 70, 64, requires_grad=True)
    direction = torch.randn(1, 70, 64)
    out = block(x)
    out.backward(direction)
    router, gate_up, down = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj
    ours = [t.detach().clone().requires_grad_() for t in (x, router, gate_up, down)]
    flat = ours[0].flatten(0, 1)
    bias = block.gate.e_score_correction_bias
    gate = moe_gate_topk(flat @ ours[1].t(), bias, topk=4, n_group=4, topk_group=2, scale=2.5)
    shared = block.shared_experts(flat)
    found = moe_experts(flat, gate.ids, gate.weights, *ours[2:], residual=shared)
    torch.testing.assert_close(found, out[0], rtol=1e-5, atol=1e-5)
    found.backward(direction[0])
    for leaf, theirs in zip(ours, (x, router, gate_up, down), strict=True):
        torch.testing.assert_close(leaf.grad, theirs.grad, rtol=1e-4, atol=1e-5)


# ---- every shape and precision against the loop over experts in float64 -------------------------------------------


def case(num_tokens: int, experts: int, topk: int, hidden: int = 128, inner: int = 128):
    """(ids, inputs by name, gradient of the result), rounded to bfloat16 so that every precision starts alike."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + experts)
    ids = torch.rand(num_tokens, experts, generator=generator).argsort(1)[:, :topk].int().contiguous()
    inputs = {
        "x": torch.randn(num_tokens, hidden, generator=generator).bfloat16(),
        "weights": torch.rand(num_tokens, topk, generator=generator),
        "gate_up": (torch.randn(experts, 2 * inner, hidden, generator=generator) / hidden**0.5).bfloat16(),
        "down": (torch.randn(experts, hidden, inner, generator=generator) / inner**0.5).bfloat16(),
        "residual": torch.randn(num_tokens, hidden, generator=generator).bfloat16(),
    }
    return ids, inputs, torch.randn(num_tokens, hidden, generator=generator).bfloat16()


def run(function, ids, inputs, grad, dtype: torch.dtype, **options: object) -> list[torch.Tensor]:
    """The result, then the gradients in the order of NAMES."""
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {n: inputs[n].to(weights if n == "weights" else dtype).clone().requires_grad_() for n in NAMES}
    residual = leaves["residual"]
    out = function(leaves["x"], ids, leaves["weights"], leaves["gate_up"], leaves["down"], residual=residual, **options)
    out.backward(grad.to(dtype))
    return [out.detach(), *(leaves[n].grad for n in NAMES)]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


# tokens, experts, choices; then all tokens to one expert, choices that go nowhere.
SHAPES = [(0, 4, 2), (1, 1, 1), (7, 3, 3), (130, 8, 3)]


@pytest.mark.parametrize(
    ("shape", "routing"), [*((s, "spread") for s in SHAPES), ((140, 4, 1), "one"), ((20, 4, 2), "holes")]
)
def test_every_precision_is_near_float64(shape, routing):
    ids, inputs, grad = case(*shape)
    if routing == "one":
        ids.fill_(2)
    if routing == "holes":
        ids[::2, 0] = -1
        ids[3] = -1
    exact = run(experts_reference, ids, inputs, grad, torch.float64)
    for dtype, precision, tolerance in (
        (torch.float64, "same", 1e-14),
        (torch.float32, "same", 1e-6),
        (torch.bfloat16, "same", 0.008),
        (torch.bfloat16, "fp8", 0.13),
        (torch.bfloat16, "fp8_wgrad", 0.13),
    ):
        found = run(moe_experts, ids, inputs, grad, dtype, precision=precision)
        for name, a, b in zip(("out", *NAMES), found, exact, strict=True):
            assert a.shape == b.shape
            assert relative_error(a, b) <= tolerance, (dtype, precision, name)


def unfused_fp8(x, ids, weights, gate_up, down, residual):
    """Forward and backward of the same recipe as separate PyTorch steps, each rounding to bfloat16 (no gradient)."""

    def gemm(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        wide_rows = fp8_dequantize(
            *fp8_quantize(rows.contiguous(), block=(1, 128)), block=(1, 128), dtype=torch.float32
        )
        quantized = fp8_quantize(matrices.contiguous(), block=(128, 128))
        wide = fp8_dequantize(*quantized, block=(128, 128), dtype=torch.float32)
        return torch.einsum("rk,rnk->rn", wide_rows, wide[experts]).bfloat16()

    tokens = torch.arange(len(x)).repeat_interleave(ids.shape[1])
    experts, factor = ids.flatten().long(), weights.flatten()[:, None]
    rows = x[tokens]
    h = gemm(rows, gate_up)
    gate, up = h.chunk(2, 1)
    act = torch.nn.functional.silu(gate) * up
    y = gemm(act, down)
    out = residual.index_add(0, tokens, (y * factor).bfloat16())

    def backward(grad: torch.Tensor) -> list[torch.Tensor]:
        grad_rows = grad[tokens]
        grad_weights = (grad_rows * y).float().sum(1).view_as(weights)
        grad_y = (grad_rows * factor).bfloat16()
        grad_act = gemm(grad_y, down.mT)
        sigmoid = gate.sigmoid()
        grad_h = torch.cat([grad_act * up * sigmoid * (1 + gate * (1 - sigmoid)), grad_act * gate * sigmoid], 1)
        grad_x = torch.zeros_like(x).index_add(0, tokens, gemm(grad_h, gate_up.mT))
        wgrads = [
            torch.stack([(a[experts == e].t() @ b[experts == e]) for e in range(len(down))])
            for a, b in ((grad_h, rows), (grad_y, act))
        ]
        return [grad_x, grad_weights, *wgrads, grad]

    return out, backward


def test_fp8_layer_errs_at_most_a_tenth_more_than_the_unfused_one():
    ids, inputs, grad = case(128, 4, 2, hidden=256, inner=256)
    exact = run(experts_reference, ids, inputs, grad, torch.float64)
    fused = run(moe_experts, ids, inputs, grad, torch.bfloat16, precision="fp8")
    out, backward = unfused_fp8(inputs["x"], ids, *(inputs[n] for n in NAMES[1:]))
    for name, a, b, wanted in zip(("out", *NAMES), fused, [out, *backward(grad)], exact, strict=True):
        assert relative_error(a, wanted) <= 1.1 * relative_error(b, wanted) + 1e-12, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_runs_agree_bit_for_bit(precision):
    ids, inputs, grad = case(130, 4, 2)
    first, second = (run(moe_experts, ids, inputs, grad, torch.bfloat16, precision=precision) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("precision", ["same", "fp8"])
def test_a_token_does_not_depend_on_its_neighbours(precision):
    ids, inputs, grad = case(130, 4, 2)
    whole = run(moe_experts, ids, inputs, grad, torch.bfloat16, precision=precision)
    part = {n: t[:50] if n in ("x", "weights", "residual") else t for n, t in inputs.items()}
    alone = run(moe_experts, ids[:50].contiguous(), part, grad[:50], torch.bfloat16, precision=precision)
    for a, b in zip((whole[0], whole[1], whole[2]), (alone[0], alone[1], alone[2]), strict=True):
        torch.testing.assert_close(a[:50], b, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_waits_for_the_device(precision, monkeypatch):
    # Meta tensors have no data: whatever reads a number on the host (.item, .tolist, .cpu, nonzero) raises.
    from r1kernels import dispatch

    monkeypatch.setattr(dispatch, "why_not", lambda impl, device: None if impl == "reference" else "not in this test")
    for op in ("combine", "gate_topk", "grouped_gemm", "permute_quant", "plan", "swiglu_quant"):
        module = sys.modules[f"r1kernels.moe_{op}"]  # the package's attribute of this name is the op
        monkeypatch.setattr(module, "is_traced", lambda tensor: False)  # or it would be a graph's shapes

    def step() -> None:
        shapes = (300, 128), (8, 128), (8, 256, 128), (8, 128, 128)
        x, router, gate_up, down = (torch.empty(*s, dtype=torch.bfloat16, device="meta") for s in shapes)
        gate = moe_gate_topk((x @ router.t()).float(), n_group=4, topk_group=2, topk=2)
        plan = moe_plan(gate.ids, len(gate_up), align=alignment(precision))
        out, h = experts_forward(x, plan, gate.weights, gate_up, down, x, precision)
        grads = experts_backward(out, x, gate.weights, gate_up, down, h, plan, precision, True)
        assert [g.shape for g in grads] == [x.shape, gate.weights.shape, gate_up.shape, down.shape]

    if precision == "fp8_wgrad":  # its sizes must be on the host, as its docstring says
        with pytest.raises(RuntimeError, match="meta"):
            step()
    else:
        step()


def test_frozen_weights_get_no_gradient_and_change_no_other():
    ids, inputs, grad = case(50, 4, 2)
    whole = run(moe_experts, ids, inputs, grad, torch.bfloat16, precision="fp8")
    x = inputs["x"].clone().requires_grad_()
    frozen = inputs["gate_up"], inputs["down"]
    moe_experts(x, ids, inputs["weights"], *frozen, precision="fp8").backward(grad)
    assert torch.equal(x.grad, whole[1])


def test_bad_input_is_named():
    ids, inputs, _ = case(5, 4, 2)
    good = [inputs["x"], ids, inputs["weights"], inputs["gate_up"], inputs["down"]]

    def call(**changed: object) -> None:
        names = ("x", "ids", "weights", "gate_up", "down")
        moe_experts(*(changed.get(n, v) for n, v in zip(names, good, strict=True)), precision=changed.get("p", "same"))

    with pytest.raises(ValueError, match="moe_experts: precision must be one of same, fp8, fp8_wgrad, got 'int8'"):
        call(p="int8")
    with pytest.raises(ValueError, match=r"moe_experts: gate_up must be contiguous torch.bfloat16 with 3 dimensions"):
        call(gate_up=inputs["gate_up"].float())
    with pytest.raises(ValueError, match=r"gate_up \[E, 2I, H\] and down \[E, H, I\] are required with H=128, got"):
        call(down=inputs["down"][:2].contiguous())
    with pytest.raises(ValueError, match=r"x \[T, H\] and ids \[T, K\] are required, got \(5, 128\) and \(4, 2\)"):
        call(ids=ids[:4])
    with pytest.raises(ValueError, match="FP8 needs H and I divisible by 128, got H=128 and I=64"):
        call(gate_up=inputs["gate_up"][:, :128].contiguous(), down=inputs["down"][..., :64].contiguous(), p="fp8")
    with pytest.raises(ValueError, match=r"moe_plan: ids must be in \[0, 4\) or -1, got .* 4"):
        call(ids=torch.full_like(ids, 4))
    with pytest.raises(ValueError, match=r"moe_swiglu: weights must be contiguous \(5, 2\)|weights must be"):
        call(weights=inputs["weights"][:, :1].contiguous())
    with pytest.raises(ValueError, match="the plan is for 5 tokens, but the tensor has 6"):
        from r1kernels import moe_permute

        moe_permute(torch.zeros(6, 128), moe_plan(ids, 4))
