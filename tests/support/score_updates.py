"""What every rank of tests/model/test_score.py runs: scores and updates on pairs, for each case."""

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")

from layout_updates import by_sequence  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from r1engine.batch import Packed, Sequence, pack, pack_units  # noqa: E402
from r1engine.config import Model, Optimizer, Parallel  # noqa: E402
from r1engine.model.parallel import join, leave  # noqa: E402
from r1engine.model.policy import Policy  # noqa: E402
from r1engine.stages.process_loss import cross_entropy_of_steps  # noqa: E402
from r1engine.stages.reward_loss import pairwise  # noqa: E402


@dataclass(frozen=True)
class ScoreCase:
    """A family of model_folders.py in a layout."""

    family: str
    layout: dict


@dataclass(frozen=True)
class Scored:
    """The scores of each text's tokens before the first update, the statistics of each, and what was exported then."""

    scores: dict[str, list[float]]
    stats: list[dict[str, float]]
    exported: Path


def pairs(count: int = 6) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(6)  # tokens from 2 on: the embedding of padding (0) is zero, where a norm has no slope
    made = []
    for _ in range(count):
        prompt = [rng.randrange(2, 96) for _ in range(rng.randint(2, 6))]
        chosen, rejected = ([rng.randrange(2, 96) for _ in range(rng.randint(1, 14))] for _ in range(2))
        made.append((prompt + chosen + [1], prompt + rejected + [1]))
    return made


def rows_of_pairs(policy: Policy) -> Packed:
    """Of each data-parallel rank."""
    weight = 1 / len(pairs())
    units = [[Sequence(text, len(text) - 1, weight) for text in pair] for pair in pairs()]
    return pack_units(units, policy.row_shape(72))


def steps() -> list[tuple[list[int], tuple[tuple[int, float], ...]]]:
    """Solutions, and (index, label) of the last tokens of their steps."""
    rng = random.Random(7)
    texts = [text for pair in pairs() for text in pair]
    return [(text, tuple((i, rng.choice([0.0, 0.25, 1.0])) for i in range(1, len(text), 3))) for text in texts]


def rows_of_steps(policy: Policy) -> Packed:
    """Of each data-parallel rank."""
    weight = 1 / sum(len(targets) for _, targets in steps())
    sequences = [Sequence(text, 0, weight, targets=targets) for text, targets in steps()]
    return pack(sequences, policy.row_shape(72))


def train_case(folder: Path, layout: dict, out: Path) -> Scored:
    parallel = Parallel(distributed_optimizer=True, **layout)
    world = join(parallel)
    # A small eps would turn rounding into whole steps.
    policy = Policy(Model(path=folder), parallel, Optimizer(eps=1e-3, clip_grad=0.1), world, head="score")
    rows = rows_of_pairs(policy)[world.dp_rank]
    found = by_sequence(rows, policy.scores(rows))
    stats = [policy.update(rows, pairwise, 2e-3).metrics for _ in range(3)]
    stats.append(policy.update(rows_of_steps(policy)[world.dp_rank], cross_entropy_of_steps, 2e-3).metrics)
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, found)
    policy.export(out)
    # Rated by the modules of a language model in the same layout, to which its weights are lent.
    language = Policy(Model(path=folder, experts="fused"), parallel, Optimizer(), world)
    before, weights = language.logprobs(rows), language.read_reward_model(out)
    for lent, own in zip(language.scores(rows, weights), policy.scores(rows), strict=True):
        torch.testing.assert_close(lent, own, atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, language.logprobs(rows), strict=True))
    parallel_state.destroy_model_parallel()
    return Scored({text: score for part in gathered for text, score in part.items()}, stats, out)


def train_scores(cases: dict[str, ScoreCase], folders: Path, out: Path) -> dict[str, Scored]:
    found = {name: train_case(folders / case.family, case.layout, out / name) for name, case in cases.items()}
    leave()
    return found
