"""Labels of steps by rollouts: the "automated annotation" that "may not yield satisfactory results" (section 4.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from r1engine.config.kind import KindConfig
from r1engine.config.process import StepMarking
from r1engine.config.rewards import Rewards
from r1engine.config.rl import QuestionData, RlConfig
from r1engine.config.rollout import Rollout
from r1engine.config.sample import SampledModel
from r1engine.config.section import Fraction, LocalPath, Positive, Section
from r1engine.config.stage import Model, Template


class Labelling(Section):
    """How solutions are drawn, and what the rollouts from their steps make of a label. The paper gives no numbers."""

    solutions: Positive = 4
    """Solutions of a question whose steps are labelled; with `tree` those that it begins with."""
    rollouts: Positive = 8
    """Completions from the end of a step (Math-Shepherd: 8)."""
    method: Literal["each", "bisect", "tree"] = "each"
    """each: rollouts from every step; bisect: of wrong solutions the first step without a right rollout is searched by
    halves, if right ones come before wrong ones; tree: OmegaPRM's, which bisects the rollouts, too."""
    kind: Literal["hard", "soft"] = "hard"
    """hard: 1 if the share of right rollouts is above `above`, else 0; soft: the share."""
    above: Fraction = 0.0
    """See `kind`. Math-Shepherd: any right rollout."""
    stop_early: bool = True
    """hard, above 0: 1, 2, 4, ... rollouts until one is right, which says the same for fewer tokens."""
    alpha: Fraction = 0.5
    """tree: Q = alpha^(1 - share of right rollouts) * beta^(length / `length`). OmegaPRM: 0.5."""
    beta: Fraction = 0.9
    """tree: see `alpha`. OmegaPRM: 0.9."""
    length: Positive = 500
    """tree: see `alpha`. OmegaPRM: 500 words; here tokens."""
    c: Annotated[float, Field(ge=0)] = 0.125
    """tree: U = c sqrt(all visits) / (1 + visits). OmegaPRM: 0.125."""
    searches: Positive = 100
    """tree: rollouts that are bisected. OmegaPRM: 100."""


class LabelConfig(KindConfig):
    """Draws solutions and labels their steps. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "steps.jsonl"}
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("rollout.slots",)

    stage: Literal["label"] = "label"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/label")
    """Folder that gets steps.jsonl."""
    threads: Positive | None = None
    """CPU threads of each rank; null: as in training."""
    model: SampledModel = SampledModel()
    questions: LocalPath | None = None
    """.jsonl or .parquet file with the fields `question` and `answer`."""
    template: Template = "chat"
    """How the model is asked."""
    system: str | None = None
    """System message, for chat, r1 and plain; null: none."""
    max_prompt_tokens: Positive = 2048
    """Tokens of a prompt with its template."""
    questions_at_once: Positive = 64
    """Questions that are labelled side by side, and written when they are done."""
    steps: StepMarking = StepMarking()
    label: Labelling = Labelling()
    rollout: Rollout = Rollout()
    """Temperature 1 by default: labels are of the policy as it is."""
    rewards: Rewards = Rewards()
    """How answers are graded: deadlines, workers, judge."""

    @model_validator(mode="after")
    def _fits_together(self) -> LabelConfig:
        problems = []
        if self.rollout.max_staleness or self.rollout.oversample != 1:
            problems.append("rollout: found max_staleness or oversample, required 0 and 1: nothing is trained here")
        if self.label.method == "bisect" and self.label.kind == "soft":
            problems.append("label.kind: found soft, required hard with label.method bisect, which rolls out few steps")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        paths = {"model.path": self.model.path, "questions": self.questions}
        return {key: path for key, path in paths.items() if path is not None}

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find its model, its questions and its generator."""
        problems = [] if self.model.path is not None else ["model.path: found null, required a Hugging Face folder"]
        if self.questions is None or self.questions.suffix not in (".jsonl", ".parquet"):
            problems.append(f"questions: found {self.questions or 'null'}, required a .jsonl or .parquet file")
        return problems + (self.rollout.sglang.problems() if self.rollout.engine == "sglang" else [])

    def as_run(self) -> RlConfig:
        """The configuration of a run that draws in this way: what a generator and the prompts need."""
        limit = self.max_prompt_tokens
        data = QuestionData(train=self.questions, template=self.template, system=self.system, max_prompt_tokens=limit)
        return RlConfig(
            run_dir=self.run_dir,
            seed=self.seed,
            threads=self.threads,
            steps=1,
            model=Model(path=self.model.path, dtype=self.model.dtype),
            data=data,
            rollout=self.rollout,
            rewards=self.rewards,
        )
