"""A pipeline: stages in order, each with its own configuration; a later one takes what an earlier one made.

    run_dir: runs/demo
    seed: 0
    stages:
      base: {stage: sft, model: {path: tiny}, data: {train: tiny/texts.jsonl}}

A path that begins with the name of an earlier stage is taken from that stage's folder, run_dir/<name>; the name alone
means the model or the data that the stage made. Names refer upwards only, so there is no cycle.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1engine.config.data_files import is_on_hub
from r1engine.config.kind import KindConfig
from r1engine.config.read import parse
from r1engine.config.section import Count, LocalPath, Section
from r1engine.config.source import ConfigError, KeyPath, Source, read_source, validate
from r1engine.config.stage import Parallel, StageConfig

# Keys that may name a stage, and what its name alone means there; * is any key of a mapping or place in a list.
REFERENCES = {
    "model.path": "model",
    "models.*.path": "model",
    "rewards.helpfulness_model.path": "model",
    "rewards.harmlessness_model.path": "model",
    "data.train": "data",
    "data.more.*.path": "data",
    "data.heldout": "data",
    "sources.*": "data",
    "candidates.*": "data",
    "decontaminate.*": "data",
    "questions": "data",
    "steps": "data",  # of what labels anew; a mapping elsewhere
    "scorer.path": "model",
    "rewards.process_model": "model",
    "searches.*": "data",
    "trained.*": "model",
    "search.tokens_of": "data",
}
Fetch = Callable[[str, str, str], Path]  # (name on the Hub, key, "model" or "data") -> local path; ValueError: why not
NAME = re.compile(r"[a-z][a-z0-9_.-]*")


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a pipeline, resolved."""

    name: str
    cfg: KindConfig
    needs: dict[str, str]  # key of the configuration -> earlier stage that it is taken from
    fetched: dict[str, str] = field(default_factory=dict)  # key of the configuration -> its name on the Hub


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

    def until(self, name: str) -> Pipeline:
        """The stages down to this one.

        Raises:
            ConfigError: there is none of this name.
        """
        return Pipeline(self.run_dir, self.stages[: self.place(name) + 1])

    def after(self, name: str) -> list[PlannedStage]:
        """The stages that are made from this one, directly or through others.

        Raises:
            ConfigError: there is none of this name.
        """
        made = {self.stages[self.place(name)].name}
        for stage in self.stages:
            if made & set(stage.needs.values()):
                made.add(stage.name)
        return [stage for stage in self.stages if stage.name in made - {name}]

    def place(self, name: str) -> int:
        """Of the stage in `stages`.

        Raises:
            ConfigError: there is none of this name.
        """
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ConfigError(f"found no stage '{name}', required one of {', '.join(names)}")
        return names.index(name)


class PipelineFile(Section):
    """The keys at the top of a pipeline file."""

    run_dir: LocalPath
    """Folder of the pipeline; each stage has its own inside."""
    seed: Count = 0
    """Seed of every stage that names none."""
    stages: dict[str, dict[str, Any]]
    """Name -> configuration of the stage, in the order in which they run; `config` names a file to start from."""


def is_pipeline(path: Path) -> bool:
    """Whether a YAML file holds the stages of a pipeline, and not one stage.

    Raises:
        ConfigError: it cannot be read.
    """
    return "stages" in read_source(Path(path), []).data


def load_pipeline(path: Path, overrides: list[str], fetch: Fetch | None = None) -> Pipeline:
    """The stages of a YAML file with overrides ("stages.base.sft.epochs=3", "seed=1") applied in order.

    Args:
        path:      of the file.
        overrides: in their order.
        fetch:     gives the local path of what is named on the Hugging Face Hub; None: the name stays.

    Raises:
        ConfigError: a kind, key or value is wrong, or a stage refers to one that is not above it; every problem of the
            first wrong stage is listed.
    """
    source = read_source(Path(path), overrides)
    return plan(validate(PipelineFile, source), source, fetch)


def plan(file: PipelineFile, source: Source, fetch: Fetch | None = None) -> Pipeline:
    """The stages of a file; `source` is what it was read from, `fetch` as of `load_pipeline`.

    Raises:
        ConfigError: see `load_pipeline`.
    """
    stages: list[PlannedStage] = []
    for name in file.stages:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{source.origin(('stages', name))}stages: found the name {name!r}, required {NAME.pattern}"
            )
        earlier = {stage.name: stage.cfg for stage in stages}
        stages.append(_planned(name, _part(source, name), file, earlier, fetch))
    if not stages:
        raise ConfigError(f"{source.origin(('stages',))}stages: found none, required at least one")
    return Pipeline(file.run_dir, stages)


def _part(source: Source, name: str) -> Source:
    """The values of one stage, over those of the files that it starts from."""
    prefix: KeyPath = ("stages", name)
    data = dict(source.data["stages"][name])
    where = {key[2:]: place for key, place in source.where.items() if key[:2] == prefix and len(key) > 2}
    starts = data.pop("config", None)
    values: dict[str, Any] = {}
    places: dict[KeyPath, str] = {}
    for start in starts if isinstance(starts, list) else [] if starts is None else [starts]:
        if not isinstance(start, str):
            origin = source.origin((*prefix, "config"))
            raise ConfigError(f"{origin}stages.{name}.config: found {starts!r}, required a path, or a list of paths")
        base = read_source(Path(start), [])
        base.data.pop("run_dir", None)  # a file that can run alone names one
        values, places = _merged(values, base.data), places | base.where
    return Source(_merged(values, data), places | where)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping."""
    shared = [key for key in base if isinstance(base[key], dict) and isinstance(over.get(key), dict)]
    return base | over | {key: _merged(base[key], over[key]) for key in shared}


def _planned(
    name: str, source: Source, file: PipelineFile, earlier: dict[str, KindConfig], fetch: Fetch | None
) -> PlannedStage:
    if "run_dir" in source.data:
        raise ConfigError(f"{source.origin(('run_dir',))}stages.{name}.run_dir: a stage's folder is run_dir/{name}")
    data: Any = {"seed": file.seed} | source.data | {"run_dir": str(file.run_dir / name)}
    needs: dict[str, str] = {}
    fetched: dict[str, str] = {}
    names = _Names(name, file, earlier)

    def resolve(key: KeyPath, text: str, what: str) -> str:
        dotted = ".".join(key)
        try:
            if is_on_hub(Path(text)):
                fetched[dotted] = text
                return text if fetch is None else str(fetch(text, dotted, what))
            stage, path = names.resolve(text, what)
        except ValueError as error:
            raise ConfigError(f"{source.origin(key)}{dotted}: {error}") from None
        if stage:
            needs[dotted] = stage
        return path

    try:
        for pattern, what in REFERENCES.items():
            data = _resolved(data, (), tuple(pattern.split(".")), what, resolve)
        cfg = parse(Source(data, source.where))
        if problems := cfg.source_problems():
            raise ConfigError(problems)
    except ConfigError as error:
        raise ConfigError([f"stage {name}: {problem}" for problem in error.problems]) from None
    return PlannedStage(name, cfg, needs, fetched)


def _resolved(value: Any, at: KeyPath, pattern: KeyPath, what: str, resolve: Any) -> Any:
    """A copy of `value` in which every text that the pattern leads to is replaced by `resolve(key, text, what)`."""
    if not pattern:
        return resolve(at, value, what) if isinstance(value, str) else value
    if isinstance(value, list) and pattern[0] == "*":
        return [_resolved(item, (*at, str(i)), pattern[1:], what, resolve) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    keys = list(value) if pattern[0] == "*" else [pattern[0]] if pattern[0] in value else []
    return value | {key: _resolved(value[key], (*at, str(key)), pattern[1:], what, resolve) for key in keys}


@dataclass(frozen=True)
class _Names:
    """What a path of the stage `name` means."""

    name: str
    file: PipelineFile
    earlier: dict[str, KindConfig]

    def resolve(self, text: str, what: str) -> tuple[str, str]:
        """The stage that a path is taken from ("" if none), and the path itself.

        Raises:
            ValueError: it names a stage that is not above, or that makes no such thing; or nearly one that is above.
        """
        stage, *rest = Path(text).parts or ("",)
        if stage in self.earlier:
            makes = self.earlier[stage].MAKES
            if not rest and what not in makes:
                raise ValueError(
                    f"'{stage}' (stage: {self.earlier[stage].stage}) gives {', '.join(makes) or 'nothing'}, "
                    f"required {'a model' if what == 'model' else 'data'}{self._instead(what)}"
                )
            return stage, str(Path(self.file.run_dir, stage, *(rest or [makes[what]])))
        if stage in self.file.stages:
            raise ValueError(
                f"found stage '{stage}', required one above '{self.name}': stages run in the order of the file"
            )
        close = difflib.get_close_matches(stage, [*self.earlier], n=1) if not Path(text).exists() else []
        if close and not Path(stage).exists():
            raise ValueError(f"found '{text}', required a path or a stage above; did you mean '{close[0]}'?")
        return "", text

    def _instead(self, what: str) -> str:
        able = [name for name, cfg in self.earlier.items() if what in cfg.MAKES]
        return f" ({', '.join(able)}, or a path)" if able else ""
