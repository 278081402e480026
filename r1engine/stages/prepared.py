"""What a stage trains from: the model's folder, with the end token, template and positions that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from r1engine.config import ProcessRewardConfig, RewardModelConfig, RlConfig, SftConfig
from r1engine.data.chat import ChatFormat, PromptFormat
from r1engine.data.rated import RatedForm, form_to_train
from r1engine.hf.architecture import architecture_of
from r1engine.hf.files import read_json
from r1engine.hf.prepared import placed, prepare
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.ranks import World
from r1engine.rewards.rated import NAME
from r1engine.search import scored_folder
from r1engine.search.scored_folder import ScoredFolder
from r1engine.stages.inputs import format_of

ConfigT = TypeVar("ConfigT", RlConfig, SftConfig, RewardModelConfig, ProcessRewardConfig)


def prepared(cfg: ConfigT, world: World) -> tuple[ConfigT, PromptFormat]:
    """The configuration on the folder to train from, and how questions and conversations are written. Collective.

    With a chat template or other positions that folder is run_dir/start, so that generators stop where a turn ends, and
    the exported model is asked and stops as it was trained.

    Raises:
        ValueError: the folder has no tokenizer or no end token, or the template cannot be used with it.
    """
    form = format_of(cfg)
    if not isinstance(form, ChatFormat) and cfg.model.max_positions is None and cfg.model.rope_theta is None:
        return cfg, form
    end = (form.end, form.end_token) if isinstance(form, ChatFormat) else None
    return _from_start(cfg, world, form, end), form


def prepared_to_rate(cfg: RewardModelConfig, world: World) -> tuple[RewardModelConfig, PromptFormat, RatedForm]:
    """The same for a reward model, whose folder also holds the text that it is to be asked with.

    Raises:
        ValueError: see `prepared`; or the template cannot be written as a text with {prompt} and {response}.
    """
    form, tokenizer = format_of(cfg), load_tokenizer(cfg.model.folder)
    rated = form_to_train(form, tokenizer)
    end = form.end if isinstance(form, ChatFormat) else tokenizer.id_to_token(form.end_token)
    assert end is not None  # form_to_train has looked
    return _from_start(cfg, world, form, (end, form.end_token), {NAME: rated.template}), form, rated


def prepared_to_score(
    cfg: ProcessRewardConfig, form: PromptFormat, world: World, about: ScoredFolder
) -> ProcessRewardConfig:
    """The same for a process reward model, whose folder also holds what its scores are of; `form` is of `format_of`."""
    end = (form.end, form.end_token) if isinstance(form, ChatFormat) else None
    return _from_start(cfg, world, form, end, {scored_folder.NAME: about.to_text()})


def _from_start(
    cfg: ConfigT, world: World, form: PromptFormat, end: tuple[str, int] | None, also: dict[str, str] | None = None
) -> ConfigT:
    """The configuration on run_dir/start, which the first rank writes; the arguments are those of `prepare`."""
    source, start = cfg.model.folder, cfg.run_dir / "start"
    positions, theta = cfg.model.max_positions, cfg.model.rope_theta

    def make() -> Path:
        architecture_of(cfg.model)  # refuses positions that the folder cannot have
        _refuse_other_config(cfg)
        prepare(source, start, end=end, template=form.source, max_positions=positions, rope_theta=theta, also=also)
        return start

    model = cfg.model.model_copy(update={"path": world.from_first(make)})
    return cfg.model_copy(update={"model": model})


def _refuse_other_config(cfg: ConfigT) -> None:
    """Looks before run_dir/start is written again: what comes of checkpoints is exported and evaluated from there.

    Raises:
        ValueError: checkpoints are there, and the model's config.json would be another one.
    """
    source, start = cfg.model.folder, cfg.run_dir / "start"
    if not (cfg.run_dir / "checkpoints" / "latest").is_file():
        return
    begun = start if (start / "config.json").is_file() else source
    asked = placed(read_json(source / "config.json"), cfg.model.max_positions, cfg.model.rope_theta)
    if read_json(begun / "config.json") != asked:
        raise ValueError(
            f"model.path: the config.json of {source}, with model.max_positions and model.rope_theta, is not the one "
            "that the run began with; set back what has changed, or start over with another run_dir"
        )
