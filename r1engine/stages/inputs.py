"""What a stage starts from, read and checked: its model's folder, its questions or texts. A dry run reads the same.

No torch: what is wrong with an input is known before anything heavy is loaded.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from r1engine.config import (
    Model,
    ProcessRewardConfig,
    ProcessTraining,
    RewardModelConfig,
    RewardTraining,
    RlConfig,
    Sft,
    SftConfig,
    StageConfig,
)
from r1engine.data.chat import PromptFormat, make_format
from r1engine.data.presets import reading_of
from r1engine.data.prompts import PromptTable, Render, write_prompts
from r1engine.data.rated import RatedForm, form_of_folder
from r1engine.data.rated_table import RatedTable, cached_ratings
from r1engine.data.step_table import StepTable, cached_steps
from r1engine.data.stream import Batches
from r1engine.data.texts import TextTable, cached_texts
from r1engine.hf.architecture import DynamicScaling, architecture_of
from r1engine.hf.headers import Headers
from r1engine.hf.layout import check_limits, check_trained
from r1engine.hf.score_folder import check_reward_model
from r1engine.hf.tokenizer import end_token, load_tokenizer
from r1engine.rewards import Record, Scorer
from r1engine.search.scored_folder import NAME as STEP_SCORES
from r1engine.search.scored_folder import read_scored_folder

if TYPE_CHECKING:
    from r1engine.ranks import World

MOST_REFERENCES = 20_000  # distinct references that are looked at before a run


def check_model(cfg: StageConfig) -> None:
    """Looks at the folder of the model: config.json, tokenizer, headers of the weights, and the layout on the ranks.

    Raises:
        ValueError: a file is missing, broken or does not fit the others, or the configuration asks for what the model
            cannot do.
    """
    folder = cfg.model.path
    assert folder is not None
    arch, tokenizer = architecture_of(cfg.model), load_tokenizer(folder)
    check_trained(
        folder,
        arch,
        cfg.model,
        cfg.parallel,
        "score" if isinstance(cfg, RewardModelConfig | ProcessRewardConfig) else "tokens",
    )
    end = end_token(folder, tokenizer)
    if end >= arch.vocab_size:
        raise ValueError(
            f"{folder}: the token that ends a text is {end}, required below vocab_size = {arch.vocab_size}"
        )
    headers = Headers(folder, arch)
    if cfg.model.mtp_loss_weight > 0 and not headers.mtp_names:
        raise ValueError(
            f"model.mtp_loss_weight: found {cfg.model.mtp_loss_weight}, required 0: {folder} has no MTP module"
        )
    if not isinstance(cfg, RlConfig) or cfg.rollout.engine != "sglang":
        return
    # A server is asked for room for the longest prompt that the configuration allows.
    prompt = cfg.data.max_prompt_tokens
    check_limits(folder, arch, cfg.rollout.limits(cfg.steps), prompt, "a prompt of data.max_prompt_tokens")
    if isinstance(arch.rope_scaling, DynamicScaling):
        raise ValueError(
            f"{folder / 'config.json'}: rope_type 'dynamic', required is another one with rollout.engine sglang: "
            "SGLang stretches short sequences too, the trainer does not"
        )


def check_reward_models(cfg: RlConfig) -> None:
    """Looks at the folders of reward models that the trainer is to run.

    Raises:
        ValueError: one is no reward model of the policy's architecture, or does not say how it is to be asked.
    """
    if cfg.rewards.process_model is not None:
        try:
            check_reward_model(cfg.rewards.process_model, architecture_of(cfg.model))
            if read_scored_folder(cfg.rewards.process_model) is None:
                raise ValueError(f"found no {STEP_SCORES}, required a folder of stage: process_reward")
        except ValueError as error:
            raise ValueError(f"rewards.process_model: {error}") from error
    for name, model in cfg.rewards.reward_models.items():
        if model.path is None:
            continue
        try:
            check_reward_model(model.path, architecture_of(cfg.model))
            form_of_folder(model.path, model.template or None)
        except ValueError as error:
            raise ValueError(f"rewards.{name}_model.path: {error}") from error


def check_raters(cfg: RlConfig, table: PromptTable) -> None:
    """That there is a reward model for each question that names one.

    Raises:
        ValueError: there is none; the question is named.
    """
    for question in table.distinct(MOST_REFERENCES) if "preference" in table.rewards else []:
        if question.rated_by and question.rated_by not in cfg.rewards.reward_models:
            raise ValueError(
                f"{question.place}: rated_by is '{question.rated_by}', required rewards.{question.rated_by}_model"
            )


def format_of(cfg: StageConfig) -> PromptFormat:
    """How the stage's questions or conversations are written.

    Raises:
        ValueError: the model's folder has no tokenizer or no end token, or the template cannot be used with it.
    """
    assert isinstance(cfg, RlConfig | SftConfig | RewardModelConfig | ProcessRewardConfig)
    return make_format(cfg.model.folder, load_tokenizer(cfg.model.folder), cfg.data)


def shown_by(form: PromptFormat, around: str = "{question}") -> Render:
    """What makes of a question, which stands in the text `around`, the text that the model is shown."""
    return lambda question: form.prompt(around.replace("{question}", question.text), question.place)


def load_questions(
    cfg: RlConfig, path: Path, form: PromptFormat, world: World, *, around: str = "{question}"
) -> PromptTable:
    """The prompts of a file, read and tokenized once a node. Collective. Errors as of `write_questions`."""
    shown = shown_by(form, around)
    with TemporaryDirectory(prefix="r1engine-") as own:

        def write() -> str:
            write_questions(cfg, path, Path(own), form, shown)
            return own

        table = PromptTable(Path(world.once_a_node(write)), shown)
        world.wait()  # the files may be removed when every rank has them open
    return table


def write_questions(cfg: RlConfig, path: Path, folder: Path, form: PromptFormat, shown: Render) -> None:
    """The questions of one of the run's files as prompts, in `folder`; see `write_prompts`.

    Raises:
        ValueError: see there; or a prompt holds a token that the model has not, or leaves too little of its context for
            a completion. Of held-out questions only those count that are asked.
    """
    data, limit = cfg.data, cfg.data.max_prompt_tokens
    write_prompts(
        path,
        folder,
        form.encode_prompts,
        shown,
        limit,
        overlong=data.overlong,
        reading=reading_of(cfg),
    )
    table, arch = PromptTable(folder, shown), architecture_of(cfg.model)
    is_heldout = path == data.heldout
    asked = cfg.evaluation.questions if is_heldout else None
    if unknown := [index for index in table.beyond(arch.vocab_size) if asked is None or index < asked]:
        place, tokens = table.question(unknown[0]).place, table.tokens(unknown[0])
        others = f" (and {len(unknown) - 1:,} rows more)" if len(unknown) > 1 else ""
        raise ValueError(
            f"{place}: found token {max(tokens)}{others}, required below {arch.vocab_size}, the vocab_size of "
            f"{cfg.model.folder}/config.json: its tokenizer.json is of another model"
        )
    lengths = table.lengths()[:asked]
    longest = int(np.argmax(lengths))
    # The last evaluation comes after the last step, with the limit from there on.
    limits = cfg.rollout.limits(cfg.steps + 1 if is_heldout else cfg.steps)
    place = table.question(longest).place
    check_limits(cfg.model.folder, arch, limits, int(lengths[longest]), f"the prompt of {place}")


def note_unusable(scorer: Scorer, table: PromptTable, most: float) -> str:
    """Says which questions have a reference that no rule can use: whatever is answered to them is undecided.

    Args:
        scorer: grades the run.
        table:  the questions.
        most:   share of them that may be so.

    Raises:
        ValueError: more are, or all, so that nothing could be learned.
    """
    questions = table.distinct(MOST_REFERENCES)
    unusable = scorer.unusable_references([Record(question, "", id=question.place) for question in questions])
    if not unusable:
        return ""
    examples = "; ".join(f"{record.id} {problem}" for record, problem in unusable[:5])
    share = len(unusable) / len(questions)
    note = f"{len(unusable)} of {len(questions)} references ({share:.0%}) are undecided whatever the answer: {examples}"
    if share == 1 or share > most:
        hint = "" if share == 1 else f"; required at most data.most_unusable = {most:g} of them"
        raise ValueError(f"{table.path}: {note}{hint}")
    return note


def write_texts(cfg: SftConfig, path: Path, cache: Path, form: PromptFormat, key: str) -> Path:
    """The texts of one of the run's files as tokens, below `cache`; see `cached_texts`.

    Raises:
        ValueError: see there; or a text holds a token that the model has not, or is longer than its context.
    """
    written = cached_texts(path, cache, key, form, cfg.data)
    _check_fits(TextTable(written), path, cfg.model)
    return written


def write_ratings(
    cfg: RewardModelConfig, path: Path, cache: Path, form: PromptFormat, rated: RatedForm, key: str
) -> Path:
    """The pairs or labels of one of the run's files as tokens, below `cache`; see `cached_ratings`.

    Raises:
        ValueError: see there; or a text holds a token that the model has not, or is longer than its context.
    """
    written = cached_ratings(path, cache, key, form, rated, cfg)
    _check_fits(RatedTable(written), path, cfg.model)
    return written


def write_step_tokens(cfg: ProcessRewardConfig, path: Path, cache: Path, form: PromptFormat, key: str) -> Path:
    """The solutions of one of the run's files as tokens, below `cache`; see `cached_steps`.

    Raises:
        ValueError: see there; or a solution holds a token that the model has not, or is longer than its context; or all
            labels of the data to train on are alike.
    """
    written = cached_steps(path, cache, key, form, load_tokenizer(cfg.model.folder), cfg)
    table = StepTable(written)
    _check_fits(table, path, cfg.model)
    known = np.unique(table.labels[~np.isnan(table.labels)])
    if path == cfg.data.train and len(known) == 1:
        raise ValueError(f"{path}: all labels of steps are {known[0]:g}, required right and wrong steps to train on")
    return written


def _check_fits(table: TextTable | RatedTable | StepTable, path: Path, model: Model) -> None:
    """That the model has the tokens of the texts, and room for the longest."""
    arch, folder = architecture_of(model), model.folder
    if table.largest_token >= arch.vocab_size:
        raise ValueError(
            f"{table.largest_token_at}: found token {table.largest_token}, required below {arch.vocab_size}, the "
            f"vocab_size of {folder}/config.json: its tokenizer.json is of another model"
        )
    if arch.max_positions < table.longest:
        raise ValueError(
            f"model.path: {folder} has {arch.max_positions:,} positions, {path} has a text of {table.longest:,} tokens "
            f"({table.longest_at}); lower data.max_tokens, or set model.max_positions (docs/sft.md says what to expect)"
        )


def text_batches(cfg: SftConfig, count: int) -> Batches:
    """Which of `count` texts each optimizer step takes.

    Raises:
        ValueError: the warm-up is longer than that.
    """
    return _batches(cfg, cfg.sft, "texts", count)


def rating_batches(cfg: RewardModelConfig, count: int) -> Batches:
    """Which of `count` pairs or labels each optimizer step takes; errors as of `text_batches`."""
    return _batches(cfg, cfg.reward_model, "rows", count)


def step_batches(cfg: ProcessRewardConfig, count: int) -> Batches:
    """Which of `count` solutions each optimizer step takes; errors as of `text_batches`."""
    return _batches(cfg, cfg.process, "solutions", count)


def _batches(cfg: StageConfig, training: Sft | RewardTraining | ProcessTraining, what: str, count: int) -> Batches:
    batches = Batches(count, batch_size=training.batch_size, epochs=training.epochs, seed=cfg.seed)
    if cfg.optimizer.warmup_steps > batches.steps:
        raise ValueError(
            f"optimizer.warmup_steps: found {cfg.optimizer.warmup_steps}, required <= {batches.steps} steps = "
            f"{training.epochs} epochs of {count} {what} in batches of {training.batch_size}"
        )
    return batches
