"""The typed configuration of a run. Defaults are the paper's; a YAML file holds only what differs.

"v2" in the comments is the paper's later version (arXiv 2501.12948v2 / Nature 2025), which prints the hyper-parameters.
Relative paths are taken from the working directory. Imports no torch: `--help` and a config error answer at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from r1engine.config_checks import (
    base_problems,
    batch_problems,
    has_sequence_parallelism,
    reward_problems,
    schedule_problems,
    server_problems,
    source_problems,
    split_problems,
)
from r1engine.config_file import ConfigError, read_overrides, read_source, validate, write_yaml

__all__ = ["Config", "ConfigError", "check_files", "check_world", "dump", "load", "to_yaml"]

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
PLAIN_REWARDS = ("accuracy", "format", "language", "length", "overlong", "repetition")  # whose weight is a number
RATED_REWARDS = ("helpfulness", "harmlessness")  # whose weight may change with the step
FP8_ROW_TOKENS = 128  # of a row on each rank: whole blocks in the products, and sequence parallelism gathers FP8
# Not strict: a path is written as text. A leading ~ is the home folder.
LocalPath = Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]


class Section(BaseModel):
    """Base of every section: unknown keys, text for numbers and infinities are refused; values are read-only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Model(Section):
    path: LocalPath | None = None  # local Hugging Face folder: config.json, *.safetensors, tokenizer.json
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU, bfloat16 on GPU
    recompute: Literal[False, True, "selective"] = False  # activations, in the backward pass; selective: of attention
    # Who computes the layers with experts: Megatron's own layer, or the fused ops (model/layers/moe.py) in the model's
    # precision or in DeepSeek-V3's FP8.
    experts: Literal["megatron", "fused", "fused_fp8"] = "megatron"
    # Linears of attention, dense MLPs and shared experts in DeepSeek-V3's FP8 (Transformer Engine; layers/fp8.py).
    fp8: bool = False
    expert_bias_rate: Annotated[float, Field(ge=0)] = 0.0  # step of the balancing bias; DeepSeek-V3: 0.001, at last 0
    balance_loss: Annotated[float, Field(ge=0)] = 0.0  # weight of the sequence-wise loss; DeepSeek-V3: 0.0001
    # Weight of the MTP modules' loss (DeepSeek-V3: 0.3, then 0.1), which moves nothing but them; 0: they are kept.
    mtp_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    routing_replay: bool = True  # the trainer takes the experts that the generator took (R3)


class Base(Section):
    """A tiny base model made on the spot by a short pre-training run on mixed-quality text (the demo)."""

    family: Literal["qwen2", "deepseek_v3"] = "qwen2"  # deepseek_v3: latent attention; experts after the first layer
    experts: Annotated[int, Field(ge=4)] = 8  # routed experts of such a layer, in two groups; two a token
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
    train: LocalPath | None = None  # .jsonl or .parquet with the fields `question` and `answer`
    heldout: LocalPath | None = None  # the same, for evaluation; null: no evaluation
    template: Literal["r1_zero", "none"] = "r1_zero"  # r1_zero: the paper's Table 1
    max_prompt_tokens: Positive = 2048


class Parallel(Section):
    tensor: Positive = 1
    pipeline: Positive = 1
    virtual: Positive = 1  # chunks of layers a pipeline stage holds (interleaved schedule)
    first_stage_layers: Positive | None = None  # layers of the first pipeline stage; null: as many as the others
    last_stage_layers: Positive | None = None
    context: Positive = 1  # ranks that the tokens of each row are dealt to, for rows too long for one
    expert: Positive = 1  # ranks that the routed experts are dealt to
    expert_tensor: Positive = 1  # ranks that each routed expert is split over
    data: Positive | None = None  # null: what is left of the world size
    sequence: bool | None = None  # sequence parallelism; null: on when tensor > 1
    distributed_optimizer: bool = False  # shard optimizer state over data-parallel ranks (ZeRO-1)
    offload: bool = True  # on GPU: training state in host memory while generating


class Sglang(Section):
    """Generation by SGLang servers (rollout.engine: sglang); docs/sglang.md shows each mode."""

    # colocated: one server on each block of `tensor` ranks' GPUs, started by the trainer; disaggregated: servers on
    # their own machines, started by `r1engine serve`; remote: any servers, by their URLs.
    mode: Literal["colocated", "disaggregated", "remote"] = "colocated"
    python: LocalPath | None = None  # interpreter of the environment that sglang is installed in
    urls: list[str] = []  # remote: http://host:port of each server
    servers: Positive = 1  # disaggregated: servers that must have registered before the run starts
    tensor: Positive = 1  # GPUs of one server
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.8  # of GPU memory, for weights and KV pool
    route: Literal["tensor", "distributed", "disk"] = "tensor"  # how weights travel
    bucket_mib: Positive = 512  # weights sent at once
    verify: bool = True  # after each refresh, compare checksums of all tensors and log-probabilities of fixed prompts
    stall_seconds: Annotated[float, Field(gt=0)] = 15.0  # a server that is silent for so long has failed
    start_seconds: Annotated[float, Field(gt=0)] = 900.0
    stream_interval: Positive = 16  # tokens that a server sends at once
    deterministic: bool = False  # SGLang's batch-invariant kernels; about a third slower
    cpu_tokens: Positive = 16_384  # KV pool of a server on CPUs (tokens)
    args: list[str] = []  # more arguments of sglang.launch_server


class Rollout(Section):
    engine: Literal["local", "sglang"] = "local"
    temperature: Annotated[float, Field(gt=0)] = 1.0  # v2: "temperature to 1"
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: off
    max_tokens: Positive | dict[int, Positive] = {0: 32_768, 8_200: 65_536}  # v2: from step 8,200 on 65,536
    slots: Positive = 64  # sequences decoded at once by the embedded generator
    # Versions of the weights that a token may be behind when it is trained on. 0: on-policy, as the paper; from 1 on,
    # the next rollout is drawn while the trainer works on this one (rollout/rollouts.py).
    max_staleness: Annotated[int, Field(ge=0)] = 0
    oversample: Annotated[float, Field(ge=1, le=2)] = 1.0  # questions on their way for each that a rollout takes
    sglang: Sglang = Sglang()


class Grpo(Section):
    questions: Positive = 512  # per rollout; v2: "each rollout step generates 8,192 outputs"
    group_size: Annotated[int, Field(ge=2)] = 16  # v2: "for each question, we sample 16 outputs"
    minibatches: Positive = 16  # v2: "randomly split into 16 mini-batches", 32 questions = 512 completions each
    inner_epochs: Positive = 1  # v2: "trained for only a single inner epoch"
    clip_eps: Annotated[float, Field(gt=0)] = 10.0  # v2: "GRPO clip ratio to 10"
    clip_eps_high: Annotated[float, Field(gt=0)] | None = None  # null: clip_eps (DAPO's clip-higher sets it)
    dual_clip: Annotated[float, Field(gt=1)] | None = None  # lower bound c*A for A < 0; off in the paper
    kl_coef: Annotated[float, Field(ge=0)] = 0.001  # v2: "KL coefficient to 0.001"; 0 needs no reference model
    loss: Literal["clip", "cispo", "sapo"] = "clip"  # clip: eq. 1
    ratio_level: Literal["token", "sequence", "sequence_mean"] = "token"  # sequence: eq. 1 as printed; _mean: GSPO
    kl_grad: Literal["k2", "k3"] = "k3"  # k3: eq. 2 as written; k2: an unbiased gradient, eq. 2's value
    tis: Literal["off", "truncate", "mask"] = "off"  # importance sampling against the generator's log-probabilities
    tis_high: Annotated[float, Field(gt=0)] = 2.0  # where its weights are truncated or masked
    advantage: Literal["mean_std", "mean", "rloo", "batch_std"] = "mean_std"  # mean_std: eq. 3; mean: Dr. GRPO
    std_ddof: Literal[0, 1] = 1  # eq. 3 does not say; 1 as in TRL, verl and slime
    loss_weight: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    truncated: Literal["zero", "mask"] = "zero"  # truncated completions: reward 0, or left out of the batch
    reference_every: Annotated[int, Field(ge=0)] = 400  # v2: reference := policy every 400 steps; 0: never


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0)] = 3e-6  # v2: "learning rate to 3e-6"
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Fraction = 0.1  # cosine ends at this share of lr
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = 1.0  # global norm; 0: off
    offload: bool = False  # master weights and moments in host memory, updated by the CPUs


class GradingServer(Section):
    """Servers of one model that grades; a request that fails at one goes to the next."""

    urls: Annotated[list[str], Field(min_length=1)]  # http://host:port of each; of the judge http://host:port/v1
    model: str  # its name there
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0  # of one try
    tries: Positive = 3  # of one request
    parallel: Positive = 16  # requests at once, of each rank
    key_variable: str = ""  # environment variable that holds the API key; "": none is sent


class Judge(GradingServer):
    """A language model behind an OpenAI-compatible endpoint that compares answer and reference (section 2.3.3)."""

    max_tokens: Positive = 2048  # of a reply; a reasoning model thinks before its word
    canaries: Positive = 2  # surely wrong answers among 64; if one is taken, none of these verdicts counts


class RewardModelServer(GradingServer):
    """A reward model behind SGLang's /classify (section 2.3.4)."""

    template: str  # the conversation as the model was trained on it, with {prompt} and {response}
    batch_size: Positive = 32  # texts of a request


class Rewards(Section):
    accuracy: float = 1.0  # weights; v2: accuracy and format "combined with the same weight"
    format: float = 1.0
    language: float = 0.0  # 1 after the cold start: "combine ... by directly summing them" (section 2.3.2)
    length: float = 0.0  # Kimi k1.5's length reward; the paper has none of these three
    overlong: float = 0.0  # DAPO's soft overlong punishment
    repetition: float = 0.0  # minus the share of repeated n-grams
    # What a reward model says of the records of reward "preference", from each optimizer step on: v2 adds it "only
    # in the final 400 training steps" of 1,700, {0: 0.0, 1300: 1.0}.
    helpfulness: float | dict[int, float] = 0.0  # sees the summary only; a number, or weights from steps on
    harmlessness: float | dict[int, float] = 0.0  # sees the whole response
    judge: Judge | None = None  # for records of reward "judge"
    helpfulness_model: RewardModelServer | None = None
    harmlessness_model: RewardModelServer | None = None
    alarm_window: Annotated[int, Field(ge=8)] = 40  # rollouts compared to tell that a reward model is being hacked
    blank_think_allowed: bool = False  # whether a blank think block keeps the format
    percent_may_be_missing: bool = False  # whether 10% and 10 are the same answer; else undecided
    interval_may_be_inequality: bool = False  # whether (3, oo) and x > 3 are; else undecided
    language_detector: Literal["py3langid", "lingua"] = "py3langid"  # tells Latin-script languages apart
    overlong_margin: Positive = 4096  # tokens before the limit over which the punishment grows
    repetition_ngram: Positive = 20  # words
    workers: Positive | None = None  # grading processes of each rank; null: cores / ranks on this machine
    deadline_seconds: Annotated[float, Field(gt=0)] = 5.0  # of grading one completion; then it is undecided
    code_deadline_seconds: Annotated[float, Field(gt=0)] = 600.0  # of all tests of one program
    unsafe: bool = False  # run model-written code even without namespaces or Landlock

    def weights_at(self, step: int) -> dict[str, float]:
        """Weight of each component of the reward at an optimizer step."""
        weights = {}
        for name in (*PLAIN_REWARDS, *RATED_REWARDS):
            weight = getattr(self, name)
            weights[name] = weight[max(s for s in weight if s <= step)] if isinstance(weight, dict) else weight
        return weights

    @property
    def reward_models(self) -> dict[str, RewardModelServer]:
        """The reward models there are, by the component that they give."""
        models = {name: getattr(self, f"{name}_model") for name in RATED_REWARDS}
        return {name: model for name, model in models.items() if model is not None}

    def is_rated_at(self, step: int) -> bool:
        """Whether a reward model counts at an optimizer step; it is not asked where not."""
        weights = self.weights_at(step)
        return any(weights[name] for name in RATED_REWARDS)


class Evaluation(Section):
    every: Annotated[int, Field(ge=0)] = 100  # optimizer steps; 0: only before and after
    samples: Positive = 16  # completions a question; pass@1 is their mean
    temperature: Annotated[float, Field(gt=0)] = 0.6  # paper, section 3: "a sampling temperature of 0.6"
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95  # "and a top-p value of 0.95"
    questions: Positive | None = None  # the first so many of data.heldout; null: all


class Checkpoint(Section):
    every: Annotated[int, Field(ge=0)] = 100  # optimizer steps; 0: only at the end
    keep: Positive = 3
    resume: bool = True  # go on from the newest complete checkpoint of run_dir, if there is one


class Log(Section):
    tensorboard: bool = True
    wandb_project: str | None = None
    samples: Annotated[int, Field(ge=0)] = 8  # completions a step kept for the report


class Config(Section):
    run_dir: LocalPath = Path("runs/default")
    seed: Annotated[int, Field(ge=0)] = 0
    steps: Positive = 10_400  # optimizer steps; v2: "a total of 10,400 steps"
    max_row_tokens: Positive | None = None  # tokens of a packed row; null: prompt limit + token limit
    threads: Positive | None = None  # CPU threads of each rank; null: cores / ranks on this machine
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
    def longest_completion(self) -> int:
        """Largest completion limit (tokens) that this run reaches."""
        limit = self.rollout.max_tokens
        return limit if isinstance(limit, int) else max(limit[s] for s in limit if s < self.steps)

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of so many tokens: equal parts, two chunks a context rank, whole FP8 blocks."""
        par, fp8 = self.parallel, FP8_ROW_TOKENS if self.model.fp8 else 1
        return fp8 * (2 * par.context if par.context > 1 else 1) * (par.tensor if has_sequence_parallelism(par) else 1)

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: the configured number, or one longest sequence with its padding."""
        longest = self.data.max_prompt_tokens + self.longest_completion
        return self.max_row_tokens or longest + -longest % self.row_multiple

    @model_validator(mode="after")
    def _cross_field(self) -> Config:
        problems = [*batch_problems(self), *base_problems(self.base), *schedule_problems(self)]
        problems += reward_problems(self.rewards)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def load(path: Path, overrides: list[str]) -> Config:
    """The configuration of a YAML file with `key.sub=value` overrides applied in order.

    Args:
        path: YAML 1.2 file with what differs from the defaults.
        overrides: each "key.sub=value", the value in YAML ("rollout.max_tokens={0: 32, 10: 64}").

    Raises:
        ConfigError: anything that cannot run; every problem found is listed.
    """
    cfg = validate(Config, read_source(Path(path), overrides))
    if problems := source_problems(cfg):
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return cfg


def load_rewards(overrides: list[str]) -> Rewards:
    """Section `rewards` with `key.sub=value` overrides of its keys, for scoring outside of a run.

    Raises:
        ConfigError: an override is none, or names no key or value of the section.
    """
    # A model that is named is meant to be asked: its weight is of no matter here.
    rewards = validate(Rewards, read_overrides(overrides))
    if problems := server_problems(rewards):
        raise ConfigError(problems)
    return rewards


def to_yaml(cfg: Config) -> str:
    """The resolved configuration as YAML text, every key included."""
    return write_yaml(_plain(cfg.model_dump()))


def dump(cfg: Config, path: Path) -> None:
    """Writes the resolved configuration; `load` of the file gives an equal Config."""
    temporary = path.with_name(path.name + ".tmp")  # a reader never sees half a file
    temporary.write_text(to_yaml(cfg), encoding="utf-8")
    os.replace(temporary, path)


def check_files(cfg: Config) -> None:
    """Looks at the input files before anything heavy is imported.

    Raises:
        ConfigError: the model folder or a data file is not there; every problem is listed.
    """
    problems = []
    if cfg.model.path is not None and not (cfg.model.path / "config.json").is_file():
        problems.append(f"model.path: found no config.json in {cfg.model.path}, required a Hugging Face folder")
    for key, file in (("data.train", cfg.data.train), ("data.heldout", cfg.data.heldout)):
        if file is not None and not file.is_file():
            problems.append(f"{key}: found no file {file}, required a .jsonl or .parquet file")
    if problems:
        raise ConfigError(problems)


def check_world(cfg: Config, world_size: int) -> int:
    """Number of data-parallel ranks when `world_size` processes run this configuration.

    Raises:
        ConfigError: the parallel sizes do not make up the world, or the batch or the base model does not divide by
            them; every problem is listed.
    """
    tensor, pipeline, context = cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.context
    ranks, data = tensor * pipeline * context, cfg.parallel.data
    sizes = f"tensor {tensor} x pipeline {pipeline}" + (f" x context {context}" if context > 1 else "")
    if world_size % ranks:
        raise ConfigError(f"parallel: {sizes} = {ranks} does not divide the world size {world_size}")
    dp = world_size // ranks
    if data not in (None, dp):
        raise ConfigError(f"parallel.data: found {data}, required {dp} = world size {world_size} / ({sizes})")
    if problems := split_problems(cfg, dp):
        raise ConfigError(problems)
    return dp


def _plain(value: Any) -> Any:
    """Nested values with paths as text, the form YAML takes."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
