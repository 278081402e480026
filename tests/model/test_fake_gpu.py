"""The branches of a GPU, on a GPU that does not exist (tests/support/fake_gpu): a policy of every family is built,
asked, updated and read. Kernels are noted with their arguments checked; there are no numbers."""

import math

import pytest
import torch
from fake_gpu import runs
from policies import policy_of
from ranks import on_ranks

from r1engine.config import ProcessRewardConfig, RewardModelConfig, RlConfig, SftConfig
from r1engine.ranks import World
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.stages import supervised

CASES = [
    ("qwen2", "megatron", False),
    ("qwen2-tied", "megatron", False),
    ("qwen3", "megatron", True),
    ("llama", "megatron", False),
    ("qwen3-moe", "megatron", False),
    ("qwen3-moe", "fused", True),
    ("deepseek", "megatron", True),
    ("deepseek", "fused", False),
    ("deepseek", "fused_fp8", False),
    ("moonlight", "fused", False),
    ("deepseek-mtp", "fused", False),
]
EXPERTS = {
    "fused": {"r1_moe_gate_topk", "r1_moe_plan", "r1_moe_permute", "_forward_kernel", "r1_moe_combine"},
    "fused_fp8": {"r1_moe_permute_quant", "m_grouped_fp8_gemm_nt_contiguous", "r1_fp8_quantize_bf16"},
    "megatron": set(),
}
MEGATRONS_WAITS = ("megatron/core/rerun_state_machine.py", "megatron/core/distributed", "megatron/core/optimizer")


@pytest.mark.rotating
@pytest.mark.parametrize(("family", "experts", "offload"), CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_a_policy_lives_on_the_gpu_and_waits_for_it_seldom(fake_gpu_library, family, experts, offload):
    (seen,) = on_ranks(1, runs.train, fake_gpu_library, family, experts, offload)
    assert seen.misplaced == []
    assert {"loss", "grad_norm"} <= seen.metrics
    assert {"partials_kernel", "merge_kernel"} | EXPERTS[experts] <= seen.launches["logprobs"].keys()
    assert "gradient_kernel" in seen.launches["update"]
    waits = {phase: dict(found) for phase, found in seen.waits.items()}
    if experts == "megatron":  # its dispatcher asks how many tokens each expert has
        for found in waits.values():
            found.pop("megatron/core/transformer/moe/moe_utils.py:permute", None)
    assert waits["logprobs"] == waits["reference"] == waits["weights"] == {}
    # Whatever the number of parameters: a few of Megatron's checks of the whole, and one for the metrics.
    ours = {place: times for place, times in waits["update"].items() if not place.startswith(MEGATRONS_WAITS)}
    assert ours == {"r1engine/model/policy.py:_reduce": 1}
    assert sum(waits["update"].values()) <= 8


@pytest.mark.parametrize("experts", [pytest.param("fused", marks=pytest.mark.rotating), "fused_fp8"])
def test_experts_of_two_ranks_wait_once_a_layer_and_are_copied_only_to_fp8_once_a_pass(fake_gpu_library, experts):
    (seen,) = on_ranks(1, runs.train, fake_gpu_library, "qwen3-moe", experts, False, 2)  # one layer has experts
    for phase, others in (("logprobs", {}), ("reference", {}), ("update", {"r1engine/model/policy.py:_reduce": 1})):
        waits = {place: times for place, times in seen.waits[phase].items() if not place.startswith(MEGATRONS_WAITS)}
        assert waits == {"r1engine/model/layers/expert_parallel.py:depart": runs.ROWS} | others
    # Of the size of four experts' matrices there are their gradients and, in FP8, both directions of the weights.
    matrices = [(4, 256, 128), (4, 128, 128)]
    there = {("empty_like", torch.float8_e4m3fn, shape): 1 for shape in matrices if experts == "fused_fp8"}
    back = {("clone", torch.uint8, (n, k, m)): 1 for n, m, k in matrices if experts == "fused_fp8"}
    gradients = {("_grouped_mm", torch.bfloat16, shape): runs.ROWS for shape in matrices}
    sizes = {math.prod(shape) for shape in matrices}
    for phase, expected in (("logprobs", there), ("update", there | back | gradients)):
        made = seen.made[phase].items()  # float32: the optimizer's
        of_size = {
            x: times for x, times in made if math.prod(x[2]) in sizes and x[1] != torch.float32 and len(x[2]) == 3
        }
        assert of_size == expected


@pytest.mark.parametrize(
    ("family", "model", "message"),
    [
        ("qwen3", {"dtype": "float32"}, r"model\.dtype: found float32 on a GPU, required bfloat16"),
        ("qwen3-moe", {"dtype": "float32"}, r"model\.dtype: found float32 on a GPU, required bfloat16"),
        ("qwen3-moe", {"experts": "fused"}, r"moe_intermediate_size 20, required multiples of 8 on a GPU"),
    ],
)
def test_what_a_gpu_cannot_compute_is_refused_before_anything_is_built(folders, family, model, message):
    cfg = RlConfig(model={"path": folders[family][0]} | model)
    with pytest.raises(ValueError, match=message):
        policy_of(cfg, World(rank=0, size=1, device=torch.device("cuda", 0)))


@pytest.mark.parametrize(
    ("kind", "head"), [(SftConfig, "tokens"), (RewardModelConfig, "score"), (ProcessRewardConfig, "score")]
)
def test_float32_on_a_gpu_is_refused_by_every_kind_of_training(folders, tmp_path, kind, head):
    cfg = kind(model={"path": folders["qwen3"][0], "dtype": "float32"}, data={"train": tmp_path}, run_dir=tmp_path)
    with pytest.raises(ValueError, match=r"model\.dtype: found float32 on a GPU, required bfloat16"):
        supervised.policy_of(cfg, World(rank=0, size=1, device=torch.device("cuda", 0)), head)


@pytest.mark.parametrize(
    ("dtype", "found"), [(torch.float32, "float32 experts of hidden_size 32"), (torch.bfloat16, "intermediate_size 20")]
)
def test_experts_that_a_gpu_cannot_multiply_are_refused_by_the_generator(folders, dtype, found):
    with pytest.raises(
        ValueError, match=rf"LocalGenerator: .*{found}.*, required bfloat16 and multiples of 8 on a GPU"
    ):
        LocalGenerator(folders["qwen3-moe"][0], seed=0, slots=1, device=torch.device("cuda", 0), dtype=dtype)
