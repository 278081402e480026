"""Process reward models (section 4.2): where steps end, how their scores are trained. The paper gives no numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1engine.config.addresses import address_problem
from r1engine.config.section import Fraction, LocalPath, Positive, Section
from r1engine.config.stage import Data, Optimizer, StageConfig, Template

ScoreMeaning = Literal["correctness", "value"]


class StepMarking(Section):
    """Where a step of a completion ends."""

    marks: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["\n\n"])
    """Texts that end a step: blank lines, or "tags that correspond to specific reasoning steps" such as "</step>"."""
    max_step_tokens: Positive | None = None
    """A step ends after so many tokens without a mark, too; null: only at a mark."""


class StepData(Data):
    """Solutions whose steps are labelled."""

    train: LocalPath | None = None
    """.jsonl or .parquet file: of `r1engine label`, PRM800K, Math-Shepherd, ProcessBench or TRL; docs/prm.md."""
    heldout: LocalPath | None = None
    """The same forms, for step accuracy, ProcessBench's F1 and calibration; null: no evaluation."""
    template: Template = "chat"
    """How the question is written before the steps: as the model that draws them is asked."""
    max_tokens: Positive = 8_192
    """Tokens of a question and its solution; none is ever cut."""
    max_dropped: Fraction = 0.05
    """Share of solutions that may be left out (too long, without a label, with a token of the template inside)."""


class ProcessTraining(Section):
    """The loss at the ends of steps, and how often and in which batches solutions are trained on."""

    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    """Of the score at a step's last token: cross-entropy with the label, or (sigmoid(score) - label)^2."""
    weighting: Literal["step", "solution"] = "step"
    """step: the mean over the labelled steps of a batch; solution: the mean over its solutions of theirs."""
    after_error: Literal["drop", "keep"] = "drop"
    """drop: nothing is learned of the steps behind a first label of 0; keep: for values, which are known there."""
    means: ScoreMeaning | None = None
    """What a score says of a step: that it is right, or how often one gets to the answer from there; null: value where
    the labels come from rollouts. It is written beside the model, and tells how the scores of steps become one."""
    epochs: Positive = 1
    """Passes over the data."""
    batch_size: Positive = 64
    """Solutions of an optimizer step."""


class ProcessRewardConfig(StageConfig):
    """A process reward model or value model: a scalar head on the model, trained at the ends of steps."""

    stage: Literal["process_reward"] = "process_reward"
    """Kind of stage."""
    data: StepData = StepData()
    steps: StepMarking = StepMarking()
    process: ProcessTraining = ProcessTraining()
    optimizer: Optimizer = Optimizer(lr=1e-5)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest solution with its question."""
        return self.data.max_tokens

    @model_validator(mode="after")
    def _fits_together(self) -> ProcessRewardConfig:
        if problems := self.row_problems(f"data.max_tokens {self.data.max_tokens}"):
            raise ValueError("\n".join(problems))
        return self


class StepScorerSection(Section):
    """What scores the steps of completions: a folder that runs in this process, or SGLang servers of it."""

    path: LocalPath
    """Folder of a process reward model, own or released."""
    urls: list[str] = Field(default=[])
    """SGLang servers that have the model, such as http://10.0.0.7:30000, alike; then only tokenizer, config.json and
    step_scores.json of the folder are read here. None: the model runs in this process."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Of a request to a server."""
    tries: Positive = 3
    """Of a request, over all servers."""
    parallel: Positive = 16
    """Requests to servers at once."""
    key_variable: str = ""
    """Environment variable with the servers' API key; "": none is sent."""
    format: Literal["auto", "own", "qwen_math_prm", "skywork", "math_shepherd", "rlhflow"] = "auto"
    """How the model wants question and steps: own: as they were drawn; the others as their makers say; auto: by the
    folder."""
    batch_tokens: Positive = 16_384
    """Tokens of a forward pass in this process."""
    cache_gib: Annotated[float, Field(gt=0)] = 4.0
    """Keys and values that are kept of steps that may go on (GiB)."""

    def problems(self) -> list[str]:
        """What does not fit together."""
        wrong = [(url, problem) for url in self.urls if (problem := address_problem(url))]
        return [f"scorer.urls: found {url}, required {problem}" for url, problem in wrong]
