"""What searches found, as data: "the resulting question-answer pairs to train both the actor model and the value model"
(section 4.2)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from r1engine.config.kind import KindConfig
from r1engine.config.section import LocalPath, Positive, Section


class SearchedModel(Section):
    """The model that was searched with."""

    path: LocalPath | None = None
    """Local Hugging Face folder; its tokenizer tells the text of the steps."""


class SearchDataConfig(KindConfig):
    """Right completions for the actor, and the values of visited steps for the value model. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "texts.jsonl", "values": "steps.jsonl"}
    ALONE: ClassVar[bool] = True

    stage: Literal["search_data"] = "search_data"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/search_data")
    """Folder that gets texts.jsonl, for `stage: sft`, and steps.jsonl, for `stage: process_reward`."""
    model: SearchedModel = SearchedModel()
    searches: list[LocalPath] = Field(default=[])
    """Files search.jsonl of `stage: search`, of one tokenizer."""
    texts: Positive = 2
    """Right completions of a question in each file, the most visited ones first. The paper gives no number."""
    min_visits: Positive = 2
    """Visits of mcts from which on a step's mean value is a label."""

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        found = {f"searches.{number}": path for number, path in enumerate(self.searches)}
        return found | ({"model.path": self.model.path} if self.model.path is not None else {})

    def source_problems(self) -> list[str]:
        """What the configuration lacks."""
        problems = [] if self.model.path is not None else ["model.path: found null, required a Hugging Face folder"]
        return problems + ([] if self.searches else ["searches: found none, required at least one search.jsonl"])
