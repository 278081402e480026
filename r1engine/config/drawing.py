"""What every kind of stage has that draws answers to a file of questions and trains nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from r1engine.config.kind import KindConfig
from r1engine.config.rewards import Rewards
from r1engine.config.rl import QuestionData, RlConfig
from r1engine.config.rollout import Rollout
from r1engine.config.section import LocalPath, Positive, Section
from r1engine.config.stage import Model, Template


class SampledModel(Section):
    """The model that answers."""

    path: LocalPath | None = None
    """Local Hugging Face folder: config.json, *.safetensors, tokenizer.json."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on CPUs, bfloat16 on GPUs."""


class DrawingConfig(KindConfig):
    """The keys of every kind of stage that draws from one model. Each kind adds its own."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("rollout.slots",)
    # Key of ours -> key of the section `data` of a run.
    OF_A_RUN: ClassVar[dict[str, str]] = {
        "questions": "train",
        "template": "template",
        "system": "system",
        "max_prompt_tokens": "max_prompt_tokens",
    }

    threads: Positive | None = None
    """CPU threads of each rank; null: as in training."""
    model: SampledModel = SampledModel()
    questions: LocalPath | None = None
    """.jsonl or .parquet file with the fields `question` and `answer`."""
    template: Template = "chat"
    """How the model is asked: its own chat template, the shipped r1 or plain, Table 1, or the question as it is."""
    system: str | None = None
    """System message, for chat, r1 and plain; null: none."""
    max_prompt_tokens: Positive = 2048
    """Tokens of a prompt with its template."""
    rollout: Rollout = Rollout()
    """Engine, temperature, and the tokens of a completion."""
    rewards: Rewards = Rewards()
    """How answers are graded: deadlines, workers, judge."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problems := self.problems():
            raise ValueError("\n".join(problems))
        return self

    def problems(self) -> list[str]:
        """What does not fit together."""
        if self.rollout.max_staleness or self.rollout.oversample != 1:
            return ["rollout: found max_staleness or oversample, required 0 and 1: nothing is trained here"]
        return []

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

    def asked(self) -> dict[str, Any]:
        """How questions are asked: keys of the section `data` of a run."""
        return {theirs: getattr(self, ours) for ours, theirs in self.OF_A_RUN.items()}

    def as_run(self) -> RlConfig:
        """The configuration of a run that draws in this way: what a generator and the prompts need."""
        return RlConfig(
            run_dir=self.run_dir,
            seed=self.seed,
            threads=self.threads,
            steps=1,
            model=Model(path=self.model.path, dtype=self.model.dtype),
            data=QuestionData(**self.asked()),
            rollout=self.rollout,
            rewards=self.rewards,
        )
