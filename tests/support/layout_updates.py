"""What every rank of tests/parallel/test_layouts.py runs: three GRPO updates for each case (a family in a layout)."""

import itertools
import random
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")

from megatron.core import parallel_state  # noqa: E402

from r1engine.batch import Completion, PackedBatch, Prompt, Sample, pack, to_sequences  # noqa: E402
from r1engine.config import RlConfig  # noqa: E402
from r1engine.data.question import Question  # noqa: E402
from r1engine.grpo import objective, objective_of  # noqa: E402
from r1engine.hf.architecture import Moe  # noqa: E402
from r1engine.model.parallel import join, leave  # noqa: E402
from r1engine.model.policy import Policy  # noqa: E402

GRPO = {"kl_coef": 0.1, "clip_eps": 0.2, "questions": 2, "group_size": 4, "minibatches": 1}


def samples(moe: Moe | None = None) -> list[Sample]:
    """With `moe`, every other sample with recorded experts, to be replayed."""
    rng = random.Random(5)  # tokens from 2 on: the embedding of padding (0) is zero, where a norm has no slope
    made = []
    for i in range(8):
        prompt = Prompt(i // 4, [rng.randrange(2, 96) for _ in range(3 + i // 4)], "", Question(""))
        tokens = [rng.randrange(2, 96) for _ in range(rng.randint(1, 20) if i else 40)]
        logp = [-rng.random() for _ in tokens]
        advantage, experts = rng.gauss(0, 1), None
        if moe is not None and i % 2:
            draw = (rng.sample(range(moe.num_experts), moe.top_k) for _ in range(len(prompt.tokens + tokens) - 1))
            experts = torch.tensor([[chosen] * moe.num_layers for chosen in draw], dtype=torch.int16)
        made.append(Sample(Completion(prompt, i % 4, tokens, logp, "", False, experts=experts), advantage))
    return made


def by_sequence(rows: list[PackedBatch], logp: list[torch.Tensor]) -> dict[str, list[float]]:
    """{tokens of a sequence: its log-probabilities}, without the padding."""
    return {
        str(row.tokens[a:b].tolist()): values[a:b].tolist()
        for row, values in zip(rows, logp, strict=True)
        for a, b in itertools.pairwise(row.cu_seqlens.tolist())
        if row.loss_weight[a:b].any()
    }


@dataclass(frozen=True)
class Trained:
    """Of each update its statistics, and the log-probabilities by sequence before it."""

    stats: list[dict[str, float]]
    logp: list[dict[str, list[float]]]
    exported: Path  # in its folder `loaded`, what was exported before the first update


def train(folder: Path, settings: dict, out: Path) -> Trained:
    cfg = RlConfig(
        model={"path": folder} | settings.get("model", {}),
        parallel={"distributed_optimizer": True} | settings.get("parallel", {}),
        grpo=GRPO,
        steps=3,
        # A small eps would turn rounding into whole steps.
        optimizer={"eps": 1e-3, "clip_grad": 0.1} | settings.get("optimizer", {}),
    )
    world = join(cfg.parallel)
    policy = Policy(cfg.model, cfg.parallel, cfg.optimizer, world)
    reference = policy.snapshot()
    policy.export(out / "loaded")
    stats, logps = [], []
    for number in range(3):
        shards = pack(
            to_sequences(samples(policy.shape.moe if folder.name == "qwen3-moe" else None)), policy.row_shape(72)
        )
        rows = shards[world.dp_rank]
        logp = policy.logprobs(rows)
        known = zip(rows, policy.reference_logprobs(reference, rows), logp, strict=True)
        # ratios other than 1
        rows = [replace(row, ref_logp=ref, old_logp=old - 0.1 * row.advantage) for row, ref, old in known]
        logps.append(by_sequence(rows, logp))
        # The loss with the output layer, and in the second update by itself.
        with_head = objective_of(cfg.grpo) if number != 1 else None
        done = policy.update(rows, partial(objective, cfg=cfg.grpo), 2e-3, with_head)
        stats.append(done.metrics)
        # Of every row, also where interleaved stages fill rows up to the longest.
        assert [len(kept) for kept in done.logp] in ([len(row.tokens) for row in rows], [])
        for kept, known, row in zip(done.logp, logp, rows, strict=False):
            trained = row.loss_weight != 0
            assert torch.allclose(kept[trained], known[trained], atol=1e-6)
        assert bool(done.logp) == (world.pp_rank == world.pp_size - 1)
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, logps)
    policy.export(out)
    parallel_state.destroy_model_parallel()
    return Trained(stats, [{k: v for part in gathered for k, v in part[i].items()} for i in range(3)], out)


def train_all(cases: dict[str, tuple[str, dict]], folders: Path, out: Path) -> dict[str, Trained]:
    """Of each case {name: (family, settings)}; reads folders/<family>, exports to out/<name>."""
    found = {name: train(folders / family, settings, out / name) for name, (family, settings) in cases.items()}
    leave()
    return found
