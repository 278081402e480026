"""Answers drawn from a model and graded while they are drawn: the paper's rejection sampling (section 2.3.3)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

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


class SampleConfig(KindConfig):
    """Draws answers to questions and grades them. Trains nothing."""

    MAKES: ClassVar[dict[str, str]] = {"data": "samples"}
    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("rollout.slots",)

    stage: Literal["sample"] = "sample"
    """Kind of stage."""
    run_dir: LocalPath = Path("runs/sample")
    """Folder that gets samples/chunk_00000.parquet, ... and counts.json."""
    threads: Positive | None = None
    """CPU threads of each rank; null: as in training."""
    model: SampledModel = SampledModel()
    questions: LocalPath | None = None
    """.jsonl or .parquet file with the fields `question` and `answer`."""
    template: Template = "chat"
    """How the model is asked: its own chat template, the shipped r1 or plain, Table 1, or the question as it is."""
    system: str | None = None
    """System message, for chat, r1 and plain; null: none."""
    think: Literal["own", "prefilled"] = "own"
    """prefilled: the prompt ends in <think>; own: as the chat template has it."""
    prompt: LocalPath | None = None
    """Text file with {question}, which is what the model is asked: an example with its thoughts (the paper's few-shot
    cold start), or the wish for a detailed answer with reflection and verification. null: the question alone."""
    max_prompt_tokens: Positive = 2048
    """Tokens of a prompt with its template."""
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
    rewards: Rewards = Rewards()
    """How answers are graded: deadlines, workers, judge."""

    @model_validator(mode="after")
    def _fits_together(self) -> SampleConfig:
        problems = []
        if self.rollout.max_staleness or self.rollout.oversample != 1:
            problems.append("rollout: found max_staleness or oversample, required 0 and 1: nothing is trained here")
        if self.early_stop is not None and self.early_stop > self.samples:
            problems.append(f"early_stop: found {self.early_stop}, required <= samples = {self.samples}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        paths = {"model.path": self.model.path, "questions": self.questions, "prompt": self.prompt}
        return {key: path for key, path in paths.items() if path is not None}

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find its model, its questions and its generator."""
        problems = [] if self.model.path is not None else ["model.path: found null, required a Hugging Face folder"]
        if self.questions is None or self.questions.suffix not in (".jsonl", ".parquet"):
            problems.append(f"questions: found {self.questions or 'null'}, required a .jsonl or .parquet file")
        return problems + (self.rollout.sglang.problems() if self.rollout.engine == "sglang" else [])

    def as_run(self) -> RlConfig:
        """The configuration of a run that draws in this way: what a generator and the prompts need."""
        data = QuestionData(
            train=self.questions,
            template=self.template,
            system=self.system,
            think=self.think,
            max_prompt_tokens=self.max_prompt_tokens,
            overlong=self.overlong,
        )
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
