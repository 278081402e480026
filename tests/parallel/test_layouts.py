"""Every parallel layout equals one rank: the bytes of an export of what was loaded, and log-probabilities, losses,
gradient norms and exported weights of three updates (float32, gloo). One start a number of ranks: importing Megatron
costs more than a case."""

from functools import cache

import pytest
import torch
from layout_updates import Trained, train_all
from model_folders import save_model
from ranks import on_ranks
from safetensors.torch import load_file

DENSE = ("qwen2", "qwen2-tied", "qwen3", "llama")
WIDE = "deepseek-wide"  # of sizes that FP8 blocks divide
ALWAYS = ("qwen2-tp2", "qwen2-tied-pp2-vp2", "deepseek-mtp-cp2", "qwen2-dp2", "deepseek-ep2", "deepseek-mtp-tp2-ep2")
MOE = {"expert_bias_rate": 0.01, "balance_loss": 0.001}  # so that their updates are compared too


def layout(**sizes: int) -> dict:
    return {"parallel": sizes}


def cases(ranks: int) -> dict[str, tuple[str, dict]]:
    """name -> (family, settings) of the layouts that take this many ranks."""
    found: dict[str, tuple[str, dict]] = {}

    def add(
        name: str, families: tuple[str, ...], experts: str = "megatron", *, offload: bool = False, **sizes: int
    ) -> None:
        for family in families:
            settings = layout(**sizes) | {"optimizer": {"offload": offload}}
            if family not in DENSE:
                settings["model"] = MOE | {"experts": experts}
                if family.endswith("mtp"):
                    settings["model"]["mtp_loss_weight"] = 0.3
            found[f"{family}-{name}"] = (family, settings)

    if ranks == 1:
        add("one", (*DENSE, "deepseek", "qwen3-moe", "moonlight", "deepseek-mtp"))
        add("one", (WIDE,), "fused_fp8")
    if ranks == 2:
        add("tp2", (*DENSE, "deepseek", "moonlight"), tensor=2)
        add("pp2", ("qwen2-tied", "deepseek-mtp"), pipeline=2)
        add("pp2-uneven", ("deepseek",), pipeline=2, first_stage_layers=1, last_stage_layers=3)
        add("pp2-vp2", ("qwen2-tied", "deepseek", "moonlight"), pipeline=2, virtual=2)
        add("dp2", ("qwen2",), data=2)
        add("cp2", ("qwen2-tied", "deepseek-mtp"), context=2)
        add("cp2-ep2", ("qwen3-moe",), context=2, expert=2)
        add("dp2-host", ("qwen2",), offload=True, data=2)
        add("ep2", ("deepseek",), expert=2)
        add("tp2-ep2", ("deepseek-mtp", "qwen3-moe"), tensor=2, expert=2)
        add("tp2-etp2", ("deepseek",), tensor=2, expert_tensor=2)
        add("ep2-fused-host", ("deepseek",), "fused", offload=True, expert=2)
        add("tp2-ep2-fused", ("deepseek", "qwen3-moe"), "fused", tensor=2, expert=2)
        add("tp2-ep2-fp8", (WIDE,), "fused_fp8", tensor=2, expert=2)
    if ranks == 4:
        add("tp2-dp2", ("qwen3",), tensor=2, data=2)
        add("ep4", ("deepseek",), expert=4)
        add("cp4", ("qwen3",), context=4)
        add("tp2-cp2", ("qwen2-tied",), tensor=2, context=2)
        add("tp2-cp2-ep2", ("deepseek-mtp",), "fused", tensor=2, context=2, expert=2)
        add("pp2-cp2", ("qwen2-tied",), pipeline=2, context=2)
        add("cp2-dp2", ("qwen3",), context=2, data=2)
        add("pp2-ep2", ("moonlight",), pipeline=2, expert=2)
        add("tp2-pp2-vp2", ("deepseek-mtp",), tensor=2, pipeline=2, virtual=2)
        # Not expert_tensor=2 with expert=2: Megatron gathers uneven parts there, which NCCL can and gloo cannot.
        add("tp2-pp2-ep2", ("deepseek",), tensor=2, pipeline=2, expert=2)
        add("tp2-pp2-ep2-fused", ("deepseek",), "fused", tensor=2, pipeline=2, expert=2)
    return found


def exact_cases() -> list:
    """(ranks, name): one layout of two ranks of each kind every day; the others, and four ranks, in turn."""
    assert cases(2).keys() >= {*ALWAYS}
    found = []
    for ranks in (2, 4):
        for name, (family, _) in cases(ranks).items():
            if family != WIDE:
                found.append(pytest.param(ranks, name, marks=[] if name in ALWAYS else [pytest.mark.rotating]))
    return found


@pytest.fixture(scope="module")
def results(request, folders, tmp_path_factory):
    """ranks -> what train_all found of the cases of so many ranks that this session tests; run at the first call."""
    models, out = folders["qwen2"][0].parent, tmp_path_factory.mktemp("layouts")
    save_model(models / WIDE, "deepseek", hidden_size=128, moe_intermediate_size=128)
    tested = [item.callspec.params for item in request.session.items if item.path == request.path]
    names = {params["name"] for params in tested}
    names |= {f"{cases(params['ranks'])[params['name']][0]}-one" for params in tested}

    @cache
    def of(ranks: int) -> dict[str, Trained]:
        chosen = {name: case for name, case in cases(ranks).items() if name in names}
        return on_ranks(ranks, train_all, chosen, models, out)[0]

    return of


@pytest.mark.parametrize(("ranks", "name"), exact_cases())
def test_layout_equals_one_rank(results, ranks, name):
    found, expected = results(ranks)[name], results(1)[f"{cases(ranks)[name][0]}-one"]
    for a, b in zip(found.stats, expected.stats, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    for a, b in zip(found.logp, expected.logp, strict=True):
        assert_near(a, b, 1e-5)
    weights = load_file(expected.exported / "model.safetensors")
    for tensor_name, tensor in load_file(found.exported / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[tensor_name], atol=1e-6, rtol=1e-5)
    files = [trained.exported / "loaded" / "model.safetensors" for trained in (found, expected)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("ranks", "name"), [(2, f"{WIDE}-tp2-ep2-fp8")])
def test_fp8_experts_on_other_ranks_stay_near_one_rank(results, ranks, name):
    """Of the first update: from then on a rounding of FP8 may send a token to another expert."""
    found, expected = results(ranks)[name], results(1)[f"{WIDE}-one"]
    assert_near(found.logp[0], expected.logp[0], 0.03)
    for key in ("loss", "grad_norm", "entropy"):
        assert found.stats[0][key] == pytest.approx(expected.stats[0][key], rel=0.01)


def assert_near(found: dict[str, list[float]], expected: dict[str, list[float]], tolerance: float) -> None:
    """Log-probabilities by sequence."""
    assert found.keys() == expected.keys()
    for sequence in found:
        assert found[sequence] == pytest.approx(expected[sequence], rel=0, abs=tolerance)
