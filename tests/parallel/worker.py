"""What every rank of tests/parallel/test_layouts.py runs: two GRPO updates of each family in a given layout.

worker.py TENSOR PIPELINE FOLDERS OUT: reads FOLDERS/<family>, writes OUT/<family>.{json,safetensors} on the first rank.
"""

import json
import random
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

warnings.filterwarnings("ignore")

from r1engine.batch import Completion, Prompt, Sample, pack  # noqa: E402
from r1engine.config import Config  # noqa: E402
from r1engine.grpo import objective  # noqa: E402
from r1engine.model.parallel import join, leave  # noqa: E402
from r1engine.model.policy import Policy  # noqa: E402

GRPO = {"kl_coef": 0.1, "clip_eps": 0.2, "questions": 2, "group_size": 4, "minibatches": 1}


def samples() -> list[Sample]:
    rng = random.Random(5)
    made = []
    for i in range(8):
        prompt = Prompt(i // 4, [rng.randrange(96) for _ in range(3 + i // 4)], "", "", "")
        tokens = [rng.randrange(96) for _ in range(rng.randint(1, 20))]
        logp = [-rng.random() for _ in tokens]
        made.append(Sample(Completion(prompt, i % 4, tokens, logp, "", False), rng.gauss(0, 1)))
    return made


def run(folder: Path, tensor: int, pipeline: int, out: Path) -> None:
    world = join(tensor, pipeline)
    cfg = Config(
        model={"path": folder},
        parallel={"tensor": tensor, "pipeline": pipeline, "distributed_optimizer": True},
        grpo=GRPO,
        steps=2,
        optimizer={"eps": 1e-3, "clip_grad": 0.1},  # a small eps would turn rounding into whole steps
    )
    policy = Policy(cfg, world)
    reference = policy.snapshot()
    stats, logp = [], []
    for _ in range(2):
        shards = pack(samples(), max_tokens=48, shards=world.dp_size, multiple=policy.row_multiple)
        rows = shards[world.dp_rank]
        for row, ref, old in zip(rows, policy.reference_logprobs(reference, rows), policy.logprobs(rows), strict=True):
            row.ref_logp, row.old_logp = ref, old - 0.1 * row.advantage  # ratios other than 1
            logp.append(float(old.double().sum()))
        stats.append(policy.update(rows, partial(objective, cfg=cfg.grpo), 1e-2))
    weights = {name: tensor.clone() for name, tensor in policy.weights()}
    exports = [None]
    if world.dp_size == 1:  # with data parallelism each rank saw its own rows
        exports = logp
    if world.is_first:
        save_file(weights, out / f"{folder.name}.safetensors")
        (out / f"{folder.name}.json").write_text(json.dumps({"stats": stats, "logp": exports}))


def main() -> None:
    torch.set_num_threads(1)
    tensor, pipeline, folders, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    for folder in sorted(folders.iterdir()):
        run(folder, tensor, pipeline, out)
    leave()


if __name__ == "__main__":
    main()
