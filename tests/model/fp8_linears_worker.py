"""What test_fp8_linears.py runs on one rank and on two, with the fake Transformer Engine on its path.

fp8_linears_worker.py FOLDERS OUT: reads FOLDERS/<family>, writes OUT/<ranks>.pt (results by case), OUT/<case> (exported
folders) and, on one rank, OUT/checkpoint.
"""

import itertools
import multiprocessing
import os
import random
import sys
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore")

from megatron.core import parallel_state  # noqa: E402
from ranks import on_ranks  # noqa: E402
from transformer_engine.pytorch.distributed import checkpoints  # noqa: E402

from r1engine.batch import Sequence, pack  # noqa: E402
from r1engine.config import RlConfig  # noqa: E402
from r1engine.model.cpu import runs_on_cpu  # noqa: E402
from r1engine.model.layers.fp8 import machine_problem  # noqa: E402
from r1engine.model.parallel import World, join, leave  # noqa: E402
from r1engine.model.policy import Policy  # noqa: E402
from r1engine.stages.sft import cross_entropy  # noqa: E402

PLAIN = {"experts": "fused"}
FP8 = PLAIN | {"fp8": True}


def rows(policy: Policy) -> list:
    rng = random.Random(3)
    tokens = [[rng.randrange(2, 96) for _ in range(rng.randint(2, 60))] for _ in range(18)]  # more than a row
    items = [Sequence(t, 1, rng.random() / 18) for t in tokens]
    return pack(items, policy.row_shape(512))[0]


def logps(policy: Policy) -> dict[str, list[float]]:
    """{tokens of a sequence: its log-probabilities}, without the padding."""
    batch = rows(policy)
    return {
        str(row.tokens[a:b].tolist()): logp[a:b].tolist()
        for row, logp in zip(batch, policy.logprobs(batch), strict=True)
        for a, b in itertools.pairwise(row.cu_seqlens.tolist())
        if row.loss_weight[a:b].any()
    }


def without_autocast(policy: Policy) -> dict[str, list[float]]:
    """Of the same linears in the weights' precision."""
    config = policy.chunks[0].module.config
    config.fp8 = None
    try:
        return logps(policy)
    finally:
        config.fp8 = "e4m3"


def modules_in_fp8(policy: Policy) -> list[str]:
    """Names of the linears that have computed in FP8."""
    return sorted(name for name, m in policy.chunks[0].module.named_modules() if getattr(m, "fp8_meta", None))


def num_copies(policy: Policy) -> int:
    return sum(len(getattr(m, "_fp8_workspaces", ())) for m in policy.chunks[0].modules())


@runs_on_cpu
def extra_states(policy: Policy) -> list:
    """What a checkpoint keeps of the linears beside tensors."""
    return [name for name in policy._model().sharded()["0"] if name.endswith("_extra_state")]


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.weights()}


def study(folder: Path, world: World, parallel: dict, out: Path) -> dict:
    """One family in one layout: built, exported, and two updates."""
    policy = make(folder, world, FP8, parallel)
    policy.export(out)
    found = {"multiple": policy.row_multiple, "names": [n for n, _ in policy.chunks[0].named_parameters()]}
    found["unquantized"], found["logp"] = without_autocast(policy), logps(policy)
    found["in fp8"] = modules_in_fp8(policy)
    found["stats"] = [policy.update(rows(policy), cross_entropy, 1e-3).metrics for _ in range(2)]
    return found


def make(folder: Path, world: World, model: dict, parallel: dict | None = None) -> Policy:
    cfg = RlConfig(model={"path": folder} | model, parallel=parallel or {}, optimizer={"eps": 1e-3})
    return Policy(cfg.model, cfg.parallel, cfg.optimizer, world)


def local(folder: Path, world: World) -> dict:
    """The same with Megatron's own linears."""
    policy = make(folder, world, PLAIN)
    found = {"names": [n for n, _ in policy.chunks[0].named_parameters()], "logp": logps(policy)}
    return found | {"stats": [policy.update(rows(policy), cross_entropy, 1e-3).metrics for _ in range(2)]}


def recomputed(folder: Path, world: World) -> dict:
    """recompute -> statistics of an update, and how many checkpoints of Transformer Engine there were."""
    found = {}
    for recompute in (False, True, "selective"):
        policy, before = make(folder, world, FP8 | {"recompute": recompute}), len(checkpoints)
        stats = policy.update(rows(policy), cross_entropy, 1e-3).metrics
        found[str(recompute)] = {"stats": stats, "checkpoints": len(checkpoints) - before}
    return found


def renewed(folder: Path, world: World) -> dict:
    """Log-probabilities before and after an update, of the snapshot made before it, and after that."""
    policy = make(folder, world, FP8)
    snapshot, batch = policy.snapshot(), rows(policy)
    found = {"start": policy.logprobs(batch)[0]}
    policy.update(batch, cross_entropy, 1e-2)
    found |= {"moved": policy.logprobs(batch)[0], "reference": policy.reference_logprobs(snapshot, batch)[0]}
    return found | {"again": policy.logprobs(batch)[0], "copies": num_copies(policy)}


def resumed(folder: Path, world: World, out: Path) -> dict:
    """A checkpoint read with and without FP8, and one of Megatron's linears read with FP8: weights and next update."""
    found = {}
    for written in ("fp8", "plain"):
        policy = make(folder, world, FP8 if written == "fp8" else PLAIN)
        policy.update(rows(policy), cross_entropy, 1e-2)
        checkpoint = out / written
        checkpoint.mkdir(parents=True)
        policy.save(checkpoint, None)
        found[written] = {
            "states": extra_states(policy),
            "saved": weights(policy),
            "next": policy.update(rows(policy), cross_entropy, 1e-2).metrics,
        }
        for read in ("fp8", "plain"):
            other = make(folder, world, FP8 if read == "fp8" else PLAIN)
            other.load(checkpoint, has_snapshot=False)
            loaded = weights(other)
            found[written][read] = {"loaded": loaded, "next": other.update(rows(other), cross_entropy, 1e-2).metrics}
    return found


def problem_of_the_machine() -> str | None:
    os.environ["FAKE_TE_LACKS"] = "compute capability 9.0 is required"
    try:
        return machine_problem()
    finally:
        del os.environ["FAKE_TE_LACKS"]


def rank_main(folders: Path, out: Path) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    parallel = {"tensor": ranks}
    world = join(RlConfig(parallel=parallel).parallel)
    found = {f: study(folders / f, world, parallel, out / f"{f}-{ranks}") for f in ("qwen2", "deepseek")}
    if ranks == 1:
        found["problem"] = machine_problem(), problem_of_the_machine()
        for family in ("qwen2", "deepseek"):
            found[f"{family}-local"] = local(folders / family, world)
            found[f"{family}-recomputed"] = recomputed(folders / family, world)
        found["renewed"] = renewed(folders / "qwen2", world)
        found["resumed"] = resumed(folders / "qwen2", world, out / "checkpoint")
    else:
        whole_rows = parallel | {"sequence": False}
        found["qwen2-whole-rows"] = study(folders / "qwen2", world, whole_rows, out / "qwen2-whole-rows")
        parallel_state.destroy_model_parallel()
        parallel = {"context": 2}
        world = join(RlConfig(parallel=parallel).parallel)
        found["deepseek-context"] = study(folders / "deepseek", world, parallel, out / "deepseek-context")
    if world.is_first:
        torch.save(found, out / f"{ranks}.pt")
    leave()


if __name__ == "__main__":
    for ranks in (1, 2):
        on_ranks(ranks, rank_main, *map(Path, sys.argv[1:]), context=multiprocessing.get_context("fork"))
