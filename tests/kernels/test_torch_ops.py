"""The ops in graphs: registered as PyTorch wants it (opcheck), and equal to what they compute outside of a graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from graph_steps import CountingCompiler, Tensors, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from r1kernels import (
    GrpoObjective,
    fp8_dequantize,
    fp8_quantize,
    group_advantage,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    logits_grpo_loss,
    logprob_entropy,
)
from r1kernels.grpo_loss.torch_op import decode, encode

H, V = 8, 19
OBJECTIVE = GrpoObjective(clip_eps=0.2, kl_coef=0.1, entropy_coef=0.01)
KINDS, BOUNDS = encode(OBJECTIVE)


def tensors(length: int, seed: int = 0) -> Tensors:
    """Everything that an op may take, for `length` tokens."""
    draw = torch.Generator().manual_seed(seed)
    made = {"hidden": (length, H), "weight": (V, H), "bias": (V,), "logits": (length, V), "logp": (length,)}
    x = {name: torch.randn(shape, generator=draw) for name, shape in made.items()}
    x["labels"] = torch.randint(V, (length,), generator=draw)
    x |= {name: -3 - torch.rand(length, generator=draw) for name in ("old_logp", "ref_logp")}
    x |= {"advantage": torch.randn(length, generator=draw), "loss_weight": torch.full((length,), 1 / length)}
    x |= {"entropy": torch.rand(length, generator=draw), "temperature": 0.5 + torch.rand(length, generator=draw)}
    x |= {"rewards": torch.rand(length, generator=draw), "ids": torch.arange(length) // 3}
    return x


def of_loss(x: Tensors) -> Tensors:
    return {name: x[name] for name in ("old_logp", "advantage", "loss_weight", "ref_logp")}


def two_ops(x: Tensors) -> torch.Tensor:
    found = logprob_entropy(x["logits"], x["labels"], temperature=x["temperature"], entropy_grad=True)
    return grpo_loss(found.logp, objective=OBJECTIVE, entropy=found.entropy, **of_loss(x))[0]


def hidden_and_two_ops(x: Tensors) -> torch.Tensor:
    found = linear_logprob(x["hidden"], x["weight"], x["labels"], bias=x["bias"], temperature=0.7, entropy_grad=True)
    loss, metrics = grpo_loss(found.logp, objective=OBJECTIVE, entropy=found.entropy, **of_loss(x))
    return loss + 0 * metrics.kl


def from_logits(x: Tensors) -> torch.Tensor:
    return 3 * logits_grpo_loss(x["logits"] * 1, x["labels"], objective=OBJECTIVE, softcap=5.0, **of_loss(x)).loss


def from_hidden(x: Tensors) -> torch.Tensor:
    return 3 * linear_grpo_loss(x["hidden"], x["weight"], x["labels"], objective=OBJECTIVE, **of_loss(x)).loss


def with_advantages(x: Tensors) -> torch.Tensor:
    """A step from rewards to the loss of log-probabilities; FP8 stands where a quantized layer would."""
    found = group_advantage(x["rewards"], x["ids"], eps=1e-6)
    values = fp8_quantize(x["weight"].detach().repeat(1, 16), block=(1, 128))
    weight = fp8_dequantize(*values, block=(1, 128), dtype=torch.float32)[:, :H] + x["weight"]
    logp = linear_logprob(x["hidden"], weight, x["labels"], return_entropy=False).logp
    objective = GrpoObjective(ratio_level="sequence_mean", clip_eps=0.1)
    cu_seqlens = torch.tensor([0, 2, x["rewards"].shape[0]])
    return grpo_loss(logp, x["old_logp"], found.advantage, x["loss_weight"], objective, cu_seqlens=cu_seqlens)[0]


STEPS: dict[str, tuple[Callable[[Tensors], torch.Tensor], tuple[str, ...]]] = {
    "logits, two ops": (two_ops, ("logits",)),
    "hidden states, two ops": (hidden_and_two_ops, ("hidden", "weight", "bias")),
    "logits, one op": (from_logits, ("logits",)),
    "hidden states, one op": (from_hidden, ("hidden", "weight")),
    "rewards and FP8": (with_advantages, ("hidden", "weight")),
}


@pytest.fixture
def compiled():
    """Compiles without a break; `compiled.graphs` counts."""
    return CountingCompiler()


@pytest.mark.parametrize("name", STEPS)
def test_a_compiled_step_is_the_eager_one_bit_for_bit_and_for_every_length(compiled, name):
    step, names = STEPS[name]
    graph = compiled(step, dynamic=True)
    graphs = set()
    for length in (7, 12, 33):
        x = tensors(length)
        found, wanted = (value_and_grads(run, x, names) for run in (graph, step))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), length
        assert wanted[0] != 0
        graphs.add(compiled.graphs)
    assert len(graphs) == 1  # all of them made for the first length


def test_autocast_is_part_of_the_graph(compiled):
    def step(x: Tensors) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return hidden_and_two_ops(x) + from_hidden(x)

    names = ("hidden", "weight", "bias")
    found, wanted = (value_and_grads(run, tensors(9), names) for run in (compiled(step), step))
    plain = value_and_grads(lambda x: hidden_and_two_ops(x) + from_hidden(x), tensors(9), names)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.equal(wanted[0], plain[0])


def test_activation_checkpointing_computes_the_same_again():
    x = tensors(9)
    for name, (step, names) in STEPS.items():
        wanted = value_and_grads(step, x, names)
        again = value_and_grads(lambda x, step=step: checkpoint(step, x, use_reentrant=False), x, names)
        assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True)), name


def test_a_functional_call_has_gradients_and_torch_func_is_refused():
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(V, H))

        def forward(self, x: Tensors) -> torch.Tensor:
            return hidden_and_two_ops(x | {"weight": self.weight})

    x = tensors(9)
    weight = x["weight"].clone().requires_grad_()
    (found,) = torch.autograd.grad(torch.func.functional_call(Head(), {"weight": weight}, (x,)), weight)
    assert torch.equal(found, value_and_grads(hidden_and_two_ops, x, ("weight",))[1])
    with pytest.raises(RuntimeError, match=r"linear_logprob: weight was found inside torch\.func; required"):
        torch.func.grad(lambda weight: hidden_and_two_ops(x | {"weight": weight}))(x["weight"])


def test_an_exported_program_runs_with_other_lengths():
    class Step(torch.nn.Module):
        def forward(self, hidden, weight, labels, old_logp, advantage, loss_weight):
            logp = linear_logprob(hidden, weight, labels).logp
            return grpo_loss(logp, old_logp, advantage, loss_weight, GrpoObjective(clip_eps=0.2))[0]

    names = ("hidden", "weight", "labels", "old_logp", "advantage", "loss_weight")
    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(
        Step(),
        tuple(tensors(12)[n] for n in names),
        dynamic_shapes=tuple(None if n == "weight" else {0: length} for n in names),
    )
    called = {str(node.target) for node in program.graph.nodes if "r1kernels" in str(node.target)}
    assert called == {"r1kernels.linear_logprob.default", "r1kernels.grpo_loss.default"}
    x = tuple(tensors(31, seed=1)[n] for n in names)
    assert torch.equal(program.module()(*x), Step()(*x))


@pytest.mark.parametrize("name", STEPS)
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(name):
    step, names = STEPS[name]
    x = tensors(9)
    wanted = value_and_grads(step, x, names)
    meta = {key: value.to("meta") for key, value in x.items()}
    if name != "rewards and FP8":  # its cu_seqlens are on the CPU
        found = value_and_grads(step, meta, names)
        assert [(y.shape, y.dtype, y.device.type) for y in found] == [(y.shape, y.dtype, "meta") for y in wanted]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = value_and_grads(step, {key: mode.from_tensor(value) for key, value in x.items()}, names)
    assert [(y.shape, y.dtype, y.stride()) for y in found] == [(y.shape, y.dtype, y.stride()) for y in wanted]


def test_values_are_checked_when_the_graph_runs(compiled):
    graph = compiled(lambda x: logprob_entropy(x["logits"], x["labels"]).logp.sum())
    graph(x := tensors(5))
    with pytest.raises(ValueError, match=r"logprob_entropy: labels must be in \[0, 19\), got 0 \.\. 19"):
        graph(x | {"labels": torch.tensor([0, 1, 2, 3, 19])})


def test_what_a_graph_cannot_have_is_named():
    x, buffer = tensors(5), torch.zeros(V, H)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    layer = [mode.from_tensor(x[n]) for n in ("hidden", "weight", "labels")]
    refused = "main_grad was found in a graph that is traced; required None there"
    with mode, pytest.raises(RuntimeError, match=f"linear_logprob: {refused}"):
        linear_logprob(*layer, main_grad=buffer)
    with mode, pytest.raises(RuntimeError, match=f"linear_grpo_loss: {refused}"):
        linear_grpo_loss(*layer, None, torch.ones(5), torch.ones(5), main_grad=buffer)


# ---- opcheck ----------------------------------------------------------------------------------------------------


def _arguments(dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors(6).items()}
    grown = {n: x[n].clone().requires_grad_() for n in ("hidden", "weight", "bias", "logits", "logp", "entropy")}
    logits, labels = grown["logits"], x["labels"]
    layer = grown["hidden"], grown["weight"], grown["bias"]
    terms = x["old_logp"], x["advantage"], x["loss_weight"], x["ref_logp"], None
    mask = torch.tensor([True, True, False, True, True, True])
    keep = (labels[:, None] + torch.arange(2)).flatten() % V, torch.arange(7) * 2
    plain = 0.7, 1.0, 5.0, -100, ""  # temperature, logit_scale, softcap, ignore_index, group
    logprob = logits, labels, None, mask, *keep, *plain, True, True, True, "reference"
    by_row = logits, labels, x["temperature"], None, None, None, *plain, True, False, False, "reference"
    head = *layer, labels, None, mask, *plain, False, 4, dtype, True, True, "reference"
    frozen = grown["hidden"], x["weight"], None, labels, x["temperature"], None, *plain, False, None, dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch.ops.r1kernels.logprob_entropy(*logprob).detach()
    head_sums = torch.ops.r1kernels.linear_logprob(*head).detach()
    objective = KINDS, BOUNDS
    pool, places = torch.randn(3, 2, 16, 16, dtype=dtype), torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    heads, matrix = pool[:2, :, :2].flatten(1, 2), torch.randn(4, 256)
    values, scale = fp8_quantize(matrix, block=(1, 128))
    return {
        "logprob_entropy": logprob,
        "logprob_entropy by row": by_row,
        "logprob_entropy_backward": (torch.randn(7, 6, dtype=wide), sums, *logprob),
        "linear_logprob": head,
        "linear_logprob frozen": (*frozen, False, False, "reference"),
        "linear_logprob_backward": (torch.randn(7, 6, dtype=wide), head_sums, [True, False, True], *head),
        "grpo_loss": (grown["logp"], grown["entropy"], *terms, None, *objective, "reference"),
        "grpo_loss without entropy": (grown["logp"], None, *terms, None, *encode(GrpoObjective()), "reference"),
        "logits_grpo_loss": (logits, labels, *terms, None, 0.7, 1.0, None, "", *objective, True, "reference"),
        "linear_grpo_loss": (
            *(*layer, labels, *terms, x["temperature"], 1.0, 1.0, None, "", False, 4, dtype),
            *(*objective, [True, True, True], "reference"),
        ),
        "group_advantage": (x["rewards"], x["ids"], None, "batch_std", 1, 0.0, "add", "zero", "error", "reference"),
        "paged_attention": (heads, pool, pool, places, places[:, 0] + 5, None, 0.25, "reference"),
        "paged_attention of latents": (heads, pool, None, places, places[:, 0] + 5, 12, 0.25, "reference"),
        "fp8_quantize": (matrix, 1, 128, "reference"),
        "fp8_dequantize": (values, scale, 1, 128, torch.bfloat16, "reference"),
    }


@pytest.mark.parametrize("name", _arguments())
def test_opcheck(name):
    op, arguments = getattr(torch.ops.r1kernels, name.partition(" ")[0]).default, _arguments()[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if name.endswith("backward"):  # no backward pass of a backward pass
        arguments = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    if name == "fp8_dequantize":  # test_schema compares its inputs, and PyTorch does not compare FP8
        tests = tests[1:]
    torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.parametrize("name", ["logprob_entropy", "linear_logprob", "grpo_loss", "logits_grpo_loss"])
def test_the_registered_gradients_are_the_slopes(name):
    op = getattr(torch.ops.r1kernels, name)
    arguments = list(_arguments(torch.float64)[name])
    places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]
    rows = 1 if "grpo" in name else 2  # loss, or log-probability and entropy

    def differentiable(*inputs: torch.Tensor) -> torch.Tensor:
        given = list(arguments)
        for place, x in zip(places, inputs, strict=True):
            given[place] = x
        found = op(*given)
        return (found[0] if isinstance(found, tuple) else found)[:rows]

    assert torch.autograd.gradcheck(differentiable, [arguments[i] for i in places])


@pytest.mark.parametrize(
    "objective",
    [
        GrpoObjective(),
        GrpoObjective(loss="cispo", dual_clip=3.0, clip_eps_high=0.3, kl="abs", kl_grad="k2", kl_coef=0.1),
        GrpoObjective(loss="sapo", sapo_tau=2.0, kl_importance=True, tis="mask", tis_low=0.1, tis_high=math.inf),
        GrpoObjective(ratio_level="sequence", tis="truncate", tis_level="sequence_mean", entropy_coef=-0.1),
    ],
)
def test_an_objective_survives_the_way_into_an_op(objective):
    back = decode(*encode(objective))
    assert encode(back) == encode(objective)
    for name in ("loss", "ratio_level", "dual_clip", "kl_importance", "kl_coef", "entropy_coef", "tis", "tis_level"):
        assert getattr(back, name) == getattr(objective, name)
    assert (back.clip_high, back.kl_grad) == (objective.clip_high, objective.kl_grad or objective.kl)


def test_no_field_of_an_objective_is_lost_on_the_way():
    objective = GrpoObjective(
        loss="sapo", ratio_level="sequence", clip_eps=0.2, clip_eps_high=0.3, dual_clip=3.0, sapo_tau=2.0,
        sapo_tau_negative=3.0, kl="abs", kl_grad="k2", kl_coef=0.1, entropy_coef=0.01, tis="mask",
        tis_level="sequence_mean", tis_low=0.1, tis_high=4.0,
    )  # fmt: skip
    # kl_importance needs ratios of tokens; the cases above have it.
    assert {f.name for f in fields(objective) if getattr(objective, f.name) == f.default} == {"kl_importance"}
    assert decode(*encode(objective)) == objective
