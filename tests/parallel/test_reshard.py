"""A checkpoint is resumed in another layout: every tensor of it bit for bit, and the next update as in the old one."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layout_updates import GRPO, samples
from megatron.core import dist_checkpointing, parallel_state
from model_folders import save_model
from policies import policy_of
from ranks import on_ranks
from safetensors.torch import load_file

from r1engine.batch import pack, to_sequences
from r1engine.config import RlConfig
from r1engine.grpo import objective
from r1engine.model.cpu import on_cpu
from r1engine.model.parallel import join, leave
from r1engine.model.state import optimizer_state

VOCABULARY = 97  # two ranks fill it up to 98 rows
FLOAT16 = {"model": {"dtype": "bfloat16"}}
HOST = {"optimizer": {"offload": True}}
MOE = {"model": {"expert_bias_rate": 0.01, "mtp_loss_weight": 0.3}}
FUSED = {"model": MOE["model"] | {"experts": "fused"}}  # one parameter of all experts, one of each in a checkpoint


def layout(**sizes: int) -> dict:
    return {"parallel": sizes}


# name -> (family, settings, the case whose checkpoint it goes on from)
FIRST = {  # one rank
    "odd-one": ("odd", {}, None),
    "bf16-one": ("odd", FLOAT16, None),
    "moe-one": ("deepseek-mtp", MOE, None),
}
THEN = {  # two ranks
    "odd-tp2": ("odd", layout(tensor=2), "odd-one"),
    "odd-pp2": ("odd", layout(pipeline=2), "odd-tp2"),
    "odd-dp2": ("odd", HOST, "odd-pp2"),
    "odd-cp2": ("odd", layout(context=2), "odd-dp2"),
    "bf16-dp2": ("odd", FLOAT16, "bf16-one"),
    "bf16-cp2": ("odd", FLOAT16 | HOST | layout(context=2), "bf16-dp2"),
    "bf16-tp2": ("odd", FLOAT16 | layout(tensor=2), "bf16-cp2"),
    "moe-tp2-ep2": ("deepseek-mtp", MOE | layout(tensor=2, expert=2), "moe-one"),
    "moe-etp2": ("deepseek-mtp", MOE | layout(tensor=2, expert_tensor=2), "moe-tp2-ep2"),
    "moe-fused-ep2": ("deepseek-mtp", FUSED | layout(expert=2), "moe-etp2"),
    "moe-fused-tp2": ("deepseek-mtp", FUSED | layout(tensor=2), "moe-fused-ep2"),
    "moe-ep2": ("deepseek-mtp", MOE | HOST | layout(expert=2), "moe-etp2"),
    "moe-cp2-ep2": ("deepseek-mtp", MOE | layout(context=2, expert=2), "moe-ep2"),
    "moe-pp2": ("deepseek-mtp", MOE | layout(pipeline=2), "moe-cp2-ep2"),
}
AT_LAST = {  # one rank
    "odd-from-cp2": ("odd", {}, "odd-cp2"),
    "moe-from-ep2": ("deepseek-mtp", MOE, "moe-ep2"),
    "moe-from-fused": ("deepseek-mtp", MOE, "moe-fused-tp2"),
    "moe-fused-from-pp2": ("deepseek-mtp", FUSED | HOST, "moe-pp2"),
    "moe-from-pp2": ("deepseek-mtp", MOE, "moe-pp2"),
}
TURNS = {"odd": 0, "bf16": 1, "moe": 2}  # the first word of a name -> the day of its chain of cases
RESUMED = [(name, source) for name, (_, _, source) in (THEN | AT_LAST).items()]


def run(model: Path, settings: dict, source: Path | None, out: Path) -> None:
    """A policy trains, or goes on from a checkpoint; it makes a checkpoint, and one more update.

    Writes out/checkpoint, out/asked.json (bytes of space that it asks for, all ranks together), out/next.json
    (statistics of the update) and the exported folder out/next.
    """
    cfg = RlConfig(
        model={"path": model} | settings.get("model", {}),
        parallel={"distributed_optimizer": True} | settings.get("parallel", {}),
        grpo=GRPO,
        steps=8,
        optimizer={"eps": 1e-3, "weight_decay": 0.1} | settings.get("optimizer", {}),
    )
    optimizer_state.PIECE = 1000  # less than most tensors have
    world = join(cfg.parallel)  # as it is, in a process that has joined already
    policy = policy_of(cfg, world)
    reference = policy.snapshot()

    def update() -> dict[str, float]:
        shards = pack(to_sequences(samples()), policy.row_shape(72))
        rows = shards[world.dp_rank]
        logp = policy.logprobs(rows)
        known = zip(rows, policy.reference_logprobs(reference, rows), logp, strict=True)
        rows = [replace(row, ref_logp=ref, old_logp=old - 0.1 * row.advantage) for row, ref, old in known]
        return policy.update(rows, partial(objective, cfg=cfg.grpo), 1e-2).metrics

    if source is None:
        for _ in range(2):
            update()
    else:
        reference = policy.load(source / "checkpoint", has_snapshot=True)
    if world.is_first:
        (out / "checkpoint").mkdir(parents=True)
    dist.barrier()
    policy.save(out / "checkpoint", reference)
    asked = torch.tensor(policy.state_bytes() - 2**20)
    dist.all_reduce(asked)
    stats = update()
    policy.export(out / "next")
    if world.is_first:
        (out / "next.json").write_text(json.dumps(stats))
        (out / "asked.json").write_text(str(asked.item()))
    dist.barrier()


def run_all(cases: dict[str, tuple[str, dict, str]], models: Path, out: Path) -> None:
    """On each of several ranks: case {name: (family, settings, the case to go on from)} into out/<name>."""
    for name, (family, settings, source) in cases.items():
        run(models / family, settings, out / source, out / name)
        parallel_state.destroy_model_parallel()
    leave()


def chain(name: str) -> str:
    return name.partition("-")[0]


def in_turn(cases: list[tuple[str, ...]]) -> list:
    """Parameters of tests that run on the day of their chain."""
    return [pytest.param(*case, marks=pytest.mark.turn(TURNS[chain(case[0])])) for case in cases]


@pytest.fixture(scope="module")
def out(request, world, folders, tmp_path_factory):
    """The folder that every case wrote into whose chain this session tests."""
    tested = {chain(item.callspec.params["name"]) for item in request.session.items if item.path == request.path}
    models, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("reshard")
    save_model(models / "odd", "qwen2-tied", vocab_size=VOCABULARY)
    (models / "deepseek-mtp").symlink_to(folders["deepseek-mtp"][0])
    first, then, at_last = (
        {n: case for n, case in part.items() if chain(n) in tested} for part in (FIRST, THEN, AT_LAST)
    )
    for name, (family, settings, _) in first.items():
        run(models / family, settings, None, out / name)
    on_ranks(2, run_all, then, models, out)
    for name, (family, settings, source) in at_last.items():
        run(models / family, settings, out / source, out / name)
    return out


@cache
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole; of a padded vocabulary, the tokens."""
    with on_cpu():
        found = dist_checkpointing.load_plain_tensors(str(folder / "checkpoint"))
    found = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
    return {name: x[:VOCABULARY] if x.shape[:1] == (VOCABULARY + 1,) else x for name, x in found.items()}


@pytest.mark.parametrize(("name", "source"), in_turn(RESUMED))
def test_every_tensor_of_the_checkpoint_survives_a_change_of_layout(out, world, name, source):
    expected, found = tensors(out / source), tensors(out / name)
    assert {n.split(".")[1] for n in expected if n.startswith("optimizer.")} >= {"exp_avg", "exp_avg_sq"}
    assert any(n.startswith("reference.") for n in expected)
    assert found.keys() == expected.keys()
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == []


@pytest.mark.parametrize(("name", "source"), in_turn([case for case in RESUMED if "bf16" not in case[0]]))
def test_the_next_update_is_that_of_the_old_layout(out, name, source):
    first = source
    while first in dict(RESUMED):
        first = dict(RESUMED)[first]
    found, expected = (json.loads((out / case / "next.json").read_text()) for case in (name, first))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    weights = load_file(out / first / "next" / "model.safetensors")
    for tensor_name, tensor in load_file(out / name / "next" / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[tensor_name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", in_turn([(name,) for name in (*FIRST, *THEN)]))
def test_the_space_asked_for_is_that_of_the_tensors(out, name):
    size = sum(x.nbytes for x in tensors(out / name).values())
    assert size <= json.loads((out / name / "asked.json").read_text()) <= 1.5 * size
