"""Preference pairs for a reward model of helpfulness: which of two answers a language model likes better (v2, 3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from r1engine.config.kind import KindConfig
from r1engine.config.reward_model import Sees
from r1engine.config.rewards import ChatServer
from r1engine.config.section import Fraction, LocalPath, Positive


class PairJudge(ChatServer):
    """A language model that compares two answers."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Of the judgements; at 0 those with the same order of the answers are all alike. Ours."""


class PairsConfig(KindConfig):
    """Judges pairs of answers to the same question, and keeps those that differ clearly. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "pairs.parquet", "dropped": "dropped.parquet", "counts": "counts.json"}
    ALONE: ClassVar[bool] = True

    stage: Literal["pairs"] = "pairs"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/pairs")
    """Folder that gets pairs.parquet, dropped.parquet, counts.json and judgements.jsonl."""
    candidates: list[LocalPath] = Field(default=[])
    """Folders of samples, and .jsonl or .parquet files of conversations (docs/sft.md); answers of all of them to the
    same question are compared. v2: "All prompts are non-reasoning questions"."""
    judge: PairJudge | None = None
    """Who compares. v2: DeepSeek-V3, with the prompt of Arena-Hard."""
    judgements: Positive = 4
    """Of a pair, half of them with the answers in the other order. v2: "we query DeepSeek-V3 four times, randomly
    assigning the responses as either Response A or Response B"."""
    min_judgements: Positive = 3
    """A pair with fewer usable ones is left out. Ours."""
    min_delta: Annotated[float, Field(ge=0)] = 1.0
    """A pair stays if the mean of its judgements is further from 0. v2: "retaining only those pairs where the score
    difference exceeds 1". The scale is ours: much better 2, better 1, equal 0."""
    sees: Sees = "summary"
    """What of an answer the judge sees. v2: "we focus exclusively on the final summary"."""
    pairs_per_question: Positive | None = 1
    """Pairs of a question; an answer stands in one at most. null: as many as there are answers for. Ours."""
    length_balance: Fraction = 0.05
    """The chosen answers have at most so much more, or fewer, words than the rejected ones; pairs with the largest
    difference leave first. v2: "comparable lengths"; the bound is ours."""

    @model_validator(mode="after")
    def _fits_together(self) -> PairsConfig:
        problems = []
        if self.judgements % 2:
            problems.append(f"judgements: found {self.judgements}, required an even number: half in either order")
        if self.min_judgements > self.judgements:
            problems.append(f"min_judgements: found {self.min_judgements}, required <= judgements = {self.judgements}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        return {f"candidates.{i}": path for i, path in enumerate(self.candidates)}

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find its answers and its judge."""
        problems = [] if self.candidates else ["candidates: found none, required at least one"]
        if len({*self.candidates}) < len(self.candidates):
            problems.append("candidates: found one twice, required different ones")
        return problems + (["judge: found null, required urls and model"] if self.judge is None else [])
