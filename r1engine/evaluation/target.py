"""What is evaluated: a Hugging Face folder, a run or one of its checkpoints, or a server. No torch but to export."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from r1engine import checkpoint
from r1engine.config import ConfigError, StageConfig, load
from r1engine.config.addresses import address_problem
from r1engine.config.stage import Template
from r1engine.evaluation.entries import file_sha256

if TYPE_CHECKING:
    from r1engine.ranks import World

# Of a folder, what decides what is drawn; the weights count by SHA256SUMS or by their index, else by name and size.
IDENTITY = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
WEIGHTS = ("SHA256SUMS", "model.safetensors.index.json")


@dataclass(frozen=True)
class EvaluationTarget:
    """What is evaluated."""

    name: str  # as it was given
    folder: Path | None = None  # of the model; None: a server
    url: str = ""
    template: Template | None = None  # that a run was trained with
    checkpoint: Path | None = None  # to be exported into `folder` first
    identity: dict[str, str] = field(default_factory=dict)


def find_target(given: str) -> EvaluationTarget:
    """The target that the user names.

    Args:
        given: a folder with config.json; a run folder, for its model/; `RUN@step_00000100` or `RUN@100`, for a
            checkpoint of it; a pipeline's folder, for its last stage that has a model; or a URL up to /v1.

    Raises:
        ConfigError: it is none of these, or a run that has no model yet.
    """
    if given.startswith(("http://", "https://")):
        if problem := address_problem(given):
            raise ConfigError(f"evaluate: found {given}, required {problem}")
        return EvaluationTarget(given.rstrip("/"), url=given.rstrip("/"))
    path, _, step = given.partition("@")
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file() and not step:
        return _of_folder(given, folder, None)
    if (folder / "config.yaml").is_file():
        return _of_run(given, folder, step)
    if not step and (stage := _last_stage(folder)) is not None:
        return (
            _of_run(given, stage, "") if (stage / "config.yaml").is_file() else _of_folder(given, stage / "model", None)
        )
    raise ConfigError(
        f"evaluate: found no config.json in {folder}, required a Hugging Face folder, a run folder or a URL"
    )


def _of_folder(given: str, folder: Path, template: Template | None) -> EvaluationTarget:
    identity = {name: file_sha256(folder / name) for name in (*IDENTITY, *WEIGHTS) if (folder / name).is_file()}
    if not any(name in identity for name in WEIGHTS):
        for file in sorted(folder.glob("*.safetensors")):
            identity[file.name] = f"{file.stat().st_size} bytes"
    return EvaluationTarget(given, folder, template=template, identity=identity)


def _of_run(given: str, run: Path, step: str) -> EvaluationTarget:
    template = _template_of(run)
    if not step:
        if (run / "model" / "config.json").is_file():
            return _of_folder(given, run / "model", template)
        steps = checkpoint.complete(run)
        newest = f"its newest checkpoint is {steps[0].name}: {given}@{steps[0].name}" if steps else "no checkpoint"
        raise ConfigError(f"evaluate: run {run} has no model/ yet, required one ({newest})")
    name = f"step_{int(step):08d}" if step.isdigit() else step
    folder = run / "checkpoints" / name
    if not (folder / "manifest.json").is_file():
        known = ", ".join(one.name for one in reversed(checkpoint.complete(run))) or "none"
        raise ConfigError(f"evaluate: found no whole checkpoint {name} in {run}, required one of {known}")
    identity = {"checkpoint": name, "manifest.json": file_sha256(folder / "manifest.json")}
    exported = run / "exported" / name
    return EvaluationTarget(given, exported, template=template, checkpoint=folder, identity=identity)


def _last_stage(folder: Path) -> Path | None:
    """The stage of a pipeline's folder that was finished last and has a model."""
    finished = []
    for path in folder.glob("*/stage.json"):
        if (path.parent / "model" / "config.json").is_file():
            finished.append((json.loads(path.read_text())["finished"], path.parent))
    return max(finished)[1] if finished else None


def _template_of(run: Path) -> Template | None:
    """How the run's questions were shown."""
    cfg: StageConfig = load(run / "config.yaml", [])
    return cfg.data.template


def export_checkpoint(target: EvaluationTarget, world: World) -> None:
    """Writes the weights of the target's checkpoint as a Hugging Face folder, unless they are there. Collective.

    The model is built as the run's configuration says, in its layout.

    Raises:
        ConfigError: the ranks do not fit that layout.
    """
    from r1engine.config import check_world
    from r1engine.model import parallel
    from r1engine.model.policy import Policy

    assert target.checkpoint is not None and target.folder is not None
    if world.from_first(lambda: _is_exported(target)):
        return
    run = target.checkpoint.parent.parent
    cfg: StageConfig = load(run / "config.yaml", [])
    check_world(cfg, world.size)
    start = run / "start"  # what a stage with a chat template trains from
    model = cfg.model.model_copy(update={"path": start}) if (start / "config.json").is_file() else cfg.model
    layout = parallel.join(cfg.parallel)
    try:
        policy = Policy(model, cfg.parallel, cfg.optimizer, layout, seed=cfg.seed)
        with policy.awake():
            policy.load(target.checkpoint / "model")
            policy.export(target.folder, identity={"checkpoint": target.identity["manifest.json"]})
    finally:
        parallel.leave_layout()


def _is_exported(target: EvaluationTarget) -> bool:
    from r1engine.hf.export import is_unfinished

    folder = target.folder
    assert folder is not None
    return (folder / "config.json").is_file() and not is_unfinished(folder)
