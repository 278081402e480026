"""What each kind of stage does in a pipeline: one `if` a kind, here alone."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from r1engine.config import (
    ConfigError,
    CurateConfig,
    DrawingConfig,
    EvaluateConfig,
    KindConfig,
    LabelConfig,
    PairsConfig,
    SampleConfig,
    SearchConfig,
    SearchDataConfig,
    StageConfig,
    TinyChainConfig,
    TinyChainReportConfig,
    TinyChainTruthConfig,
    TinyConfig,
    TinyR1Config,
    check_files,
    check_world,
)
from r1engine.config.data_files import missing
from r1engine.pipeline.manifest import digest

if TYPE_CHECKING:
    from r1engine.ending import Ending
    from r1engine.ranks import World

OF_THE_RUN = ("of_steps", "starts", "seconds")  # of summary.json, not of what was learned


def run_kind(cfg: KindConfig, world: World, ending: Ending | None) -> dict[str, Any]:
    """One stage to its end. Called on every rank, unless the kind is one that the first rank does alone.

    Args:
        cfg:    of the stage.
        world:  the ranks.
        ending: listens to the signals that end a run.

    Returns:
        What its manifest tells of it, as JSON values.

    Raises:
        ConfigError: the stage cannot run.
        Ended: a signal asked for it; what is made so far is kept.
    """
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    if isinstance(cfg, StageConfig):
        from r1engine.run import train
        from r1engine.stages.check import check_start

        world.once_a_node(lambda: check_start(cfg, world.size))
        train(cfg, ending)
        return _summary(cfg)
    return _make(cfg) if cfg.ALONE else _draw(cfg, world)


def _make(cfg: KindConfig) -> dict[str, Any]:
    """What the first rank does alone."""
    if isinstance(cfg, CurateConfig):
        from r1engine.pipeline.curate import curate

        return curate(cfg)
    if isinstance(cfg, PairsConfig):
        from r1engine.pipeline.pairs import make_pairs

        return make_pairs(cfg)
    if isinstance(cfg, SearchDataConfig):
        from r1engine.sampling.search_data import write_search_data

        return write_search_data(cfg)
    if isinstance(cfg, TinyChainReportConfig):
        from r1engine.sampling.chain_page import write_chain_page

        return write_chain_page(cfg)
    _make_world(cfg)
    return {}


def _make_world(cfg: KindConfig) -> None:
    """The demonstrations' worlds, and the truth of one."""
    from r1engine.demo import tiny, tiny_chain, tiny_r1

    if isinstance(cfg, TinyConfig):
        tiny.write_world(cfg)
    elif isinstance(cfg, TinyR1Config):
        tiny_r1.write_world(cfg)
    elif isinstance(cfg, TinyChainConfig):
        tiny_chain.write_world(cfg)
    elif isinstance(cfg, TinyChainTruthConfig):
        tiny_chain.write_truth(cfg)
    else:
        raise TypeError(f"run_kind: found a {type(cfg).__name__}, required a configuration with a line here")


def _draw(cfg: KindConfig, world: World) -> dict[str, Any]:
    """What all ranks do without training."""
    from r1engine.run import set_up_torch

    digests = world.from_first(lambda: {key: digest(path) for key, path in cfg.inputs().items()})
    if isinstance(cfg, DrawingConfig):
        set_up_torch(cfg.as_run())
    if isinstance(cfg, SampleConfig):
        from r1engine.sampling.sample import sample

        return sample(cfg, world, digests)
    if isinstance(cfg, LabelConfig):
        from r1engine.sampling.labelling import label

        return label(cfg, world, digests)
    if isinstance(cfg, SearchConfig):
        from r1engine.sampling.searching import search

        return search(cfg, world, digests)
    if isinstance(cfg, EvaluateConfig):
        from r1engine.sampling.evaluate import evaluate

        set_up_torch(cfg.as_run(0))
        return evaluate(cfg, world, digests)
    raise TypeError(f"run_kind: found a {type(cfg).__name__}, required a configuration with a line here")


def _summary(cfg: StageConfig) -> dict[str, Any]:
    """The numbers of the summary that a run has written; those of other ranks are not asked for."""
    path = cfg.run_dir / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in found.items() if isinstance(value, int | float) and key not in OF_THE_RUN}


def check_layout(cfg: KindConfig, world_size: int) -> None:
    """Whether so many processes can run the stage.

    Raises:
        ConfigError: they cannot.
    """
    if isinstance(cfg, StageConfig):
        check_world(cfg, world_size)


def input_problems(cfg: KindConfig) -> list[str]:
    """Inputs that are not there: "key: ...", one line each."""
    if isinstance(cfg, StageConfig):
        try:
            check_files(cfg)
        except ConfigError as error:
            return error.problems
        return []
    return missing(cfg.inputs())


def dry_run(cfg: KindConfig, world_size: int, *, is_whole: bool, is_live: bool) -> list[str]:
    """Everything that can be known of a stage before it runs; returns what the user should know. Loads no torch.

    Args:
        cfg:        of the stage.
        world_size: processes that will run it.
        is_whole:   whether all of its inputs are there.
        is_live:    try the sandbox of this machine and ask the servers, too.

    Raises:
        ConfigError: the stage could not start.
    """
    if isinstance(cfg, StageConfig):
        from r1engine.stages import check

        return check.dry_run(cfg, world_size, is_live=is_live) if is_whole else check.check_rows(cfg)
    if isinstance(cfg, DrawingConfig) and is_whole:
        return _dry_drawing(cfg, is_live)
    if isinstance(cfg, CurateConfig) and is_whole:
        from r1engine.pipeline.curate import check as check_rows

        return check_rows(cfg)
    if isinstance(cfg, PairsConfig) and is_whole:
        from r1engine.pipeline.pairs import check as check_answers

        return check_answers(cfg)
    return []


def _dry_drawing(cfg: DrawingConfig, is_live: bool) -> list[str]:
    """The same of what draws: as a run that reads the questions, and its scorer's folder."""
    from r1engine.stages import check

    if problems := input_problems(cfg):
        raise ConfigError(problems)
    try:
        if isinstance(cfg, SearchConfig) and cfg.scorer is not None and cfg.scorer.format == "auto":
            from r1engine.search.formats import format_of_folder

            format_of_folder(cfg.scorer.path)
        return check.dry_run(cfg.as_run(), 1, is_live=is_live)
    except ConfigError as error:  # names the keys of a run
        keys = {f"data.{ours}": theirs for theirs, ours in cfg.OF_A_RUN.items()}
        keys |= {", or leave them out by data.overlong=skip": ""}  # which it has not: every question is asked
        names = re.compile("|".join(map(re.escape, keys)))
        raise ConfigError([names.sub(lambda key: keys[key[0]], one) for one in error.problems]) from error
    except (ValueError, OSError) as error:  # of the scorer
        raise ConfigError.of(error) from error
