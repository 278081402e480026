"""Our mixture-of-experts layer equals Megatron's MoELayer in every layout: equal weights and tokens (float32, gloo)."""

import sys

import fake_deep_ep
import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import on_ranks

from r1engine.config import Parallel
from r1engine.model.cpu import on_cpu
from r1engine.model.layers import moe
from r1engine.model.layers.expert_parallel import AllToAll
from r1engine.model.layers.moe import moe_layer_spec
from r1engine.model.parallel import join, leave
from r1engine.model.state.rules import one_by_one
from r1kernels import Fp8, RowPlan, fp8_dequantize, fp8_quantize
from r1kernels.moe_plan import max_rows

D, INNER, SHARED, E, K, GROUPS, BEST_GROUPS = 128, 128, 40, 8, 4, 4, 2
TOKENS = 33  # a rank
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def config(tensor: int, expert: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=D,
        num_attention_heads=4,
        ffn_hidden_size=64,
        moe_ffn_hidden_size=INNER,
        moe_shared_expert_intermediate_size=SHARED,
        num_moe_experts=E,
        moe_router_topk=K,
        moe_router_num_groups=GROUPS,
        moe_router_group_topk=BEST_GROUPS,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=tensor > 1,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
    )


def patch_megatron_layer() -> None:
    """What Megatron's own layer needs on a CPU and ours does not (r1engine/model/cpu.py has the rest)."""
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()  # a stream that it would only copy counts on
    moe_utils.te_general_gemm = None  # named without Transformer Engine, though undefined then

    def to_host(self: MoEAlltoAllTokenDispatcher, point: str, tokens: torch.Tensor | None = None):
        for name in ("input_splits", "output_splits"):
            if isinstance(getattr(self, name), torch.Tensor):  # gloo takes lists
                setattr(self, name, getattr(self, name).tolist())
        return tokens

    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = to_host


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def copy_weights(ours: torch.nn.Module, theirs: MoELayer, first: int) -> None:
    """The same numbers on every rank: those of expert e do not depend on who holds it."""
    router, bias = rows(1, E, D) / D**0.5, rows(2, E) * 0.3
    tp, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
    gate, up, down = rows(3, SHARED, D) / D**0.5, rows(4, SHARED, D) / D**0.5, rows(5, D, SHARED) / SHARED**0.5
    for layer in (ours, theirs):
        layer.router.weight.data.copy_(router)
        layer.router.expert_bias.copy_(bias)
        shared = layer.shared_experts
        shared.linear_fc1.weight.data.copy_(torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]))
        shared.linear_fc2.weight.data.copy_(down.chunk(tp, 1)[rank])
    for e, expert in enumerate(theirs.experts.local_experts):
        expert.linear_fc1.weight.data.copy_(rows(100 + first + e, 2 * INNER, D) / D**0.5)
        expert.linear_fc2.weight.data.copy_(rows(200 + first + e, D, INNER) / INNER**0.5)
        ours.experts.weight1.data[e].copy_(expert.linear_fc1.weight.data)
        ours.experts.weight2.data[e].copy_(expert.linear_fc2.weight.data)


def run(layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, d loss / d x); the gradients of the weights stay in the layer."""
    x = x.clone().requires_grad_()
    out, bias = layer(x)
    assert bias is None
    out.backward(rows(9 + dist.get_rank(), *out.shape))
    return out.detach(), x.grad


def results(layer: MoELayer, num_tokens: int) -> dict[str, torch.Tensor]:
    """Output and every gradient by Megatron's names; an expert without tokens has a gradient of zero in both layers."""
    layer.zero_grad()
    layer.router.local_tokens_per_expert.zero_()
    out, grad = run(layer, rows(50 + dist.get_rank(), num_tokens, 1, D))
    found = {"out": out, "x": grad}
    for name, weight in layer.named_parameters():
        names = one_by_one(f"mlp.{name}", range(len(weight)))
        found |= dict(zip(names, weight.grad if len(names) > 1 else [weight.grad], strict=True))
    return found


def compare(ours: MoELayer, theirs: MoELayer, num_tokens: int) -> None:
    found, wanted = results(ours, num_tokens), results(theirs, num_tokens)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(ours.router.local_tokens_per_expert, theirs.router.local_tokens_per_expert)


def compare_fp8(ours: MoELayer, theirs: MoELayer, num_tokens: int) -> None:
    """Near the float32 layer, and what leaves for other ranks is FP8: only results come back wide."""
    exchange, sent = dist.all_to_all_single, []

    def record(out: torch.Tensor, rows: torch.Tensor, *args: object, **options: object) -> object:
        sent.append((rows.dtype, *rows.shape[1:]))
        return exchange(out, rows, *args, **options)

    dist.all_to_all_single = record
    found = results(ours, num_tokens)
    dist.all_to_all_single = exchange
    if ps.get_expert_model_parallel_world_size() > 1:
        assert sent.count((torch.uint8, D)) == 2, sent  # tokens, and their gradients
        assert sent.count((torch.float32, D)) == 2, sent  # results of both
    for name, wanted in results(theirs, num_tokens).items():
        error = float((found[name] - wanted).norm() / wanted.norm().clamp(min=1e-30))
        assert error <= (1e-5 if "shared" in name else 0.15), (name, error)


def compare_rows(layer: MoELayer, num_tokens: int) -> None:
    """The buffers of a rank have room for the choices that are for its experts, whatever they are."""
    made, plans = moe.moe_plan, []

    def record(ids: torch.Tensor, *args: object, **options: object) -> RowPlan:
        plans.append((ids, made(ids, *args, **options)))
        return plans[-1][1]

    moe.moe_plan = record
    run(layer, rows(50 + dist.get_rank(), num_tokens, 1, D))
    moe.moe_plan = made
    ((ids, plan),) = plans
    assert plan.num_rows == max_rows(int((ids >= 0).sum()), plan.num_experts, plan.align)


def compare_deep_ep(expert: int) -> None:
    """The journey by DeepEP's calls ends where the one by all_to_all does, gradients included."""
    sys.modules["deep_ep"] = fake_deep_ep
    from r1engine.model.layers.deep_ep import DeepEp

    group, generator = ps.get_expert_model_parallel_group(), torch.Generator().manual_seed(dist.get_rank())
    ids = torch.rand(TOKENS, E, generator=generator).argsort(1)[:, :K].int().contiguous()
    x, weights = rows(60 + dist.get_rank(), TOKENS, D).bfloat16(), rows(61, TOKENS, K)
    for tokens in (x, fp8_quantize(x, block=(1, 128))):
        ends = []
        for journey in (AllToAll(group, E), DeepEp(group, E, D)):
            there, local, of_there, num_choices = journey.depart(tokens, ids, weights)
            assert num_choices == int((local >= 0).sum())
            again = journey.follow(tokens)
            for a, b in zip(there, again, strict=True):
                assert torch.equal(a.float(), b.float())
            wide = fp8_dequantize(*there, block=(1, 128)) if isinstance(there, Fp8) else there
            ends.append([local, of_there, *journey.arrive(wide, of_there), journey.arrive(wide, None)[0]])
        for a, b in zip(*ends, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        # What nobody changed comes back as often as it was sent, its weights once.
        ranks = torch.stack([(ids // (E // expert) == r).any(1) for r in range(expert)]).sum(0)
        wide = fp8_dequantize(*tokens, block=(1, 128)) if isinstance(tokens, Fp8) else tokens
        torch.testing.assert_close(ends[0][2], (wide.float() * ranks[:, None]).bfloat16())
        assert torch.equal(ends[0][3], weights)


def check(tensor: int, expert: int) -> None:
    """Both layers in one layout of all ranks."""
    join(Parallel(tensor=tensor, expert=expert))
    tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True, force_reset_rng=True)
    cfg = config(tensor, expert)
    spec = get_moe_module_spec(use_te=False, num_experts=E)
    theirs = MoELayer(cfg, spec.submodules, layer_number=1)
    ours = moe_layer_spec(cfg)(cfg)
    first = ps.get_expert_model_parallel_rank() * (E // expert)
    copy_weights(ours, theirs, first)
    compare(ours, theirs, TOKENS)
    compare_rows(ours, TOKENS)
    fp8 = moe_layer_spec(cfg, is_fp8=True)(cfg)
    copy_weights(fp8, theirs, first)
    compare_fp8(fp8, theirs, TOKENS)
    compare(ours, theirs, 1 if tensor == 1 and dist.get_rank() == 1 else 5)
    with_others = run(ours, rows(7, 5, 1, D))
    if tensor == 1:  # a rank without tokens of its own, which Megatron's layer does not take
        is_empty = dist.get_rank() == 1
        alone = run(ours, rows(7, 0 if is_empty else 5, 1, D))
        for a, b in zip(alone, with_others, strict=True):
            torch.testing.assert_close(a, b[:0] if is_empty else b, **TOLERANCE)
    if expert > 1:
        compare_deep_ep(expert)
    ps.destroy_model_parallel()


def check_all(layouts: list[tuple[int, int]]) -> None:
    patch_megatron_layer()
    for layout in layouts:
        with on_cpu():
            check(*layout)
    leave()


def test_equals_megatrons_layer_in_every_layout():
    # Tensor x expert ranks of four; in 2x4 the experts are spread over the tensor ranks as well.
    on_ranks(4, check_all, [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4)])
