"""What every stage of training has: the model, its layout on the ranks, the optimizer, checkpoints and logs.

"v2" in the help texts is the paper's later version (arXiv 2501.12948v2 / Nature 2025), which prints the
hyper-parameters. Relative paths are taken from the working directory.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, cast, get_args

from pydantic import Field, model_validator

from r1engine.config.data_files import REQUIRED, is_data_file, is_on_hub, is_pattern
from r1engine.config.kind import KindConfig
from r1engine.config.section import Count, Fraction, LocalPath, Positive, Section

FP8_ROW_TOKENS = 128  # of a row on each rank: whole blocks in the products, and sequence parallelism gathers FP8
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Model(Section):
    """The model to train, and how Megatron computes it."""

    path: LocalPath | None = None
    """Local Hugging Face folder: config.json, *.safetensors, tokenizer.json."""
    max_positions: Positive | None = None
    """Longest sequence in place of config.json's max_position_embeddings, also in what is exported; null: as it is."""
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    """Base of the rotary angles in place of config.json's, also in what is exported; null: as it is."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on CPUs, bfloat16 on GPUs."""
    recompute: Literal[False, True, "selective"] = False
    """Recompute activations in the backward pass; selective: those of attention."""
    experts: Literal["megatron", "fused", "fused_fp8"] = "megatron"
    """Who computes the layers with experts: Megatron, or the fused ops in the model's precision or in FP8."""
    fp8: bool = False
    """Linears of attention, dense MLPs and shared experts in DeepSeek-V3's FP8 (Transformer Engine)."""
    expert_bias_rate: Annotated[float, Field(ge=0)] = 0.0
    """Step of the balancing bias; DeepSeek-V3: 0.001, at last 0."""
    balance_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the sequence-wise balance loss; DeepSeek-V3: 0.0001."""
    mtp_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the MTP modules' loss, which moves nothing but them; DeepSeek-V3: 0.3, then 0.1; 0: they are kept."""
    routing_replay: bool = True
    """The trainer takes the experts that the generator took (R3)."""

    @property
    def folder(self) -> Path:
        """`path`, which a configuration has that can run.

        Raises:
            ValueError: it has none.
        """
        if self.path is None:
            raise ValueError("model.path: found null, required a Hugging Face folder")
        return self.path


class Parallel(Section):
    """How the model and the data are dealt to the ranks."""

    tensor: Positive = 1
    """Ranks that each matrix is split over."""
    pipeline: Positive = 1
    """Ranks that the layers are dealt to."""
    virtual: Positive = 1
    """Chunks of layers that a pipeline stage holds (interleaved schedule)."""
    first_stage_layers: Positive | None = None
    """Layers of the first pipeline stage; null: as many as the others."""
    last_stage_layers: Positive | None = None
    """Layers of the last pipeline stage; null: as many as the others."""
    context: Positive = 1
    """Ranks that the tokens of each row are dealt to, for rows too long for one."""
    expert: Positive = 1
    """Ranks that the routed experts are dealt to."""
    expert_tensor: Positive = 1
    """Ranks that each routed expert is split over."""
    data: Positive | None = None
    """Ranks that the batch is dealt to; null: what is left of the world size."""
    sequence: bool | None = None
    """Sequence parallelism; null: on when tensor > 1."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over the data-parallel ranks (ZeRO-1)."""
    offload: bool = True
    """On GPUs: training state in host memory while generating."""
    timeout_minutes: Positive = 30
    """A rank that waits longer for the others fails; more than the slowest rank's share of a rollout."""

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    def data_ranks(self, world_size: int) -> int:
        """Number of data-parallel ranks when `world_size` processes run this layout.

        Raises:
            ValueError: the sizes do not make up the processes.
        """
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline}
        sizes |= {"context": self.context} if self.context > 1 else {}
        ranks = math.prod(sizes.values())
        named = " x ".join(f"{name} {size}" for name, size in sizes.items())
        if world_size % ranks:
            raise ValueError(
                f"parallel: {named} = {ranks} does not divide the world size {world_size}; "
                f"start with torchrun --nproc-per-node {ranks} or change the sizes"
            )
        if self.data not in (None, world_size // ranks):
            required = f"{world_size // ranks} = world size {world_size} / ({named})"
            raise ValueError(f"parallel.data: found {self.data}, required {required}")
        experts = self.expert * self.expert_tensor * self.pipeline
        if world_size % experts:
            raise ValueError(
                f"parallel: expert {self.expert} x expert_tensor {self.expert_tensor} x pipeline {self.pipeline} = "
                f"{experts} does not divide the world size {world_size}"
            )
        return world_size // ranks


class Optimizer(Section):
    """AdamW and its learning rate."""

    lr: Annotated[float, Field(gt=0)] = 3e-6
    """Learning rate. v2, RL: "the learning rate to 3e-6"."""
    schedule: Literal["constant", "cosine"] = "constant"
    """constant after the warm-up, or a cosine down to min_lr_ratio."""
    warmup_steps: Count = 0
    """Steps of the linear warm-up."""
    min_lr_ratio: Fraction = 0.1
    """A cosine ends at this share of lr."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global norm of the gradient; 0: off."""
    offload: bool = False
    """Master weights and moments in host memory, updated by the CPUs."""

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `steps`."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.schedule == "constant":
            return self.lr * warmup
        done = max(0, step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * warmup * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)


Template = Literal["chat", "r1", "plain", "r1_zero", "r1_zero_steps", "none"]
CHAT_TEMPLATES = ("chat", "r1", "plain")


def template_of(name: str) -> Template:
    """The template of this name.

    Raises:
        ValueError: there is none.
    """
    found = next((known for known in get_args(Template) if known == name), None)
    if found is None:
        raise ValueError(f"template: found {name!r:.40}, required one of {', '.join(get_args(Template))}")
    return cast("Template", found)


class Data(Section):
    """What is trained on, what is held out, and how it is shown to the model."""

    train: LocalPath | None = None
    """.jsonl or .parquet file."""
    heldout: LocalPath | None = None
    """The same form, for evaluation; null: no evaluation."""
    template: Template = "none"
    """How the model is asked."""
    system: str | None = None
    """System message of conversations that have none, for chat, r1 and plain; null: none."""
    think: Literal["own", "prefilled"] = "own"
    """prefilled: the prompt ends in <think>, which the model then does not write; own: as the chat template has it."""

    @model_validator(mode="after")
    def _chats(self) -> Data:
        found = [f"system: found {self.system!r:.60}"] if self.system is not None else []
        found += [f"think: found '{self.think}'"] if self.think != "own" else []
        if found and self.template not in CHAT_TEMPLATES:
            raise ValueError(f"{'; '.join(found)}, required template chat, r1 or plain, found '{self.template}'")
        if self.system is not None and not self.system.strip():
            raise ValueError("system: found a blank text, required one that says something, or null")
        return self

    @property
    def train_file(self) -> Path:
        """`train`, which a configuration has that can run.

        Raises:
            ValueError: it has none.
        """
        if self.train is None:
            raise ValueError("data.train: found null, required a data file")
        return self.train


class Evaluation(Section):
    """When the held-out data is looked at."""

    every: Count = 100
    """Optimizer steps between evaluations; 0: only before and after."""


class Checkpoint(Section):
    """What a run can go on from."""

    every: Count = 100
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep: Positive = 3
    """Newest checkpoints that are kept."""
    best: str | None = None
    """Metric of an evaluation (eval/pass_at_1): of the steps that have both, the best checkpoint is kept, too."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of it is the best."""
    resume: bool = True
    """Go on from the newest complete checkpoint of run_dir, if there is one."""
    remote: str | None = None
    """Object storage that each checkpoint is copied to, in a place of this run alone: s3://bucket/runs/name, or another
    protocol of fsspec; a run whose run_dir has no checkpoint goes on from there. null: none."""
    grace_seconds: Positive = 300
    """Between a signal to end and the kill that follows; a run that needs longer to its next checkpoint says so."""


class Log(Section):
    """What is written beside metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard files to run_dir/tb."""
    trackers: list[Literal["wandb", "mlflow", "trackio", "swanlab"]] = Field(default=[])
    """Where else metrics and samples go. Each reads its own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI)."""
    project: str = "r1engine"
    """Name of the project there."""
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """The first rank serves the newest metrics here, for Prometheus; null: not."""
    prometheus_host: str = "127.0.0.1"
    """Address that it listens on. Whoever reaches it can read the metrics."""
    report_seconds: Count = 120
    """Seconds between two writings of report.html while the run goes on; 0: only when it ends."""
    samples: Count = 8
    """Completions a step that are kept for the report."""


def row_multiple(model: Model, layout: Parallel) -> int:
    """Rows are padded to a multiple of so many tokens: equal parts, two chunks a context rank, whole FP8 blocks."""
    blocks = FP8_ROW_TOKENS if model.fp8 else 1
    chunks = 2 * layout.context if layout.context > 1 else 1
    return blocks * chunks * (layout.tensor if layout.is_sequence_parallel else 1)


def column_problems(columns: dict[str, str], fields: tuple[str, ...]) -> list[str]:
    """What is wrong with `data.columns` of a stage whose rows have these fields."""
    strange = [name for name in columns if name not in fields]
    return [f"data.columns: found {', '.join(strange)}, required some of {', '.join(fields)}"] if strange else []


class StageConfig(KindConfig):
    """The keys of every stage of training. Each kind of stage adds its own: `stage` names the kind."""

    MAKES: ClassVar[dict[str, str]] = {"model": "model"}

    run_dir: LocalPath = Path("runs/default")
    """Folder of the run: configuration, logs, checkpoints, report, trained model."""
    max_row_tokens: Positive | None = None
    """Tokens of a packed row; null: one longest sequence."""
    threads: Positive | None = None
    """CPU threads of each rank; null: OMP_NUM_THREADS (torchrun sets it to 1), else cores / ranks on this machine."""
    deterministic: bool = True
    """torch.use_deterministic_algorithms."""
    model: Model = Model()
    data: Data = Data()
    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the stage trains on."""
        raise NotImplementedError(f"{type(self).__name__} does not say how long its sequences are")

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of so many tokens."""
        return row_multiple(self.model, self.parallel)

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row: the configured number, or one longest sequence with its padding."""
        return self.max_row_tokens or self.longest_sequence + -self.longest_sequence % self.row_multiple

    def row_problems(self, longest: str) -> list[str]:
        """What is wrong with the length of a row; `longest` says how long a sequence may be."""
        rows, multiple, padded = self.max_row_tokens, self.row_multiple, self.longest_sequence
        padded += -padded % multiple
        if rows is None or rows - rows % multiple >= self.longest_sequence:
            return []
        layout = f"; in this layout rows are of a multiple of {multiple} tokens)" if multiple > 1 else ")"
        return [f"max_row_tokens: found {rows}, required >= {padded} = {longest} (a sequence is never split{layout}"]

    def source_problems(self) -> list[str]:
        """What the configuration lacks to find its model and its data.

        Checked by `load`, not by the class: code may build a configuration from parts.
        """
        problems, train, heldout = [], self.data.train, self.data.heldout
        if self.model.path is None:
            problems.append("model.path: found null, required a Hugging Face folder")
        if train is None:
            problems.append("data.train: found null, required a data file")
        for key, file in self.input_files().items():
            if file.suffix and not (is_on_hub(file) or is_data_file(file) or is_pattern(file) or file.is_dir()):
                problems.append(f"{key}: found {file}, required {REQUIRED}")
        has_splits = (
            train is not None and is_on_hub(train) and str(train).count(":") == 1
        )  # one for each, if none is named
        if train is not None and train == heldout and not has_splits:
            problems.append(f"data.heldout: found data.train = {train} itself, required other rows")
        return problems

    def world_problems(self, data_ranks: int) -> list[str]:
        """What does not divide by the data-parallel ranks."""
        return []

    def inputs(self) -> dict[str, Path]:
        """Key -> file or folder that the stage reads."""
        return {"model.path": self.model.folder} | self.input_files()

    def input_files(self) -> dict[str, Path]:
        """Key -> data file that the stage reads."""
        files = {"data.train": self.data.train, "data.heldout": self.data.heldout}
        return {key: file for key, file in files.items() if file is not None}
