"""What a configuration must fulfil beyond the type of each value; each check returns the problems it found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1engine.config import Base, Config, Parallel, Rewards


def has_sequence_parallelism(layout: Parallel) -> bool:
    """As configured, or where there is tensor parallelism."""
    return layout.tensor > 1 if layout.sequence is None else layout.sequence


def split_problems(cfg: Config, dp: int) -> list[str]:
    """What does not divide by the parallel sizes."""
    problems, grpo, base = [], cfg.grpo, cfg.base
    per_minibatch = grpo.questions * grpo.group_size // grpo.minibatches
    if grpo.questions % dp:
        problems.append(f"grpo.questions: found {grpo.questions}, required a multiple of the {dp} data-parallel ranks")
    if per_minibatch % dp:
        problems.append(
            f"grpo.minibatches: found {per_minibatch} completions per mini-batch, required a multiple of "
            f"the {dp} data-parallel ranks"
        )
    if base is not None:
        for key, size, ways in (
            ("heads", base.heads, cfg.parallel.tensor),
            ("kv_heads", base.kv_heads, cfg.parallel.tensor),
            ("intermediate_size", base.intermediate_size, cfg.parallel.tensor),
            ("layers", base.layers, cfg.parallel.pipeline),
        ):
            if size % ways:
                name = "parallel.pipeline" if key == "layers" else "parallel.tensor"
                problems.append(f"base.{key}: found {size}, required a multiple of {name} = {ways}")
    return problems


def batch_problems(cfg: Config) -> list[str]:
    """What does not fit together in the numbers of a rollout and of the run."""
    problems, grpo, completions = [], cfg.grpo, cfg.grpo.questions * cfg.grpo.group_size
    if completions % grpo.minibatches:
        problems.append(
            f"grpo: {grpo.questions} questions x {grpo.group_size} samples = {completions} completions "
            f"do not split into {grpo.minibatches} mini-batches"
        )
    if cfg.steps % cfg.steps_per_rollout:
        problems.append(
            f"steps: {cfg.steps} is not a multiple of the {cfg.steps_per_rollout} optimizer steps of a rollout"
        )
    if cfg.optimizer.warmup_steps > cfg.steps:
        problems.append(f"optimizer.warmup_steps: found {cfg.optimizer.warmup_steps}, required <= steps = {cfg.steps}")
    if cfg.rollout.oversample > 1 and cfg.rollout.max_staleness < 2:
        problems.append(
            f"rollout.oversample: found {cfg.rollout.oversample:g} with max_staleness {cfg.rollout.max_staleness}, "
            "required max_staleness >= 2: what is not finished is carried over, and dropping it would favour short "
            "completions"
        )
    return problems


def reward_problems(rewards: Rewards) -> list[str]:
    """What does not fit together in section `rewards`."""
    problems = []
    schedules = {name: getattr(rewards, name) for name in ("helpfulness", "harmlessness")}
    for name, weight in schedules.items():
        if isinstance(weight, dict) and (0 not in weight or min(weight) < 0):
            return [f"rewards.{name}: found the steps {sorted(weight)}, required 0 and any later ones"]
        is_used = any(weight.values()) if isinstance(weight, dict) else weight != 0
        if is_used and name not in rewards.reward_models:
            problems.append(f"rewards.{name}_model: found null, required a reward model, as rewards.{name} is not 0")
        if not is_used and name in rewards.reward_models:
            problems.append(f"rewards.{name}: found 0 at every step, required another weight, as it has a model")
    problems += server_problems(rewards)
    weights = rewards.weights_at(0)
    if not any(weights.values()) and not rewards.reward_models:
        problems.append(f"rewards: all of {', '.join(weights)} weigh 0, required one other than 0")
    return problems


def server_problems(rewards: Rewards) -> list[str]:
    """What is wrong with the servers that section `rewards` names."""
    problems = []
    servers = rewards.reward_models | ({"judge": rewards.judge} if rewards.judge is not None else {})
    for name, server in servers.items():
        key = "rewards.judge" if name == "judge" else f"rewards.{name}_model"
        bad = [url for url in server.urls if not url.startswith(("http://", "https://"))]
        problems += [f"{key}.urls: found {url}, required http://host:port or https://..." for url in bad]
        if name != "judge" and any(server.template.count(part) != 1 for part in ("{prompt}", "{response}")):
            problems.append(f"{key}.template: found {server.template!r:.60}, required one {{prompt}}, one {{response}}")
    return problems


def schedule_problems(cfg: Config) -> list[str]:
    """What is wrong with the completion limits."""
    limit = cfg.rollout.max_tokens
    if isinstance(limit, dict):
        if 0 not in limit:
            return ["rollout.max_tokens: a schedule needs an entry for step 0"]
        if min(limit) < 0:
            return [f"rollout.max_tokens: found step {min(limit)}, required steps >= 0"]
    longest, multiple = cfg.data.max_prompt_tokens + cfg.longest_completion, cfg.row_multiple
    if cfg.max_row_tokens is not None and cfg.max_row_tokens - cfg.max_row_tokens % multiple < longest:
        padded = longest + -longest % multiple
        return [
            f"max_row_tokens: found {cfg.max_row_tokens}, required >= {padded} = data.max_prompt_tokens "
            f"{cfg.data.max_prompt_tokens} + rollout.max_tokens {cfg.longest_completion} (a sequence is never split"
            + (f"; in this layout rows are of a multiple of {multiple} tokens)" if multiple > 1 else ")")
        ]
    return []


def base_problems(base: Base | None) -> list[str]:
    """What is wrong with the shape of the tiny base model."""
    if base is None:
        return []
    problems = []
    if base.hidden_size % (2 * base.heads):
        problems.append(
            f"base.hidden_size: found {base.hidden_size}, required a multiple of {2 * base.heads} "
            f"(heads {base.heads}, each of even size for the rotary embedding)"
        )
    if base.heads % base.kv_heads:
        problems.append(f"base.heads: found {base.heads}, required a multiple of base.kv_heads = {base.kv_heads}")
    return problems


def source_problems(cfg: Config) -> list[str]:
    """Whether a file's configuration says which model to train on which questions.

    Checked by `load` and not by the model itself, so that code may build a Config from parts.
    """
    problems = []
    if cfg.base is None and cfg.model.path is None:
        problems.append("model.path: found null, required a Hugging Face folder (or a `base` section)")
    if cfg.base is not None and cfg.model.path is not None:
        problems.append(f"base: found together with model.path = {cfg.model.path}, required only one of the two")
    if cfg.base is None and cfg.data.train is None:
        problems.append("data.train: found null, required a .jsonl or .parquet file (or a `base` section)")
    problems += _sglang_problems(cfg)
    for key, file in (("data.train", cfg.data.train), ("data.heldout", cfg.data.heldout)):
        if file is not None and file.suffix not in (".jsonl", ".parquet"):
            problems.append(f"{key}: found {file}, required the extension .jsonl or .parquet")
    if cfg.data.train is not None and cfg.data.train == cfg.data.heldout:
        problems.append(f"data.heldout: found data.train = {cfg.data.train} itself, required other questions")
    return problems


def _sglang_problems(cfg: Config) -> list[str]:
    """What a run with SGLang servers lacks."""
    s = cfg.rollout.sglang
    if cfg.rollout.engine != "sglang":
        return []
    if s.mode == "remote" and not s.urls:
        return ["rollout.sglang.urls: found none, required the http://host:port of each server (mode remote)"]
    if s.mode != "remote" and s.python is None:
        return [
            f"rollout.sglang.python: found null, required the Python of an environment with sglang (mode {s.mode}): "
            "python3.12 -m venv sglang-env && sglang-env/bin/pip install sglang==0.5.23"
        ]
    bad = [url for url in s.urls if not re.fullmatch(r"http://[^/:]+:\d+/?", url)]
    return [f"rollout.sglang.urls: found {url}, required http://host:port" for url in bad]
