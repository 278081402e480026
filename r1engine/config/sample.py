"""Answers drawn from a model and graded while they are drawn: the paper's rejection sampling (section 2.3.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from r1engine.config.drawing import DrawingConfig
from r1engine.config.rollout import Rollout
from r1engine.config.section import LocalPath, Positive


class SampleConfig(DrawingConfig):
    """Draws answers to questions and grades them. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "samples"}

    stage: Literal["sample"] = "sample"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/sample")
    """Folder that gets samples/chunk_00000.parquet, ... and counts.json."""
    think: Literal["own", "prefilled"] = "own"
    """prefilled: the prompt ends in <think>; own: as the chat template has it."""
    prompt: LocalPath | None = None
    """Text file with {question}, which is what the model is asked: an example with its thoughts (the paper's few-shot
    cold start), or the wish for a detailed answer with reflection and verification. null: the question alone."""
    overlong: Literal["refuse", "skip"] = "refuse"
    """Questions whose prompt is longer: refuse the file, or leave them out and tell."""
    samples: Positive = 4
    """Answers to a question. The paper: "we sample multiple responses"; the number is ours."""
    early_stop: Positive | None = None
    """A question that has so many right answers gets no more; they are then drawn in rounds of so many. null: off."""
    target_right: dict[str, Positive] | None = None
    """Domain -> right, whole answers after which its questions are left out; domains that are not named have no target.
    null: all questions are asked."""
    chunk_questions: Positive = 64
    """Questions of a file of samples. A file is whole or absent: so much is drawn again after a kill."""
    rollout: Rollout = Rollout()
    """v2 B.3.2 samples R1-Zero at temperature 1.0; of the later rejection sampling the paper tells no temperature."""

    def problems(self) -> list[str]:
        """What does not fit together."""
        problems = super().problems()
        if self.early_stop is not None and self.early_stop > self.samples:
            problems.append(f"early_stop: found {self.early_stop}, required <= samples = {self.samples}")
        return problems

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        return super().inputs() | ({"prompt": self.prompt} if self.prompt is not None else {})

    def asked(self) -> dict[str, Any]:
        """How questions are asked: keys of the section `data` of a run."""
        return super().asked() | {"think": self.think, "overlong": self.overlong}
