"""Reads a stage's configuration from a YAML file, checks it against files and ranks, and writes it out resolved."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, TypeVar

from r1engine.config.curate import CurateConfig
from r1engine.config.data_files import HUB, REQUIRED, data_files, is_data_file
from r1engine.config.evaluate import EvaluateConfig
from r1engine.config.kind import KindConfig
from r1engine.config.label import LabelConfig
from r1engine.config.pairs import PairsConfig
from r1engine.config.process import ProcessRewardConfig
from r1engine.config.reward_model import RewardModelConfig
from r1engine.config.rewards import Rewards
from r1engine.config.rl import RlConfig
from r1engine.config.sample import SampleConfig
from r1engine.config.search_data import SearchDataConfig
from r1engine.config.searching import SearchConfig
from r1engine.config.sft import SftConfig
from r1engine.config.source import ConfigError, Source, read_overrides, read_source, validate, write_yaml
from r1engine.config.stage import StageConfig
from r1engine.config.tiny import TinyConfig
from r1engine.config.tiny_chain import TinyChainConfig, TinyChainReportConfig, TinyChainTruthConfig
from r1engine.config.tiny_r1 import TinyR1Config

KINDS: dict[str, type[KindConfig]] = {
    "rl": RlConfig,
    "sft": SftConfig,
    "reward_model": RewardModelConfig,
    "process_reward": ProcessRewardConfig,
    "sample": SampleConfig,
    "search": SearchConfig,
    "search_data": SearchDataConfig,
    "label": LabelConfig,
    "evaluate": EvaluateConfig,
    "tiny": TinyConfig,
    "tiny_r1": TinyR1Config,
    "tiny_chain": TinyChainConfig,
    "tiny_chain_truth": TinyChainTruthConfig,
    "tiny_chain_report": TinyChainReportConfig,
    "curate": CurateConfig,
    "pairs": PairsConfig,
}
Kind = TypeVar("Kind", bound=KindConfig)
# What pip calls the packages that only some runs need.
PIP = {
    "wandb": "wandb",
    "mlflow": "mlflow-skinny",
    "trackio": "trackio",
    "swanlab": "swanlab",
    "prometheus_client": "prometheus-client",
}


def load(
    path: Path,
    overrides: list[str],
    kind: type[Kind] = StageConfig,  # type: ignore[assignment]  # a type variable has no default before Python 3.13
) -> Kind:
    """The configuration of one stage, from a YAML file with `key.sub=value` overrides applied in order.

    Args:
        path:      YAML 1.2 file with what differs from the defaults. Its key `stage` names the kind;
                   absent: the only one that the caller can use, else rl.
        overrides: each "key.sub=value", the value in YAML ("rollout.max_tokens={0: 32, 10: 64}").
        kind:      what the caller can use: any stage of training, if nothing else is said.

    Raises:
        ConfigError: anything that cannot run, or another kind of stage; every problem found is listed.
    """
    source = read_source(Path(path), overrides)
    if "stages" in source.data:
        raise ConfigError(f"{path}: found a pipeline (key `stages`), required one stage; run it with r1engine pipeline")
    usable = [name for name, of_kind in KINDS.items() if issubclass(of_kind, kind)]
    if len(usable) == 1:
        source.data.setdefault("stage", usable[0])
    cfg = parse(source)
    if not isinstance(cfg, kind):
        raise ConfigError(f"{source.origin(('stage',))}stage: found {cfg.stage}, required {', '.join(usable)} here")
    if problems := cfg.source_problems():
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return cfg


def parse(source: Source) -> KindConfig:
    """Values as the configuration of the kind of stage that they name.

    Raises:
        ConfigError: there is no such kind, or a key or a value is wrong; every problem is listed.
    """
    stage = source.data.get("stage", "rl")
    if not isinstance(stage, str) or stage not in KINDS:
        found = f"{source.origin(('stage',))}stage: found {stage!r}"
        raise ConfigError(f"{found}, required one of {', '.join(KINDS)}")
    return validate(KINDS[stage], source, KINDS)


def load_rewards(overrides: list[str]) -> Rewards:
    """Section `rewards` with `key.sub=value` overrides of its keys, for scoring outside of a run. The keys may be
    written as a run has them, with `rewards.` in front.

    Raises:
        ConfigError: an override is none, or names no key or value of the section.
    """
    # A model that is named is meant to be asked: its weight is of no matter here.
    rewards = validate(Rewards, read_overrides([override.removeprefix("rewards.") for override in overrides]))
    if problems := rewards.server_problems() + rewards.function_problems():
        raise ConfigError(problems)
    return rewards


def to_yaml(cfg: KindConfig) -> str:
    """The resolved configuration as YAML text, every key included."""
    return write_yaml(plain(cfg.model_dump()))


def dump(cfg: KindConfig, path: Path) -> None:
    """Writes the resolved configuration; `load` of the file gives an equal one."""
    temporary = path.with_name(path.name + ".tmp")  # a reader never sees half a file
    temporary.write_text(to_yaml(cfg), encoding="utf-8")
    os.replace(temporary, path)


def check_files(cfg: StageConfig) -> None:
    """Looks at the input files, and for the packages of the trackers, before anything heavy is imported.

    Raises:
        ConfigError: the model folder, a data file or a package is not there; every problem is listed.
    """
    problems = []
    if cfg.model.path is not None and not os.path.isfile(cfg.model.path / "config.json"):
        hint = _hub_hint(cfg.model.path)
        problems.append(f"model.path: found no config.json in {cfg.model.path}, required a Hugging Face folder{hint}")
    for key, file in cfg.input_files().items():
        try:
            if not os.path.isfile(data_files(file)[0]):
                problems.append(f"{key}: found no file {file}, required {REQUIRED}{_hub_hint(file)}")
        except ValueError as error:
            problems.append(f"{key}: {error}")
    for package in (*cfg.log.trackers, *(("prometheus_client",) if cfg.log.prometheus_port is not None else ())):
        if importlib.util.find_spec(package) is None:
            problems.append(f"log: found no package {package}, required by its keys; `pip install {PIP[package]}`")
    if problems:
        raise ConfigError(problems)


def _hub_hint(path: Path) -> str:
    """How to name what may be meant on the Hugging Face Hub: OWNER/NAME without an ending of a file."""
    is_a_name = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists() and not is_data_file(path)
    return f" (on the Hugging Face Hub: {HUB}{path})" if is_a_name else ""


def check_world(cfg: StageConfig, world_size: int) -> int:
    """Number of data-parallel ranks when `world_size` processes run this configuration.

    Raises:
        ConfigError: the parallel sizes do not make up the world, or the batch does not divide by them.
    """
    try:
        data_ranks = cfg.parallel.data_ranks(world_size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if problems := cfg.world_problems(data_ranks):
        raise ConfigError(problems)
    return data_ranks


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings, also those in lists, as one: dotted key -> value."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, list) and any(isinstance(one, dict) for one in item):
            item = dict(enumerate(item))
        found |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item}
    return found


def plain(value: Any) -> Any:
    """Nested values with paths as text: the form that YAML and JSON take."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
