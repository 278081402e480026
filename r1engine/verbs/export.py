"""`r1engine export`: any checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path

from r1engine import checkpoint
from r1engine.config import Parallel, StageConfig, check_world, load
from r1engine.hf.formats import Precision
from r1engine.model.parallel import join
from r1engine.model.policy import Policy
from r1engine.observe.starts import model_card
from r1engine.stages.identity import check_same, model_identity


def export(source: Path, target: Path, precision: Precision | None, overrides: list[str], *, best: bool = False) -> int:
    """Write the weights of a checkpoint into `target`, with the model card. Called on every rank.

    Args:
        source:    a run's folder (its newest whole checkpoint), or one of its checkpoints.
        target:    folder to write.
        precision: number format; None: that of the model's weights here.
        best:      of a run's folder, the checkpoint that `checkpoint.best` keeps.
        overrides: `key=value` of the run's configuration, such as `parallel.tensor=8`.

    Returns:
        Optimizer steps that the model has been trained.

    Raises:
        ValueError: `source` is neither, or the model that the run began with is another one by now.
        RuntimeError: the checkpoint is damaged, `target` holds other weights, or the disk is full.
    """
    run_dir, folder = find_checkpoint(source, best=best)
    cfg = load(run_dir / "config.yaml", overrides, StageConfig)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # one process has it all, whatever the layout of the run was
        cfg = cfg.model_copy(update={"parallel": Parallel(timeout_minutes=cfg.parallel.timeout_minutes)})
    check_world(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    begun = run_dir / "start"  # with a chat template the run began there
    model = cfg.model.model_copy(update={"path": begun if begun.is_dir() else cfg.model.folder})
    world = join(cfg.parallel)
    world.from_first(lambda: checkpoint.verify(folder))
    state = checkpoint.read_state(folder)
    policy = Policy(model, cfg.parallel, cfg.optimizer, world)
    here = {key: value for key, value in model_identity(policy, cfg.model.path).items() if key == "model.path"}
    check_same({key: state["identity"][key] for key in here}, here)
    with policy.awake():
        policy.load_weights(folder / "model")
        policy.export(target, precision=precision, card=model_card(cfg, state["step"]))
    world.wait()
    return int(state["step"])


def find_checkpoint(source: Path, *, best: bool = False) -> tuple[Path, Path]:
    """(folder of the run, the checkpoint) that `source` names.

    Raises:
        ValueError: there is none.
    """
    if (source / "manifest.json").is_file():
        return source.absolute().parents[1], source
    if not (source / "config.yaml").is_file():
        raise ValueError(
            f"export: found no config.yaml in {source}, required the folder of a run, or a checkpoint of it"
        )
    if best:
        folder = checkpoint.best(source)
        if folder is None:
            raise ValueError(f"export: found no best checkpoint in {source}, required a run with checkpoint.best")
        return source, folder
    skipped: list[str] = []
    folder = checkpoint.newest_complete(source, skipped.append)
    if folder is None:
        raise ValueError(f"export: found no checkpoint in {source}, required one; {'; '.join(skipped)}".rstrip("; "))
    return source, folder
