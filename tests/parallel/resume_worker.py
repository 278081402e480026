"""What every rank of test_resume.py runs: updates, a checkpoint, and a fresh policy that goes on from it.

resume_worker.py FOLDER CHECKPOINT: exits with an error where the two policies differ in one bit.
"""

import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")

from worker import GRPO, samples  # noqa: E402

from r1engine.batch import pack  # noqa: E402
from r1engine.config import Config, Parallel  # noqa: E402
from r1engine.grpo import objective  # noqa: E402
from r1engine.model.parallel import join, leave  # noqa: E402
from r1engine.model.policy import Policy  # noqa: E402


def main() -> None:
    world = join(Parallel())
    cfg = Config(
        model={"path": Path(sys.argv[1])},
        parallel={"distributed_optimizer": True},
        grpo=GRPO | {"kl_coef": 0.0},
        steps=8,
        optimizer={"weight_decay": 0.1},
    )

    def update(policy: Policy) -> dict[str, float]:
        rows = pack(samples(), max_tokens=48, shards=world.dp_size)[world.dp_rank]
        return policy.update(rows, partial(objective, cfg=cfg.grpo), 1e-2)

    whole, resumed, folder = Policy(cfg, world), Policy(cfg, world), Path(sys.argv[2])
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


if __name__ == "__main__":
    main()
