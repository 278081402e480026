"""Whose memory is where: the policy sleeps whenever the generator draws, and is awake for all that reads its weights.

On a GPU both share the memory. Here the policy's storages are emptied on a CPU just as there, so that whoever comes at
the wrong time fails here too.
"""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks

from r1engine.config import RlConfig
from r1engine.model.policy import Policy
from r1engine.model.state.offload import Offloader
from r1engine.observe.progress import Progress
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.run import Run


def settings(tiny_base: Path, folder: Path) -> RlConfig:
    tiny = tiny_base / "tiny"
    return RlConfig(
        run_dir=folder,
        steps=2,
        model={"path": tiny_base / "base" / "model"},
        data={"train": tiny / "train.jsonl", "heldout": tiny / "heldout.jsonl", "max_prompt_tokens": 32},
        grpo={"questions": 2, "group_size": 4, "minibatches": 1, "kl_coef": 0.1, "reference_every": 1},
        optimizer={"lr": 1e-2, "warmup_steps": 0},
        rollout={"max_tokens": 16},
        evaluation={"every": 1, "samples": 1, "questions": 1},
        checkpoint={"every": 1},
        rewards={"workers": 1},
        log={"tensorboard": False},
    )


def run(tiny_base: Path, folder: Path, world) -> Run:
    """A whole run: setup, evaluations, two rollouts, a new reference, a checkpoint, the export."""
    made = Run(settings(tiny_base, folder), world, Progress("", enabled=False))
    stage, rows = made.build()
    try:
        stage.begin(rows)
        made.loop(stage)
    finally:
        stage.close()
        made.close()
    return made


def is_asleep(policy: Policy) -> bool:
    return any(storage.untyped_storage().nbytes() == 0 for storage in policy._offloader._tensors())


def exported(made: Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(made.cfg.run_dir / "model" / "model.safetensors")


def test_a_policy_that_sleeps_between_its_turns_learns_the_same(tiny_base, tmp_path, world, monkeypatch):
    policies, drawing, verified = [], [], []
    build, awake, verify = Policy._build, LocalGenerator.awake, LocalGenerator.verify

    def noted_awake(self):
        drawing.append(is_asleep(policies[-1]))
        return awake(self)

    def noted_verify(self, logprobs, *, row_multiple):
        verified.append(is_asleep(policies[-1]))
        return verify(self, logprobs, row_multiple=row_multiple)

    monkeypatch.setattr(Policy, "_build", lambda self, optimizer: (policies.append(self), build(self, optimizer))[1])
    monkeypatch.setattr(LocalGenerator, "awake", noted_awake)
    monkeypatch.setattr(LocalGenerator, "verify", noted_verify)
    always_awake = run(tiny_base, tmp_path / "awake", world)
    assert not any(drawing + verified)
    drawing.clear(), verified.clear()
    monkeypatch.setattr(Offloader, "DEVICE_TYPES", {"cpu"})
    sleeping = run(tiny_base, tmp_path / "asleep", world)
    assert len(drawing) == 5 and all(drawing)  # two rollouts, and evaluations before, between and after them
    assert len(verified) == 3 and all(verified)
    expected, found = exported(always_awake), exported(sleeping)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize(
    "call",
    [
        lambda policy, folder: policy.snapshot(),
        lambda policy, folder: next(policy.weights()),
        lambda policy, folder: policy.export(folder / "model"),
        lambda policy, folder: policy.save(folder, None),
    ],
)
def test_the_weights_of_a_sleeping_policy_are_not_read(folders, world, tmp_path, monkeypatch, call):
    from policies import policy_of

    monkeypatch.setattr(Offloader, "DEVICE_TYPES", {"cpu"})
    policy = policy_of(RlConfig(model={"path": folders["qwen3"][0]}), world)
    with policy.awake():
        policy.snapshot()
    with pytest.raises(AssertionError, match=r"required `with policy\.awake"):
        call(policy, tmp_path)


def policies_when_memory_is_freed(cfg: RlConfig) -> list[int]:
    """How many policies there are whenever a finished run frees its memory."""
    from r1engine import run as module

    alive = []

    def collect():
        gc.collect()
        alive.append(sum(isinstance(found, Policy) for found in gc.get_objects()))

    module.gc = SimpleNamespace(collect=collect)  # in a process of its own
    module.train(cfg)
    return alive


def test_nothing_of_a_stage_is_left_when_its_memory_is_freed_for_the_next_one(tiny_base, tmp_path):
    assert on_ranks(1, policies_when_memory_is_freed, settings(tiny_base, tmp_path)) == [[0]]
