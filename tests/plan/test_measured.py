"""The plan's bytes of a rank against those of real runs of a tiny DeepSeek-V3 with an MTP module (bfloat16, gloo)."""

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer
from model_folders import save_model
from policies import policy_of
from ranks import on_ranks

from r1engine.batch import PackedBatch, Sequence, pack
from r1engine.config import RlConfig
from r1engine.hf.architecture import read_architecture
from r1engine.model.parallel import join, leave
from r1engine.model.policy import Policy
from r1engine.plan.layout import Layout
from r1engine.plan.memory import GRADIENT, WEIGHT, optimizer_bytes
from r1engine.plan.sizes import rank_parameters
from r1engine.stages.sft import cross_entropy

CASES = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {},
    "cp2": {"context": 2},
    "ep2": {"expert": 2},
    "tp2-ep2": {"tensor": 2, "expert": 2},
    "tp2-etp2": {"tensor": 2, "expert_tensor": 2},
}
# Large enough that rounding a tensor up to whole blocks of 64 elements is no 2 %.
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 128, "kv_lora_rank": 56}


def measure(policy: Policy) -> dict[str, int]:
    optimizer, chunk = policy.optimizer, policy.chunks[0]
    chain = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    state = [x for part in chain for entry in part.optimizer.state.values() for x in entry.values() if x.numel() > 1]
    masters = [p for part in chain for group in part.optimizer.param_groups for p in group["params"]]
    assert all(p.dtype == torch.float32 for p in masters)
    return {
        "weights": sum(p.nbytes for p in chunk.module.parameters()),
        "gradients": sum(b.grad_data.nbytes for b in [*chunk.buffers, *chunk.expert_parallel_buffers]),
        "optimizer": sum(x.nbytes for x in [*state, *masters]),
    }


def update(policy: Policy, row: PackedBatch) -> int:
    """One update; bytes that its forward pass keeps, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for p in policy.chunks[0].module.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy.update([row], cross_entropy, 1e-3)
    return sum(kept.values())


def measure_all(cases: dict[str, dict], folder: Path) -> dict[str, dict[str, int]]:
    """Of this rank in each layout: the bytes of weights, gradients and optimizer state, and what a row keeps."""
    found = {}
    items = [Sequence([2 + (7 * i + j) % 90 for j in range(32)], 1, 0.1) for i in range(2)]
    for name, parallel in cases.items():
        model = {"path": folder, "dtype": "bfloat16", "mtp_loss_weight": 0.3}
        cfg = RlConfig(model=model, parallel=parallel | {"distributed_optimizer": True})
        world = join(cfg.parallel)
        policy = policy_of(cfg, world)
        rows = pack(items, policy.row_shape(64))
        kept = update(policy, *rows[world.dp_rank])
        found[name] = measure(policy) | {"stage": world.pp_rank, "kept": kept}
        parallel_state.destroy_model_parallel()
    leave()
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the model's folder, {layout: what was measured} of each rank)."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, "deepseek-mtp", **SIZES)
    return folder, on_ranks(2, measure_all, CASES, folder)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_ranks_bytes_are_the_planned_ones_within_two_percent(measured, name, rank):
    folder, of_rank = measured
    found = of_rank[rank][name]
    layout = Layout(gpus=2, **CASES[name])
    parameters = rank_parameters(read_architecture(folder), layout, found["stage"], with_mtp=True)
    count = sum(parameters.values())
    assert found["weights"] == WEIGHT * count
    assert found["gradients"] == pytest.approx(GRADIENT * count, rel=0.02)
    assert found["optimizer"] == pytest.approx(optimizer_bytes(parameters, layout), rel=0.02)


def test_two_context_parallel_ranks_take_a_row_twice_as_long(measured):
    # Each keeps for the backward pass what one rank keeps of half the row, and the keys and values of the other half.
    of = {name: max(found[name]["kept"] for found in measured[1]) for name in ("cp2", "dp2")}
    assert of["cp2"] < 1.25 * of["dp2"]
