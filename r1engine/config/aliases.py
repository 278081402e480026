"""What other projects call our keys, so that an unknown key is answered with the right one. docs/coming-from.md."""

from __future__ import annotations

from typing import NamedTuple


class Alias(NamedTuple):
    """A key of another project."""

    project: str
    name: str  # as it is typed there, the last part of a dotted key
    key: str  # ours
    note: str = ""  # where it is not the same number


_COMPLETIONS = "in all, on all ranks: completions of a rollout = grpo.questions x grpo.group_size"
_STEPS = "optimizer steps; a rollout makes grpo.minibatches x grpo.inner_epochs of them"
_PACKED = "a limit of tokens, not of sequences: sequences are packed into rows, and gradients add up over all of them"
_MINI = "the number of parts of a rollout, an optimizer step each, not their size"

ALIASES: tuple[Alias, ...] = (
    Alias("TRL", "model_name_or_path", "model.path"),
    Alias("TRL", "dataset_name", "data.train"),
    Alias("TRL", "output_dir", "run_dir"),
    Alias("TRL", "learning_rate", "optimizer.lr"),
    Alias("TRL", "lr_scheduler_type", "optimizer.schedule"),
    Alias("TRL", "warmup_ratio", "optimizer.warmup_steps", "a number of steps, not a share of them"),
    Alias("TRL", "max_grad_norm", "optimizer.clip_grad"),
    Alias("TRL", "adam_beta1", "optimizer.beta1"),
    Alias("TRL", "adam_beta2", "optimizer.beta2"),
    Alias("TRL", "adam_epsilon", "optimizer.eps"),
    Alias("TRL", "beta", "grpo.kl_coef"),
    Alias("TRL", "epsilon", "grpo.clip_eps"),
    Alias("TRL", "epsilon_high", "grpo.clip_eps_high"),
    Alias("TRL", "delta", "grpo.dual_clip", "the bound for negative advantages, in units of the ratio"),
    Alias("TRL", "num_generations", "grpo.group_size"),
    Alias("TRL", "num_iterations", "grpo.inner_epochs"),
    Alias("TRL", "steps_per_generation", "grpo.minibatches"),
    Alias("TRL", "per_device_train_batch_size", "grpo.questions", _COMPLETIONS),
    Alias("TRL", "gradient_accumulation_steps", "max_row_tokens", _PACKED),
    Alias("TRL", "loss_type", "grpo.loss_weight", "grpo: sequence_mean; dapo, bnpo: token_mean; dr_grpo: constant"),
    Alias("TRL", "scale_rewards", "grpo.advantage", "group: mean_std; none: mean; batch: batch_std"),
    Alias("TRL", "importance_sampling_level", "grpo.ratio_level", "sequence (GSPO) is sequence_mean here"),
    Alias("TRL", "mask_truncated_completions", "grpo.truncated", "true is mask"),
    Alias("TRL", "ref_model_sync_steps", "grpo.reference_every"),
    Alias("TRL", "vllm_importance_sampling_correction", "grpo.tis", "true is truncate"),
    Alias("TRL", "vllm_importance_sampling_cap", "grpo.tis_high"),
    Alias("TRL", "use_vllm", "rollout.engine", "sglang is the one with servers"),
    Alias("TRL", "max_completion_length", "rollout.max_tokens"),
    Alias("TRL", "max_prompt_length", "data.max_prompt_tokens", "a longer prompt is refused or left out, never cut"),
    Alias("TRL", "reward_funcs", "rewards.functions", "{name: path.py:function}; arguments: own-rewards.md"),
    Alias("TRL", "reward_weights", "rewards.function_weights", "{name: weight}"),
    Alias("TRL", "max_steps", "steps", _STEPS),
    Alias("TRL", "num_train_epochs", "steps", _STEPS),
    Alias("TRL", "save_steps", "checkpoint.every"),
    Alias("TRL", "save_total_limit", "checkpoint.keep"),
    Alias("TRL", "eval_steps", "evaluation.every"),
    Alias("TRL", "bf16", "model.dtype", "bfloat16, which is the default on GPUs"),
    Alias("TRL", "gradient_checkpointing", "model.recompute"),
    Alias("TRL", "report_to", "log.trackers", "[wandb], [mlflow], [trackio] or [swanlab]; TensorBoard is on"),
    Alias("verl", "train_files", "data.train"),
    Alias("verl", "val_files", "data.heldout"),
    Alias("verl", "prompt_key", "data.columns", "{question: ...}"),
    Alias("verl", "filter_overlong_prompts", "data.overlong", "true is skip"),
    Alias("verl", "max_response_length", "rollout.max_tokens"),
    Alias("verl", "train_batch_size", "grpo.questions"),
    Alias("verl", "ppo_mini_batch_size", "grpo.minibatches", _MINI),
    Alias("verl", "ppo_micro_batch_size_per_gpu", "max_row_tokens", _PACKED),
    Alias("verl", "ppo_max_token_len_per_gpu", "max_row_tokens"),
    Alias("verl", "ppo_epochs", "grpo.inner_epochs"),
    Alias("verl", "clip_ratio", "grpo.clip_eps"),
    Alias("verl", "clip_ratio_low", "grpo.clip_eps"),
    Alias("verl", "clip_ratio_high", "grpo.clip_eps_high"),
    Alias("verl", "clip_ratio_c", "grpo.dual_clip"),
    Alias("verl", "kl_loss_coef", "grpo.kl_coef"),
    Alias("verl", "kl_loss_type", "grpo.kl_grad", "low_var_kl is k3"),
    Alias("verl", "loss_agg_mode", "grpo.loss_weight", "token-mean: token_mean; seq-mean-token-mean: sequence_mean"),
    Alias("verl", "norm_adv_by_std_in_grpo", "grpo.advantage", "true: mean_std; false: mean"),
    Alias("verl", "adv_estimator", "grpo.advantage"),
    Alias("verl", "grad_clip", "optimizer.clip_grad"),
    Alias("verl", "n", "grpo.group_size"),
    Alias("verl", "tensor_model_parallel_size", "parallel.tensor"),
    Alias("verl", "pipeline_model_parallel_size", "parallel.pipeline"),
    Alias("verl", "context_parallel_size", "parallel.context"),
    Alias("verl", "expert_model_parallel_size", "parallel.expert"),
    Alias("verl", "custom_reward_function", "rewards.functions", "{name: path.py:function}"),
    Alias("verl", "filter_groups", "grpo.dynamic_sampling", "how often questions may be drawn again"),
    Alias("verl", "total_training_steps", "steps", _STEPS),
    Alias("verl", "total_epochs", "steps", _STEPS),
    Alias("verl", "save_freq", "checkpoint.every"),
    Alias("verl", "test_freq", "evaluation.every"),
    Alias("verl", "default_local_dir", "run_dir"),
    Alias("verl", "logger", "log.trackers"),
    Alias("verl", "project_name", "log.project"),
    Alias("slime", "hf_checkpoint", "model.path"),
    Alias("slime", "prompt_data", "data.train"),
    Alias("slime", "input_key", "data.columns", "{question: ...}"),
    Alias("slime", "label_key", "data.columns", "{answer: ...}"),
    Alias("slime", "apply_chat_template", "data.template", "true is chat"),
    Alias("slime", "rollout_batch_size", "grpo.questions"),
    Alias("slime", "n_samples_per_prompt", "grpo.group_size"),
    Alias("slime", "global_batch_size", "grpo.minibatches", _MINI),
    Alias("slime", "num_steps_per_rollout", "grpo.minibatches"),
    Alias("slime", "num_rollout", "steps", _STEPS),
    Alias("slime", "rollout_max_response_len", "rollout.max_tokens"),
    Alias("slime", "rollout_temperature", "rollout.temperature"),
    Alias("slime", "eps_clip", "grpo.clip_eps"),
    Alias("slime", "eps_clip_high", "grpo.clip_eps_high"),
    Alias("slime", "eps_clip_c", "grpo.dual_clip"),
    Alias("slime", "use_tis", "grpo.tis", "true is truncate"),
    Alias("slime", "tis_clip", "grpo.tis_high"),
    Alias("slime", "ref_update_interval", "grpo.reference_every", "optimizer steps, not rollouts"),
    Alias("slime", "dynamic_sampling_filter_path", "grpo.dynamic_sampling", "how often questions may be drawn again"),
    Alias("slime", "custom_rm_path", "rewards.functions", "{name: path.py:function}"),
    Alias("slime", "max_tokens_per_gpu", "max_row_tokens"),
    Alias("slime", "save_interval", "checkpoint.every", "optimizer steps, not rollouts"),
    Alias("slime", "eval_interval", "evaluation.every", "optimizer steps, not rollouts"),
    Alias("slime", "clip_grad", "optimizer.clip_grad"),
)


def answer_to(name: str) -> str:
    """What to say to a key that has another name here; "" where no project that we know has it."""
    found = [alias for alias in ALIASES if alias.name == name.replace("-", "_")]
    if not found:
        return ""
    projects = " and ".join(dict.fromkeys(alias.project for alias in found))
    keys = " or ".join(dict.fromkeys(alias.key for alias in found))
    note = next((alias.note for alias in found if alias.note), "")
    return f"what {projects} calls {name} is {keys} here" + (f" ({note})" if note else "")
