"""Reads the layout and the job of a plan out of a run's configuration."""

from __future__ import annotations

from r1engine.config import ConfigError, ProcessRewardConfig, RewardModelConfig, RlConfig, SftConfig, StageConfig
from r1engine.hf.architecture import Architecture, is_fp8_folder
from r1engine.plan.hardware import GPUS, Assumed, Gpu
from r1engine.plan.layout import Layout
from r1engine.plan.memory import Job

PROMPT_TOKENS = 200  # mean prompt: the paper's template and a competition question
TEXT_TOKENS, TEXTS = 5_355, 804_745  # mean length and number of the paper's texts (v2, Table 5)
PAIRS, LABELS = 66_000, 106_000  # of the paper's two reward models (v2, section 3.1)
SOLUTIONS = 75_000  # of PRM800K (Lightman et al., 2023); the paper tells none
Supervised = SftConfig | RewardModelConfig | ProcessRewardConfig
Planned = RlConfig | Supervised


def gpu_named(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        ConfigError: unknown.
    """
    if name.lower() not in GPUS:
        raise ConfigError(f"plan: found --gpu {name}, required one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def assumptions(texts: list[str]) -> Assumed:
    """The assumed efficiencies with `name=value` changes applied.

    Raises:
        ConfigError: an unknown name, or a value that is no number.
    """
    names, changed = vars(Assumed()), {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in names:
            raise ConfigError(f"plan: found --assume {text}, required one of {', '.join(names)}")
        try:
            changed[name] = float(value)
        except ValueError:
            raise ConfigError(f"plan: found --assume {text}, required {name}=NUMBER") from None
    return Assumed(**changed)


def layout_of(cfg: StageConfig, gpus: int) -> Layout:
    """The layout that `cfg` has on `gpus` GPUs."""
    par = cfg.parallel
    return Layout(
        gpus=gpus,
        tensor=par.tensor,
        pipeline=par.pipeline,
        virtual=par.virtual,
        context=par.context,
        expert=par.expert,
        expert_tensor=par.expert_tensor,
        first_stage=par.first_stage_layers,
        last_stage=par.last_stage_layers,
        recompute="full" if cfg.model.recompute is True else "none",  # selective saves little beside flash attention
        distributed_optimizer=par.distributed_optimizer,
        optimizer_offload=cfg.optimizer.offload,
    )


def check_fp8(cfg: StageConfig, gpu: Gpu) -> None:
    """Refuse FP8 on a GPU that does not compute it in blocks.

    Raises:
        ConfigError: naming the key and the GPUs that do.
    """
    found = ["model.fp8: found true"] if cfg.model.fp8 else []
    found += ["model.experts: found fused_fp8"] if cfg.model.experts == "fused_fp8" else []
    if found and not gpu.has_fp8:
        able = ", ".join(name for name, other in GPUS.items() if other.has_fp8)
        raise ConfigError(f"plan: {'; '.join(found)} with --gpu {gpu.name}, required one of {able}")


def trained_part(arch: Architecture, cfg: Planned) -> Architecture:
    """What `cfg` makes of the architecture of its folder: a reward model, also of steps, ends in a score."""
    return arch.scoring() if isinstance(cfg, RewardModelConfig | ProcessRewardConfig) else arch


def job_of(cfg: Planned, assumed: Assumed, step: int = 0) -> Job:
    """The work of one rollout and its updates, with the limit of completions at an optimizer step; of a supervised run
    that of one step, on texts of the paper's mean length (of what is rated none is known: of the assumed share of the
    longest) or as assumed."""
    if isinstance(cfg, SftConfig):
        mean = assumed.mean_tokens or min(TEXT_TOKENS, cfg.data.max_tokens)
        return _step_of(cfg, cfg.sft.batch_size, 1, mean, cfg.data.max_tokens)
    if isinstance(cfg, RewardModelConfig | ProcessRewardConfig):
        mean, longest = assumed.mean_tokens or assumed.mean_length_share * cfg.data.max_tokens, cfg.data.max_tokens
        if isinstance(cfg, ProcessRewardConfig):
            return _step_of(cfg, cfg.process.batch_size, 1, mean, longest)
        return _step_of(cfg, cfg.reward_model.batch_size, cfg.texts_of_unit, mean, longest)
    longest = cfg.rollout.max_tokens_at(step)
    servers = cfg.rollout.sglang if cfg.rollout.engine == "sglang" else None
    return Job(
        questions=cfg.grpo.questions,
        group_size=cfg.grpo.group_size,
        minibatches=cfg.grpo.minibatches,
        inner_epochs=cfg.grpo.inner_epochs,
        prompt_tokens=min(PROMPT_TOKENS, cfg.data.max_prompt_tokens),
        mean_tokens=assumed.mean_tokens or assumed.mean_length_share * longest,
        max_tokens=longest,
        row_tokens=cfg.row_tokens,
        has_reference=cfg.grpo.kl_coef > 0,
        logits_chunk=None,
        generator_tensor=int(assumed.generator_gpus) or (1 if servers is None else servers.tensor),
        generator_bytes=1 if is_fp8_folder(cfg.model.folder) else 2,
        generator_expert=1 if servers is None or assumed.generator_gpus else servers.expert,
        has_receivers=servers is not None and servers.route == "receivers",
        generators=None if servers is None or servers.mode == "colocated" else len(servers.urls) or servers.servers,
        slots=cfg.rollout.slots if servers is None and not assumed.generator_gpus else None,
        is_ahead=cfg.rollout.max_staleness > 0,
        has_servers=servers is not None and servers.mode == "colocated",
        raters=sum(model.path is not None for model in cfg.rewards.reward_models.values()),
        with_mtp=cfg.model.mtp_loss_weight > 0,
        fp8=cfg.model.fp8,
        fp8_experts=cfg.model.experts == "fused_fp8",
    )


def _step_of(cfg: StageConfig, batch_size: int, texts: int, mean_tokens: float, max_tokens: int) -> Job:
    """`texts`: of one unit of the batch."""
    return Job(
        questions=batch_size,
        group_size=texts,
        minibatches=1,
        inner_epochs=1,
        prompt_tokens=0,
        mean_tokens=mean_tokens,
        max_tokens=max_tokens,
        row_tokens=cfg.row_tokens,
        has_reference=False,
        logits_chunk=None,
        generator_tensor=0,
        generator_bytes=2,
        with_mtp=cfg.model.mtp_loss_weight > 0,
        fp8=cfg.model.fp8,
        fp8_experts=cfg.model.experts == "fused_fp8",
    )


def epochs_of(cfg: Supervised) -> tuple[int, int, int, str]:
    """Epochs and batch size of a supervised run, the number of the paper's rows for it, and what they are.

    Of labelled steps the paper has none: PRM800K's.
    """
    if isinstance(cfg, SftConfig):
        return cfg.sft.epochs, cfg.sft.batch_size, TEXTS, "texts"
    if isinstance(cfg, ProcessRewardConfig):
        return cfg.process.epochs, cfg.process.batch_size, SOLUTIONS, "solutions"
    rows, name = (PAIRS, "pairs") if cfg.texts_of_unit == 2 else (LABELS, "labels")
    return cfg.reward_model.epochs, cfg.reward_model.batch_size, rows, name


def check_positions(cfg: Supervised, arch: Architecture) -> None:
    """Refuse texts that may be longer than the model's positions.

    Raises:
        ValueError: naming both ways out.
    """
    if arch.max_positions < cfg.data.max_tokens:
        raise ValueError(
            f"model.path: {cfg.model.folder} has {arch.max_positions:,} positions, required {cfg.data.max_tokens:,} "
            "(data.max_tokens); lower data.max_tokens, or set model.max_positions (docs/sft.md says what to expect)"
        )


def check_generators(cfg: Planned, gpus: int, gpu: Gpu) -> None:
    """Refuse servers on the trainer's GPUs that the trainer would not start.

    Raises:
        ConfigError: there are several nodes, or a server's GPUs do not divide the run's.
    """
    if not isinstance(cfg, RlConfig) or cfg.rollout.engine != "sglang" or cfg.rollout.sglang.mode != "colocated":
        return
    if gpus > gpu.per_host:
        raise ConfigError(
            f"rollout.sglang.mode: found colocated with {gpus} GPUs, required a single node, of {gpu.per_host}; "
            "over several nodes use disaggregated"
        )
    if gpus % cfg.rollout.sglang.tensor:
        raise ConfigError(f"rollout.sglang.tensor: {cfg.rollout.sglang.tensor} does not divide the {gpus} GPUs")
