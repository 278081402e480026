"""What every rank of test_reshard.py runs: for each case, a policy that trains or goes on from a checkpoint, makes a
checkpoint, and one more update.

reshard_worker.py CASES MODELS OUT: CASES is JSON, {name: [family, settings, case to go on from]};
writes OUT/<name>/checkpoint, OUT/<name>/asked.json (bytes of space that it asks for, all ranks together),
OUT/<name>/next.json and the exported folder OUT/<name>/next.
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")

from megatron.core import parallel_state  # noqa: E402
from worker import GRPO, samples  # noqa: E402

from r1engine.batch import pack  # noqa: E402
from r1engine.config import Config  # noqa: E402
from r1engine.grpo import objective  # noqa: E402
from r1engine.model.parallel import join, leave  # noqa: E402
from r1engine.model.policy import Policy  # noqa: E402


def run(model: Path, settings: dict, source: Path | None, out: Path) -> None:
    cfg = Config(
        model={"path": model} | settings.get("model", {}),
        parallel={"distributed_optimizer": True} | settings.get("parallel", {}),
        grpo=GRPO,
        steps=8,
        optimizer={"eps": 1e-3, "weight_decay": 0.1} | settings.get("optimizer", {}),
    )
    world = join(cfg.parallel)  # as it is, in a process that has joined already
    policy = Policy(cfg, world)
    reference = policy.snapshot()

    def update() -> dict[str, float]:
        shards = pack(samples(), max_tokens=72, shards=world.dp_size, multiple=policy.row_multiple)
        rows = shards[world.dp_rank]
        logp = policy.logprobs(rows)
        for row, ref, old in zip(rows, policy.reference_logprobs(reference, rows), logp, strict=True):
            row.ref_logp, row.old_logp = ref, old - 0.1 * row.advantage
        return policy.update(rows, partial(objective, cfg=cfg.grpo), 1e-2)

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


def main() -> None:
    cases, models, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    for name, (family, settings, source) in cases.items():
        run(models / family, settings, out / source, out / name)
        parallel_state.destroy_model_parallel()
    leave()


if __name__ == "__main__":
    main()
