"""The mixture-of-experts layer on one rank: what it refuses, routing replay, recomputation, names of its weights."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from model_folders import save_model
from policies import policy_of

from r1engine.batch import RowShape, Sequence, pack
from r1engine.config import RlConfig
from r1engine.model.cpu import on_cpu
from r1engine.model.layers.expert_parallel import AllToAll
from r1engine.model.layers.experts import RoutedExperts
from r1engine.model.layers.moe import Fp8MoE, MoE, moe_layer_spec
from r1engine.stages.sft import cross_entropy
from r1kernels import Fp8, fp8_quantize
from r1kernels.moe_experts import layer as of_experts

D, INNER, E, K = 128, 128, 8, 4


def config(**changed: object) -> TransformerConfig:
    settings = {
        "num_layers": 1,
        "hidden_size": D,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "moe_ffn_hidden_size": INNER,
        "num_moe_experts": E,
        "moe_router_topk": K,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
    }
    return TransformerConfig(**(settings | changed))


@pytest.fixture
def layer(world, monkeypatch):
    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", object())  # of Megatron's, which we never call
    with on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True, force_reset_rng=True)
        made = moe_layer_spec(config())(config())
    made.router.weight.data.normal_(std=0.1)
    return made


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"moe_router_load_balancing_type": "aux_loss"},
            "moe_router_load_balancing_type is aux_loss, none or seq_aux_loss is required",
        ),
        ({"moe_expert_capacity_factor": 1.0, "moe_router_load_balancing_type": "none"}, "capacity_factor is 1.0, None"),
        ({"moe_shared_expert_gate": True}, "moe: moe_shared_expert_gate is True, False is required"),
        ({"moe_router_topk": 2}, "moe_router_topk=2 and moe_router_group_topk=2: a ratio of 2 is required"),
        ({"activation_func": torch.nn.functional.gelu}, "moe: activation_func is .*silu.* is required"),
    ],
)
def test_what_the_layer_does_not_compute_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        moe_layer_spec(config(**changed))


def test_fp8_needs_whole_blocks():
    with pytest.raises(ValueError, match=r"moe: FP8 needs .* divisible by 128, got \(128, 96\)"):
        moe_layer_spec(config(moe_ffn_hidden_size=96), is_fp8=True)
    assert moe_layer_spec(config(), is_fp8=True) is Fp8MoE
    assert moe_layer_spec(config()) is MoE


def row_of(experts: torch.Tensor | None, padding: int = 0) -> SimpleNamespace:
    """What a router reads of a row of 20 tokens, the last ones padding."""
    sequence = (torch.arange(20) >= 20 - padding).long()
    return SimpleNamespace(experts=experts, sequence_of_token=sequence, sequence_weight=torch.tensor([1.0, 0.0]))


def test_the_matrices_of_all_experts_are_two_parameters(layer):
    assert {name: tuple(weight.shape) for name, weight in layer.named_parameters()} == {
        "router.weight": (E, D),
        "experts.weight1": (E, 2 * INNER, D),
        "experts.weight2": (E, D, INNER),
    }


def test_replay_takes_the_recorded_experts_and_keeps_the_routers_gradient(layer):
    x = torch.randn(20, 1, D)
    free = layer(x)[0]
    ids, _ = layer.router(x)
    layer.router.enter(row_of(torch.stack([ids * 0, ids], 1).long()), 1)
    assert torch.equal(layer(x)[0], free)
    other = (ids.long() + 1) % E
    other[3] = -1  # not recorded: chosen freely
    layer.router.enter(row_of(other[:, None]), 0)
    replayed, weights = layer.router(x)
    assert torch.equal(replayed[3], ids[3]) and torch.equal(replayed[:3].long(), other[:3])
    weights[:3].square().sum().backward()  # the sum alone is the constant 2.5
    assert layer.router.weight.grad.abs().sum() > 0


def test_load_is_counted_where_gradients_are_wanted_and_not_of_padding(layer):
    x = torch.randn(20, 1, D)
    with torch.no_grad():
        layer(x)
    assert not layer.router.local_tokens_per_expert.any()
    layer(x)
    assert layer.router.local_tokens_per_expert.sum() == 20 * K
    layer.router.local_tokens_per_expert.zero_()
    layer.router.enter(row_of(None, padding=5), 0)
    layer(x)
    assert layer.router.local_tokens_per_expert.sum() == 15 * K


def test_the_way_to_other_ranks_asks_the_device_for_sizes_once(world):
    # One `tolist`; what would ask again, for how many it found, is not called.
    names: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    ids, x = torch.tensor([[0, 3], [2, 1], [3, -1]], dtype=torch.int32), torch.arange(6.0).view(3, 2)
    with Watch():
        rows, local, _, num_choices = AllToAll(dist.group.WORLD, 4).depart(x, ids, torch.ones(3, 2))
    assert torch.equal(rows, x) and torch.equal(local[:2], ids[:2])
    assert num_choices == 5
    assert not {"aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense"} & set(names)


def test_recomputation_changes_no_gradient(layer):
    x = torch.randn(20, 1, D)
    grads = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf)[0].square().sum().backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_fp8_weights_are_made_once_a_pass_and_follow_the_weights(world, tmp_path, monkeypatch, recompute):
    save_model(tmp_path, "deepseek", hidden_size=D, moe_intermediate_size=INNER, num_hidden_layers=2)
    model = {"path": tmp_path, "experts": "fused_fp8", "recompute": recompute}
    policy = policy_of(RlConfig(model=model), world)
    rows = pack([Sequence(list(range(2, 2 + n)), 1, 0.01) for n in (5, 17, 40)], RowShape(max_tokens=48))[0]
    made = []

    def quantize(x: torch.Tensor, *, block: tuple[int, int]) -> Fp8:
        made.append(tuple(x.shape)) if block == (128, 128) else None
        return fp8_quantize(x, block=block)

    monkeypatch.setattr(of_experts, "fp8_quantize", quantize)
    snapshot = policy.snapshot()
    start = policy.logprobs(rows)
    policy.update(rows, cross_entropy, 1e-2)
    moved, lent, again = policy.logprobs(rows), policy.reference_logprobs(snapshot, rows), policy.logprobs(rows)
    assert made == 5 * [(E, 2 * INNER, D), (E, D, INNER)] and len(rows) == 2
    for a, b, c, d in zip(start, lent, moved, again, strict=True):
        assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)
    assert all(part._kept is None for part in policy.chunks[0].modules() if isinstance(part, RoutedExperts))


@pytest.mark.parametrize("family", ["deepseek", "qwen3-moe", "moonlight"])
def test_a_policy_by_the_fused_ops_equals_one_by_megatrons_layer(world, folders, family):
    rows = pack([Sequence(list(range(2, 2 + n)), 1, 0.01) for n in (5, 17, 40)], RowShape(max_tokens=64))[0]
    found = {}
    for experts in ("megatron", "fused"):
        model = {"path": folders[family][0], "experts": experts, "expert_bias_rate": 0.001}
        policy = policy_of(RlConfig(model=model, optimizer={"eps": 1e-3}), world)
        logp = policy.logprobs(rows)
        stats = policy.update(rows, cross_entropy, 1e-2).metrics
        found[experts] = [*logp, torch.tensor(stats["grad_norm"]), *(t.clone() for _, t in policy.weights())]
    for ours, theirs in zip(found["fused"], found["megatron"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
