"""A policy that goes on from a checkpoint with the distributed optimizer equals one that never stopped, bit for bit."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from layout_updates import GRPO, samples
from policies import policy_of
from ranks import on_ranks

from r1engine.batch import RowShape, pack, to_sequences
from r1engine.config import Parallel, RlConfig
from r1engine.grpo import objective
from r1engine.model.parallel import join, leave
from r1engine.model.policy import Policy


def resume(model: Path, folder: Path) -> None:
    """Updates, a checkpoint, and a fresh policy that goes on from it."""
    world = join(Parallel())
    cfg = RlConfig(
        model={"path": model},
        parallel={"distributed_optimizer": True},
        grpo=GRPO | {"kl_coef": 0.0},
        steps=8,
        optimizer={"weight_decay": 0.1},
    )

    def update(policy: Policy) -> dict[str, float]:
        rows = pack(to_sequences(samples()), RowShape(max_tokens=48, shards=world.dp_size))[world.dp_rank]
        return policy.update(rows, partial(objective, cfg=cfg.grpo), 1e-2).metrics

    whole, resumed = policy_of(cfg, world), policy_of(cfg, world)
    for _ in range(3):
        update(whole)
    if world.is_first:
        folder.mkdir()
    dist.barrier()
    whole.save(folder, None)
    resumed.load(folder, has_snapshot=False)
    for _ in range(3):
        assert update(whole) == update(resumed)
        for (name, expected), (_, found) in zip(whole.weights(), resumed.weights(), strict=True):
            assert torch.equal(expected, found), name
    leave()


def test_resume_with_the_distributed_optimizer_is_exact(folders, tmp_path):
    on_ranks(2, resume, folders["qwen2"][0], tmp_path / "checkpoint")
