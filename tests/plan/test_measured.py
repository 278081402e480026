"""The plan's bytes of a rank against those of real runs of a tiny DeepSeek-V3 with an MTP module (bfloat16, gloo)."""

import json
from pathlib import Path

import pytest
from model_folders import save_model
from ranks import forked

from r1engine.hf.architecture import read_architecture
from r1engine.plan.layout import Layout
from r1engine.plan.memory import GRADIENT, WEIGHT, optimizer_bytes
from r1engine.plan.sizes import rank_parameters

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


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("measured")
    save_model(folder, "deepseek-mtp", **SIZES)
    done = forked(2, Path(__file__).with_name("measure_worker.py"), json.dumps(CASES), folder, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, out


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_ranks_bytes_are_the_planned_ones_within_two_percent(measured, name, rank):
    folder, out = measured
    found = json.loads((out / f"{name}.{rank}.json").read_text())
    layout = Layout(gpus=2, **CASES[name])
    parameters = rank_parameters(read_architecture(folder), layout, found["stage"], with_mtp=True)
    count = sum(parameters.values())
    assert found["weights"] == WEIGHT * count
    assert found["gradients"] == pytest.approx(GRADIENT * count, rel=0.02)
    assert found["optimizer"] == pytest.approx(optimizer_bytes(parameters, layout), rel=0.02)


def test_two_context_parallel_ranks_take_a_row_twice_as_long(measured):
    # Each keeps for the backward pass what one rank keeps of half the row, and the keys and values of the other half.
    of = {
        name: max(json.loads((measured[1] / f"{name}.{rank}.json").read_text())["kept"] for rank in (0, 1))
        for name in ("cp2", "dp2")
    }
    assert of["cp2"] < 1.25 * of["dp2"]
