"""A pipeline: stages in order, each with its own configuration; a later one takes what an earlier one made.

    run_dir: runs/demo
    seed: 0
    stages:
      base: {stage: sft, model: {path: tiny}, data: {train: tiny/texts.jsonl}}

A path that begins with the name of an earlier stage is taken from that stage's folder, run_dir/<name>; as `model.path`
the name alone means the model that the stage made. Names refer upwards only, so there is no cycle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1engine.config.read import parse
from r1engine.config.rl import RlConfig
from r1engine.config.section import Count, LocalPath, Section
from r1engine.config.sft import SftConfig
from r1engine.config.source import ConfigError, KeyPath, Source, read_source, validate
from r1engine.config.stage import Parallel, StageConfig
from r1engine.config.tiny import TinyConfig

REFERENCES = (("model", "path"), ("data", "train"), ("data", "heldout"))  # keys that may name a stage
NAME = re.compile(r"[a-z][a-z0-9_.-]*")


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a pipeline, resolved."""

    name: str
    cfg: RlConfig | SftConfig | TinyConfig
    needs: dict[str, str]  # key of the configuration -> earlier stage that it is taken from


@dataclass(frozen=True)
class Pipeline:
    """Stages in the order in which they run."""

    run_dir: Path
    stages: list[PlannedStage]

    @property
    def timeout_minutes(self) -> int:
        """The longest that a rank waits for the others in any stage."""
        layouts = [stage.cfg.parallel for stage in self.stages if isinstance(stage.cfg, StageConfig)]
        return max((layout.timeout_minutes for layout in layouts), default=Parallel().timeout_minutes)


class PipelineFile(Section):
    """The keys at the top of a pipeline file."""

    run_dir: LocalPath
    """Folder of the pipeline; each stage has its own inside."""
    seed: Count = 0
    """Seed of every stage that names none."""
    stages: dict[str, dict[str, Any]]
    """Name -> configuration of the stage, in the order in which they run; `config` names a file to start from."""


def load_pipeline(path: Path, overrides: list[str]) -> Pipeline:
    """The stages of a YAML file with overrides ("stages.base.sft.epochs=3", "seed=1") applied in order.

    Raises:
        ConfigError: a kind, key or value is wrong, or a stage refers to one that is not above it; every problem of the
            first wrong stage is listed.
    """
    source = read_source(Path(path), overrides)
    file = validate(PipelineFile, source)
    stages: list[PlannedStage] = []
    for name in file.stages:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{source.origin(('stages', name))}stages: found the name {name!r}, required {NAME.pattern}"
            )
        stages.append(_planned(name, _part(source, name), file, {stage.name for stage in stages}))
    if not stages:
        raise ConfigError(f"{source.origin(('stages',))}stages: found none, required at least one")
    return Pipeline(file.run_dir, stages)


def _part(source: Source, name: str) -> Source:
    """The values of one stage, over those of the file that it starts from."""
    prefix: KeyPath = ("stages", name)
    data = dict(source.data["stages"][name])
    where = {key[2:]: place for key, place in source.where.items() if key[:2] == prefix and len(key) > 2}
    if (start := data.pop("config", None)) is None:
        return Source(data, where)
    if not isinstance(start, str):
        raise ConfigError(f"{source.origin((*prefix, 'config'))}stages.{name}.config: found {start!r}, required a path")
    base = read_source(Path(start), [])
    base.data.pop("run_dir", None)  # a file that can run alone names one
    return Source(_merged(base.data, data), base.where | where)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping."""
    shared = [key for key in base if isinstance(base[key], dict) and isinstance(over.get(key), dict)]
    return base | over | {key: _merged(base[key], over[key]) for key in shared}


def _planned(name: str, source: Source, file: PipelineFile, earlier: set[str]) -> PlannedStage:
    if "run_dir" in source.data:
        raise ConfigError(f"{source.origin(('run_dir',))}stages.{name}.run_dir: a stage's folder is run_dir/{name}")
    data = {"seed": file.seed} | source.data | {"run_dir": str(file.run_dir / name)}
    needs: dict[str, str] = {}
    try:
        for section, key in REFERENCES:
            values = data.get(section)
            if not isinstance(values, dict) or not isinstance(values.get(key), str):
                continue
            stage, *rest = Path(values[key]).parts or ("",)
            if stage in earlier:
                needs[f"{section}.{key}"] = stage
                made = Path(*rest) if rest else Path("model")
                data[section] = values | {key: str(file.run_dir / stage / made)}
            elif stage in file.stages:
                found = f"{source.origin((section, key))}{section}.{key}: found stage '{stage}'"
                raise ConfigError(f"{found}, required one above '{name}': stages run in the order of the file")
        cfg = parse(Source(data, source.where))
        if isinstance(cfg, StageConfig) and (problems := cfg.source_problems()):
            raise ConfigError(problems)
    except ConfigError as error:
        raise ConfigError([f"stage {name}: {problem}" for problem in error.problems]) from None
    return PlannedStage(name, cfg, needs)
