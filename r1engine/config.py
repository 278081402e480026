"""The typed configuration of a run. Defaults are the paper's; a YAML file holds only what differs.

"v2" in the comments is the paper's later version (arXiv 2501.12948v2 / Nature 2025), which prints the
hyper-parameters. This module imports no torch, so that `--help` and a config error answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, what was found and what is required."""


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Model(Section):
    path: Path | None = None  # local Hugging Face folder: config.json, *.safetensors, tokenizer.json
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU, bfloat16 on GPU
    recompute: bool = False  # recompute each layer's activations in the backward pass (memory for time)


class Base(Section):
    """A tiny base model made on the spot by a short pre-training run on mixed-quality text (the demo)."""

    hidden_size: Positive = 128
    layers: Positive = 3
    heads: Positive = 4
    kv_heads: Positive = 2
    intermediate_size: Positive = 256
    vocab_size: Positive = 512
    steps: Positive = 900
    texts_per_step: Positive = 96
    lr: Annotated[float, Field(gt=0)] = 3e-3
    heldout: Positive = 64  # questions kept out of both training runs


class Data(Section):
    train: Path | None = None  # .jsonl or .parquet with the fields `question` and `answer`
    heldout: Path | None = None  # the same, for evaluation
    template: Literal["r1_zero", "none"] = "r1_zero"  # r1_zero: the paper's Table 1
    max_prompt_tokens: Positive = 2048


class Parallel(Section):
    tensor: Positive = 1
    pipeline: Positive = 1
    data: Positive | None = None  # None: what is left of the world size
    sequence: bool | None = None  # sequence parallelism; None: on when tensor > 1
    distributed_optimizer: bool = True  # shard optimizer state over data-parallel ranks
    offload: bool = True  # on GPU: training state in host memory while generating


class Rollout(Section):
    engine: Literal["local"] = "local"
    temperature: Annotated[float, Field(gt=0)] = 1.0  # v2: "temperature to 1"
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: off
    max_tokens: dict[int, Positive] | Positive = {0: 32_768, 8_200: 65_536}  # v2: from step 8,200 on 65,536
    slots: Positive = 64  # sequences decoded at once by the embedded generator


class Grpo(Section):
    questions: Positive = 512  # per rollout; v2: "each rollout step generates 8,192 outputs"
    group_size: Annotated[int, Field(ge=2)] = 16  # v2: "for each question, we sample 16 outputs"
    minibatches: Positive = 16  # v2: "randomly split into 16 mini-batches", 32 questions = 512 completions each
    inner_epochs: Positive = 1  # v2: "trained for only a single inner epoch"
    clip_eps: Annotated[float, Field(gt=0)] = 10.0  # v2: "GRPO clip ratio to 10"
    clip_eps_high: Annotated[float, Field(gt=0)] | None = None  # None: clip_eps (DAPO's clip-higher sets it)
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # lower bound c*A for A < 0; off in the paper
    kl_coef: Annotated[float, Field(ge=0)] = 0.001  # v2: "KL coefficient to 0.001"; 0 needs no reference model
    ratio_level: Literal["token", "sequence"] = "token"  # sequence: eq. 1 as printed
    advantage: Literal["mean_std", "mean"] = "mean_std"  # mean_std: eq. 3; mean: Dr. GRPO
    std_ddof: Literal[0, 1] = 1  # eq. 3 does not say; 1 as in TRL, verl and slime
    loss_weight: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    truncated: Literal["zero", "mask"] = "zero"  # truncated completions: reward 0, or left out of the batch
    reference_every: Annotated[int, Field(ge=0)] = 400  # v2: reference := policy every 400 steps; 0: never


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0)] = 3e-6  # v2: "learning rate to 3e-6"
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Fraction = 0.1  # cosine ends at this share of lr
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = 1.0  # global norm; 0: off


class Rewards(Section):
    accuracy: float = 1.0  # weights; v2: accuracy and format "combined with the same weight"
    format: float = 1.0


class Evaluation(Section):
    every: Annotated[int, Field(ge=0)] = 100  # optimizer steps; 0: only before and after
    samples: Positive = 16  # completions a question; pass@1 is their mean
    temperature: Annotated[float, Field(gt=0)] = 0.6  # paper, section 3: "a sampling temperature of 0.6"
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95  # "and a top-p value of 0.95"
    questions: Positive | None = None  # the first so many of data.heldout; None: all


class Checkpoint(Section):
    every: Annotated[int, Field(ge=0)] = 100  # optimizer steps; 0: only at the end
    keep: Positive = 3
    resume: bool = True  # go on from the newest complete checkpoint of run_dir, if there is one


class Log(Section):
    tensorboard: bool = True
    wandb_project: str | None = None
    samples: Annotated[int, Field(ge=0)] = 8  # completions a step kept for the report


class Config(Section):
    run_dir: Path = Path("runs/default")
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Positive = 10_400  # optimizer steps; v2: "a total of 10,400 steps"
    max_row_tokens: Positive | None = None  # tokens of a packed row; None: prompt limit + token limit
    threads: Positive | None = None  # CPU threads of each rank; None: cores / ranks on this machine
    deterministic: bool = True  # torch.use_deterministic_algorithms
    model: Model = Model()
    base: Base | None = None
    data: Data = Data()
    parallel: Parallel = Parallel()
    rollout: Rollout = Rollout()
    grpo: Grpo = Grpo()
    optimizer: Optimizer = Optimizer()
    rewards: Rewards = Rewards()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps made from one rollout."""
        return self.grpo.minibatches * self.grpo.inner_epochs

    def max_tokens_at(self, step: int) -> int:
        """Completion limit (tokens) in force at an optimizer step."""
        limit = self.rollout.max_tokens
        return limit if isinstance(limit, int) else limit[max(s for s in limit if s <= step)]

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: the configured number, or one longest sequence."""
        limit = self.rollout.max_tokens
        longest = limit if isinstance(limit, int) else max(limit.values())
        return self.max_row_tokens or self.data.max_prompt_tokens + longest

    @model_validator(mode="after")
    def _cross_field(self) -> Config:
        grpo, completions = self.grpo, self.grpo.questions * self.grpo.group_size
        if completions % grpo.minibatches:
            raise ValueError(
                f"grpo: {grpo.questions} questions x {grpo.group_size} samples = {completions} completions "
                f"do not split into {grpo.minibatches} mini-batches"
            )
        if self.steps % self.steps_per_rollout:
            raise ValueError(
                f"steps: {self.steps} is not a multiple of the {self.steps_per_rollout} optimizer steps of a rollout"
            )
        if isinstance(self.rollout.max_tokens, dict) and 0 not in self.rollout.max_tokens:
            raise ValueError("rollout.max_tokens: a schedule needs an entry for step 0")
        return self
