"""Labels of steps by rollouts: the "automated annotation" that "may not yield satisfactory results" (section 4.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from r1engine.config.drawing import DrawingConfig
from r1engine.config.process import StepMarking
from r1engine.config.rollout import Rollout
from r1engine.config.search import DRAWS
from r1engine.config.section import Fraction, LocalPath, Positive, Section


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


class LabelConfig(DrawingConfig):
    """Draws solutions and labels their steps. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "steps.jsonl"}

    stage: Literal["label"] = "label"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/label")
    """Folder that gets steps.jsonl."""
    questions_at_once: Positive = 64
    """Questions that are labelled side by side, and written when they are done."""
    steps: StepMarking = StepMarking()
    label: Labelling = Labelling()
    rollout: Rollout = Rollout()
    """Temperature 1 by default: labels are of the policy as it is."""

    def problems(self) -> list[str]:
        """What does not fit together."""
        problems = super().problems()
        if self.label.method == "bisect" and self.label.kind == "soft":
            problems.append("label.kind: found soft, required hard with label.method bisect, which rolls out few steps")
        if self.label.rollouts > DRAWS:
            problems.append(
                f"label.rollouts: found {self.label.rollouts}, required at most {DRAWS} draws from one step"
            )
        return problems
