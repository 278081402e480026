"""Whether a stage can start: what a dry run says, and every start asks first. No torch, no GPU, seconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from r1engine.config import (
    ConfigError,
    ProcessRewardConfig,
    RewardModelConfig,
    RlConfig,
    SftConfig,
    StageConfig,
    check_files,
    check_world,
)
from r1engine.data.comparisons import read_comparisons
from r1engine.data.conversations import read_conversations
from r1engine.data.presets import reading_of
from r1engine.data.prompts import PromptTable
from r1engine.data.questions import read_questions
from r1engine.data.rated import form_to_train
from r1engine.data.rated_table import RatedTable
from r1engine.data.reading import Reading
from r1engine.data.rows import read_rows
from r1engine.data.step_table import StepTable
from r1engine.data.steps import read_steps
from r1engine.data.texts import TextTable
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.rewards.from_config import check_named, check_sandbox, check_servers, make_scorer
from r1engine.stages import inputs


def check_start(cfg: StageConfig, world_size: int) -> None:
    """What a start asks before anything heavy is loaded; of the ranks of a node the first does.

    It leaves out the rows of the data: the stage reads them once, by the functions that `check_data` calls.

    Raises:
        ConfigError: the stage cannot start; see the message.
    """
    check_world(cfg, world_size)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    _check_folders(cfg)
    if isinstance(cfg, RlConfig):
        check_servers(cfg.rewards)


def dry_run(cfg: StageConfig, world_size: int, *, is_live: bool) -> list[str]:
    """Everything that can be known without a GPU and without the model in memory; returns what the user should know.

    Args:
        cfg:        of the stage.
        world_size: processes that will run it.
        is_live:    try the sandbox of this machine and ask the servers, too.

    Raises:
        ConfigError: the stage cannot start; see the message.
    """
    check_world(cfg, world_size)
    _check_folders(cfg)
    notes = check_data(cfg) + _unevaluated(cfg)
    return notes + check_surroundings(cfg) if is_live else notes


def _unevaluated(cfg: StageConfig) -> list[str]:
    """A note where the configuration sets `evaluation.every`, and nothing is there to evaluate."""
    sources: dict[str, object] = {"data.heldout": cfg.data.heldout}
    sources |= {"evaluation.benchmarks": cfg.evaluation.benchmarks} if isinstance(cfg, RlConfig) else {}
    if any(sources.values()) or not cfg.evaluation.every or "every" not in cfg.evaluation.model_fields_set:
        return []
    return [f"evaluation.every: found {cfg.evaluation.every}, but no {' or '.join(sources)}: nothing is evaluated"]


def _check_folders(cfg: StageConfig) -> None:
    """The files that the configuration names, the run's folder, and the model's."""
    check_files(cfg)
    _check_run_dir(cfg.run_dir)
    try:
        inputs.check_model(cfg)
        if isinstance(cfg, RlConfig):
            with make_scorer(cfg.rewards, workers=1) as scorer:
                scorer.check_functions()
            inputs.check_reward_models(cfg)
            python = cfg.rollout.sglang.python
            if cfg.rollout.engine == "sglang" and python is not None and not os.path.isfile(python):
                raise ValueError(f"rollout.sglang.python: found no {python}, required a Python with sglang")
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error


def check_data(cfg: StageConfig) -> list[str]:
    """Every row of the data files, tokenized; returns what the user should know of them.

    Raises:
        ConfigError: a row is not what the stage needs; file and line are named.
    """
    try:
        if isinstance(cfg, RlConfig):
            return _check_questions(cfg)
        if isinstance(cfg, SftConfig):
            return _check_texts(cfg)
        if isinstance(cfg, RewardModelConfig):
            return _check_ratings(cfg)
        if isinstance(cfg, ProcessRewardConfig):
            return _check_steps(cfg)
        return []
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error


def check_rows(cfg: StageConfig) -> list[str]:
    """The rows of the data files that are there, as far as that goes without a model.

    Raises:
        ConfigError: a row is not what the stage needs; file and line are named.
    """
    try:
        for path in filter(os.path.isfile, cfg.input_files().values()):
            if isinstance(cfg, RlConfig):
                read_questions(path, reading_of(cfg))
            elif isinstance(cfg, SftConfig):
                for _ in read_conversations(path, Reading(cfg.data.columns)):
                    pass
            elif isinstance(cfg, RewardModelConfig):
                for _ in read_comparisons(path, cfg.reward_model.loss, Reading(cfg.data.columns)):
                    pass
            elif isinstance(cfg, ProcessRewardConfig):
                for _ in read_steps(path):
                    pass
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error
    return []


def check_surroundings(cfg: StageConfig) -> list[str]:
    """The sandbox of this machine, and the servers that the configuration names; returns what to tell of them.

    Raises:
        ConfigError: too little protects from code that the rewards run, or a server does not answer as it should.
    """
    if not isinstance(cfg, RlConfig):
        return []
    check_servers(cfg.rewards)
    _check_generators(cfg)
    files = cfg.input_files().values()
    named = {str(row.fields.get("reward", "math")) for file in files for row in read_rows(file, ("question", "reward"))}
    return check_sandbox(cfg.rewards, named)


def _check_generators(cfg: RlConfig) -> None:
    """SGLang where this machine starts it, or the servers that are given."""
    assert cfg.model.path is not None
    sglang = cfg.rollout.sglang
    if cfg.rollout.engine != "sglang":
        return
    from r1engine.rollout.sglang.client import Client
    from r1engine.rollout.sglang.key import key_in
    from r1engine.rollout.sglang.launch import check_server
    from r1engine.rollout.sglang.server import check_environment

    try:
        if sglang.mode == "colocated" and sglang.python is not None:
            check_environment(sglang.python)
        for url in sglang.urls if sglang.mode == "remote" else []:
            client = Client(url, stall_seconds=sglang.stall_seconds, key=key_in(sglang.key_variable))
            check_server(client, cfg, dtype=None)
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error


def _check_texts(cfg: SftConfig) -> list[str]:
    form = inputs.format_of(cfg)

    def table(path: Path, folder: Path) -> TextTable:
        return TextTable(inputs.write_texts(cfg, path, folder, form, "texts"))

    return _check_tables(cfg, table, partial(inputs.text_batches, cfg))


def _check_ratings(cfg: RewardModelConfig) -> list[str]:
    form = inputs.format_of(cfg)
    rated = form_to_train(form, load_tokenizer(cfg.model.folder))

    def table(path: Path, folder: Path) -> RatedTable:
        return RatedTable(inputs.write_ratings(cfg, path, folder, form, rated, "ratings"))

    return _check_tables(cfg, table, partial(inputs.rating_batches, cfg))


def _check_steps(cfg: ProcessRewardConfig) -> list[str]:
    form = inputs.format_of(cfg)

    def table(path: Path, folder: Path) -> StepTable:
        return StepTable(inputs.write_step_tokens(cfg, path, folder, form, "steps"))

    return _check_tables(cfg, table, partial(inputs.step_batches, cfg))


def _check_tables(
    cfg: StageConfig,
    table_of: Callable[[Path, Path], TextTable | RatedTable | StepTable],
    batches: Callable[[int], object],
) -> list[str]:
    """Tokenize every data file; returns what is left out of them.

    Args:
        cfg:      of the stage.
        table_of: (data file, folder to write to) -> its rows.
        batches:  refuses a number of rows that makes no batch.
    """
    notes = []
    for key, path in cfg.input_files().items():
        with TemporaryDirectory(prefix="r1engine-") as folder:
            table = table_of(path, Path(folder))
        if key == "data.train":
            batches(len(table))
        if table.left_out:
            notes.append(f"left out: {table.left_out}")
    return notes


def _check_questions(cfg: RlConfig) -> list[str]:
    assert cfg.data.train is not None
    notes, named, form = [], set[str](), inputs.format_of(cfg)
    with make_scorer(cfg.rewards) as scorer:
        for path in cfg.input_files().values():
            with TemporaryDirectory(prefix="r1engine-") as folder:
                inputs.write_questions(cfg, path, Path(folder), form, shown := inputs.shown_by(form))
                table = PromptTable(Path(folder), shown)
            notes += table.notes
            inputs.check_raters(cfg, table)
            if path != cfg.data.heldout:
                named |= table.rewards
                notes += [note] if (note := inputs.note_unusable(scorer, table, cfg.data.most_unusable)) else []
            else:
                asked = range(len(table))[: cfg.evaluation.questions]
                named |= {table.question(index).reward for index in asked}
    return notes + check_named(cfg.rewards, named)


def _check_run_dir(run_dir: Path) -> None:
    """That it can be written to, or made."""
    try:
        run_dir.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir}: {error.strerror}") from error
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise ConfigError(f"run_dir: {there} is a file, required a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir: {there} cannot be written to, required a folder of the user's own")
