"""What a stage trains from: the model's folder, with the end token, template and positions that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from r1engine.config import RlConfig, SftConfig
from r1engine.data.chat import ChatFormat, PromptFormat, make_format
from r1engine.hf.architecture import architecture_of
from r1engine.hf.prepared import prepare
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.ranks import World

ConfigT = TypeVar("ConfigT", RlConfig, SftConfig)


def prepared(cfg: ConfigT, world: World) -> tuple[ConfigT, PromptFormat]:
    """The configuration on the folder to train from, and how questions and conversations are written. Collective.

    With a chat template or other positions that folder is run_dir/start, so that generators stop where a turn ends, and
    the exported model is asked and stops as it was trained.

    Raises:
        ValueError: the folder has no tokenizer or no end token, or the template cannot be used with it.
    """
    source = cfg.model.folder
    form = make_format(source, load_tokenizer(source), cfg.data)
    positions, theta = cfg.model.max_positions, cfg.model.rope_theta
    if not isinstance(form, ChatFormat) and positions is None and theta is None:
        return cfg, form
    start = cfg.run_dir / "start"
    end = (form.end, form.end_token) if isinstance(form, ChatFormat) else None

    def make() -> Path:
        architecture_of(cfg.model)  # refuses positions that the folder cannot have
        prepare(source, start, end=end, template=form.source, max_positions=positions, rope_theta=theta)
        return start

    model = cfg.model.model_copy(update={"path": world.from_first(make)})
    return cfg.model_copy(update={"model": model}), form
