"""The table at the end: the models of a pipeline on the same held-out questions, after the paper's Tables 3 and 6."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from r1engine.config.kind import KindConfig
from r1engine.config.rewards import Rewards
from r1engine.config.rl import QuestionData, RlConfig
from r1engine.config.rollout import Rollout
from r1engine.config.section import LocalPath, Positive, Section
from r1engine.config.stage import Model, Template


class Contestant(Section):
    """A model of the table, and how it is asked."""

    path: LocalPath
    """Local Hugging Face folder."""
    template: Template = "chat"
    """Its own chat template, the shipped r1 or plain, Table 1, or the question as it is."""


class EvaluateConfig(KindConfig):
    """Draws answers of several models to the same questions and compares neighbours. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"table": "table.json", "page": "table.md"}
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("rollout.slots",)

    stage: Literal["evaluate"] = "evaluate"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/evaluate")
    """Folder that gets table.md, table.json and answers/<model>.jsonl."""
    threads: Positive | None = None
    """CPU threads of each rank; null: as in training."""
    models: list[Contestant] = Field(default=[])
    """Columns of the table, from left to right; each is compared with the one before."""
    names: list[str] = Field(default=[])
    """What the columns are called; as many as models."""
    breaks: list[Positive] = Field(default=[])
    """Numbers of models (from 0) that begin a new table: they are not compared with the one before."""
    questions: LocalPath | None = None
    """Data file of held-out questions; their `domain` makes the rows."""
    samples: Positive = 8
    """Answers to a question; pass@1 is their mean. Paper, section 3: "typically between 4 and 64"."""
    temperature: Annotated[float, Field(gt=0)] = 0.6
    """Paper, section 3: "a sampling temperature of 0.6"."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """The same sentence: "and a top-p value of 0.95"."""
    max_prompt_tokens: Positive = 2048
    """Tokens of a prompt with its template."""
    rollout: Rollout = Rollout()
    """Engine, limits; its temperature and top_p are those above."""
    rewards: Rewards = Rewards()
    """How answers are graded: deadlines, workers, judge."""

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        paths = {f"models.{i}.path": model.path for i, model in enumerate(self.models)}
        return paths | ({"questions": self.questions} if self.questions is not None else {})

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find its models and its questions."""
        problems = [] if self.questions is not None else ["questions: found null, required a data file"]
        if not self.models:
            problems.append("models: found none, required at least one")
        if len(self.names) != len(self.models) or len(set(self.names)) != len(self.names):
            problems.append(f"names: found {self.names}, required {len(self.models)} different ones, one a model")
        return problems

    def as_run(self, number: int) -> RlConfig:
        """The configuration of a run that draws as model `number` is asked."""
        model, rollout = self.models[number], {"temperature": self.temperature, "top_p": self.top_p}
        data = QuestionData(train=self.questions, template=model.template, max_prompt_tokens=self.max_prompt_tokens)
        return RlConfig(
            run_dir=self.run_dir / "models" / self.names[number],
            seed=self.seed,
            threads=self.threads,
            steps=1,
            model=Model(path=model.path),
            data=data,
            rollout=self.rollout.model_copy(update=rollout),
            rewards=self.rewards,
        )
