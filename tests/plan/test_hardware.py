"""What a data sheet changes in a plan: peaks, links, and who shares the host's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from r1engine.config import SftConfig
from r1engine.hf.architecture import read_architecture
from r1engine.plan.hardware import GPUS, Assumed
from r1engine.plan.planner import Plan, make_plan
from r1engine.plan.request import job_of, layout_of

MODEL = Path(__file__).resolve().parents[2] / "configs" / "models" / "Llama-3.1-8B"
CFG = SftConfig(model={"path": MODEL, "recompute": True}, parallel={"tensor": 8}, optimizer={"offload": True})


def planned(name: str, gpus: int = 8) -> Plan:
    assumed = Assumed(runtime_gib=0.0)
    return make_plan(read_architecture(MODEL), layout_of(CFG, gpus), job_of(CFG, assumed), GPUS[name], assumed)


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_has_its_name_and_rates_of_one_direction(name):
    gpu = GPUS[name]
    assert gpu.name == name and gpu.per_node % gpu.per_host == 0
    assert gpu.network_gb_s <= gpu.nvlink_gb_s and gpu.host_gb_s < gpu.hbm_tb_s * 1e3


def test_matrix_products_take_as_long_as_the_peaks_say():
    seconds = {name: planned(name).phases[0].seconds["matrix products"] for name in GPUS}
    for name, gpu in GPUS.items():
        assert seconds[name] == pytest.approx(seconds["h100"] * 989 / gpu.bf16_tflops)


def test_tensor_parallelism_without_nvlink_costs_what_pcie_costs():
    traffic = {name: planned(name).phases[0].seconds["TP traffic"] for name in ("a100", "l40s")}
    assert traffic["l40s"] == pytest.approx(traffic["a100"] * 300 / 27)


def test_nvlink_of_a_rack_joins_more_than_a_host():
    rack, boards = planned("gb200", 72), planned("b200", 72)
    assert rack.phases[0].seconds["DP traffic"] < boards.phases[0].seconds["DP traffic"]  # all of it is within the rack
    # Four GPUs share a host, not eight: half the optimizer state on it, and twice the CPUs for it.
    assert rack.host_gib["optimizer"] == boards.host_gib["optimizer"] / 2
    adam = [plan.phases[1].seconds["Adam on the CPUs"] for plan in (rack, boards)]
    assert adam[0] == pytest.approx(adam[1] / 2)
    small = replace(rack, gpu=replace(rack.gpu, host_memory_gib=1.0))
    assert any("host memory" in limit for limit in small.limits())
