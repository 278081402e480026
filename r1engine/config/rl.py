"""Reinforcement learning by GRPO (paper, sections 2.2 and 2.3). Defaults are those of DeepSeek-R1-Zero."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.config.rewards import Rewards
from r1engine.config.rollout import Rollout
from r1engine.config.section import Count, Fraction, LocalPath, Positive, Section
from r1engine.config.stage import Data, Evaluation, StageConfig, Template, column_problems

Preset = Literal["gsm8k", "math", "dapo_math", "deepscaler", "openr1_math", "numinamath", "big_math"]
QUESTION_FIELDS = ("question", "answer", "reward", "tests", "language", "domain")


class QuestionShare(Section):
    """Questions of another file, which get a share of every rollout."""

    path: LocalPath
    """.jsonl or .parquet file, as data.train."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Of a rollout's questions; data.train has the rest."""
    from_step: Count = 0
    """Optimizer steps before which none is taken. v2, of the last stage: general instruction data "exclusively in the
    final 400 training steps" of 1,700, so 1,300."""


class QuestionData(Data):
    """The questions."""

    train: LocalPath | None = None
    """Data file, folder or pattern (docs/data.md) with the fields `question` and `answer`."""
    more: list[QuestionShare] = Field(default=[])
    """Other files, each with its share of the questions: [{path: general.jsonl, share: 0.3, from_step: 1300}]."""
    heldout: LocalPath | None = None
    """The same, for evaluation; null: no evaluation."""
    template: Template = "r1_zero"
    """The paper's Table 1, the model's own chat template, the shipped r1 or plain, or the question as it is."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column is which: {question: problem, answer: reward_model.ground_truth}."""
    preset: Preset | None = None
    """Columns and answers of a public set, in place of the two keys beside this one."""
    answer_form: Literal["auto", "value", "hashes", "boxed"] = "auto"
    """Where the reference stands in an answer: all of it, behind #### or in the last box; auto: as the text has it."""
    most_unusable: Fraction = 0.5
    """Share of references that no rule can use, from which on a run is refused; all of them always are."""
    max_prompt_tokens: Positive = 2048
    """Tokens of a prompt with its template."""
    overlong: Literal["refuse", "skip"] = "refuse"
    """Questions whose prompt is longer: refuse the file, or leave them out and tell."""


class Grpo(Section):
    """The objective (eq. 1-3) and the size of a rollout."""

    questions: Positive = 512
    """Questions of a rollout. v2: "each rollout step generates 8,192 outputs"."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Completions of a question. v2: "for each question, we sample 16 outputs"."""
    minibatches: Positive = 16
    """Parts of a rollout, an optimizer step each. v2: "randomly split into 16 mini-batches", 512 completions each."""
    inner_epochs: Positive = 1
    """Passes over a rollout. v2: "trained for only a single inner epoch"."""
    clip_eps: Annotated[float, Field(gt=0)] = 10.0
    """The ratio is clipped at so much below and above 1. v2: "GRPO clip ratio to 10"."""
    clip_eps_high: Annotated[float, Field(gt=0)] | None = None
    """The same above 1 (DAPO's clip-higher); null: clip_eps."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Lower bound c*A for A < 0; null: off, as in the paper."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.001
    """v2: "KL coefficient to 0.001"; 0 needs no reference model."""
    loss: Literal["clip", "cispo", "sapo"] = "clip"
    """clip: eq. 1; cispo: MiniMax-M1; sapo: Qwen."""
    ratio_level: Literal["token", "sequence", "sequence_mean"] = "token"
    """token: as DeepSeekMath defines GRPO; sequence: eq. 1 as printed; sequence_mean: GSPO."""
    kl_grad: Literal["k2", "k3"] = "k3"
    """k3: eq. 2 as written; k2: an unbiased gradient, eq. 2's value."""
    tis: Literal["off", "truncate", "mask"] = "off"
    """Importance weights against the generator's log-probabilities: truncate large ones, or mask their tokens."""
    tis_high: Annotated[float, Field(gt=0)] = 2.0
    """Largest importance weight."""
    advantage: Literal["mean_std", "mean", "rloo", "batch_std"] = "mean_std"
    """mean_std: eq. 3; mean: Dr. GRPO."""
    std_ddof: Literal[0, 1] = 1
    """Eq. 3 does not say which standard deviation: 1 is the sample's, as in TRL, verl and slime; 0 the population's."""
    loss_weight: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    """sequence_mean: eq. 1; token_mean: DAPO; constant: Dr. GRPO."""
    truncated: Literal["zero", "mask"] = "zero"
    """Truncated completions get reward 0, or are left out of the batch."""
    dynamic_sampling: Count = 0
    """DAPO: questions whose completions are all worth the same give way to others, drawn at most so often; 0: off."""
    reference_every: Count = 400
    """Optimizer steps after which the reference is the policy again. v2: every 400; 0: never."""


class SampledEvaluation(Evaluation):
    """pass@1 on held-out questions."""

    samples: Positive = 16
    """Completions of a question; pass@1 is their mean."""
    temperature: Annotated[float, Field(gt=0)] = 0.6
    """Paper, section 3: "a sampling temperature of 0.6"."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """The same sentence: "and a top-p value of 0.95"."""
    questions: Positive | None = None
    """The first so many of data.heldout; null: all."""
    benchmarks: dict[str, BenchmarkSettings] = Field(default={})
    """Benchmarks beside data.heldout, by name, as in a suite of `r1engine evaluate`; docs/evaluation.md."""


class RlConfig(StageConfig):
    """Reinforcement learning with GRPO."""

    stage: Literal["rl"] = "rl"
    """Kind of stage."""
    steps: Positive = 10_400
    """Optimizer steps. v2: "a total of 10,400 steps". The last rollout is smaller if they are not a multiple of its."""
    data: QuestionData = QuestionData()
    rollout: Rollout = Rollout()
    grpo: Grpo = Grpo()
    rewards: Rewards = Rewards()
    evaluation: SampledEvaluation = SampledEvaluation()

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps made from one whole rollout."""
        return self.grpo.minibatches * self.grpo.inner_epochs

    def input_files(self) -> dict[str, Path]:
        """Key -> data file that the stage reads."""
        more = {f"data.more.{i}.path": source.path for i, source in enumerate(self.data.more)}
        return super().input_files() | more

    def updates_at(self, step: int) -> int:
        """Optimizer steps made from the rollout that begins after `step` of them: fewer in the last one."""
        return min(self.steps_per_rollout, self.steps - step)

    def minibatches_at(self, step: int) -> int:
        """Mini-batches of that rollout; of the last one as many as its steps need."""
        return -(-self.updates_at(step) // self.grpo.inner_epochs)

    def questions_at(self, step: int) -> int:
        """Questions of that rollout; of the last one its mini-batches' share, rounded up."""
        return -(-self.grpo.questions * self.minibatches_at(step) // self.grpo.minibatches)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.data.max_prompt_tokens + self.rollout.longest_completion(self.steps)

    @model_validator(mode="after")
    def _fits_together(self) -> RlConfig:
        problems = (
            self._column_problems()
            + self._sampling_problems()
            + self._batch_problems()
            + self.rollout.problems()
            + self.rewards.problems()
        )
        if not self.rollout.problems():
            longest = self.rollout.longest_completion(self.steps)
            problems += self.row_problems(
                f"data.max_prompt_tokens {self.data.max_prompt_tokens} + rollout.max_tokens {longest}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _column_problems(self) -> list[str]:
        data, problems = self.data, column_problems(self.data.columns, QUESTION_FIELDS)
        if data.preset is not None and (data.columns or data.answer_form != "auto"):
            problems.append(f"data.preset: found {data.preset} beside data.columns or data.answer_form, required one")
        return problems

    def _sampling_problems(self) -> list[str]:
        if self.grpo.dynamic_sampling and self.rollout.max_staleness:
            return [
                f"grpo.dynamic_sampling: found rollout.max_staleness {self.rollout.max_staleness}, required 0 there"
            ]
        return []

    def _batch_problems(self) -> list[str]:
        problems, grpo, completions = [], self.grpo, self.grpo.questions * self.grpo.group_size
        if completions % grpo.minibatches:
            problems.append(
                f"grpo: {grpo.questions} questions x {grpo.group_size} samples = {completions} completions "
                f"do not split into {grpo.minibatches} mini-batches"
            )
        if (total := sum(source.share for source in self.data.more)) > 1:
            problems.append(f"data.more: found shares of {total:g} in all, required at most 1")
        if self.optimizer.warmup_steps > self.steps:
            found = self.optimizer.warmup_steps
            problems.append(f"optimizer.warmup_steps: found {found}, required <= steps = {self.steps}")
        return problems

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        models = {f"rewards.{name}_model.path": model.path for name, model in self.rewards.reward_models.items()}
        models["rewards.process_model"] = self.rewards.process_model
        return super().inputs() | {key: path for key, path in models.items() if path is not None}

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find its model, its questions and its generator."""
        return super().source_problems() + (self.rollout.sglang.problems() if self.rollout.engine == "sglang" else [])

    def world_problems(self, data_ranks: int) -> list[str]:
        """What does not divide by the data-parallel ranks."""
        grpo = self.grpo
        return batch_problems(grpo.questions, grpo.group_size, grpo.minibatches, data_ranks)


def batch_problems(questions: int, group_size: int, minibatches: int, data_ranks: int) -> list[str]:
    """What of a rollout does not divide by the data-parallel ranks."""
    problems, per_minibatch = [], questions * group_size // minibatches
    if questions % data_ranks:
        problems.append(
            f"grpo.questions: found {questions}, required a multiple of the {data_ranks} data-parallel ranks"
        )
    if per_minibatch % data_ranks:
        problems.append(
            f"grpo.minibatches: found {per_minibatch} completions per mini-batch, required a multiple of "
            f"the {data_ranks} data-parallel ranks"
        )
    return problems
