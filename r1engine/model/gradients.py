"""What Megatron puts around a model to train it: gradient buffers that are reduced over ranks, and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import local_multi_tensor_l2_norm

from r1engine.config import Optimizer
from r1engine.model.state.optimizer_state import fuse, move_to_host


def with_gradient_buffers(
    modules: Sequence[torch.nn.Module], config: TransformerConfig, *, is_sharded: bool
) -> list[DistributedDataParallel]:
    """Chunks of a model with float32 gradient buffers.

    Args:
        modules:    the chunks of layers of this rank.
        config:     theirs; it learns how gradients are finished.
        is_sharded: whether the optimizer's state is dealt to the data-parallel ranks.
    """
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=True,  # stops with the rank's name before the weights are touched
        use_distributed_optimizer=is_sharded,
    )
    return [DistributedDataParallel(config, ddp, module) for module in modules]


def make_optimizer(
    chunks: list[DistributedDataParallel], settings: Optimizer, dtype: torch.dtype, *, is_sharded: bool
) -> MegatronOptimizer:
    """AdamW over the chunks, with float32 master weights where the model's are bfloat16.

    Args:
        chunks:     of `with_gradient_buffers`.
        settings:   section `optimizer`.
        dtype:      of the weights.
        is_sharded: as there.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm and torch.cuda.is_available():
        clip_grads.l2_norm_impl = _norm_of_all
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=is_sharded,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    if settings.offload:
        move_to_host(optimizer)
    elif torch.cuda.is_available():
        fuse(optimizer)
    return optimizer


def _norm_of_all(
    chunk_size: int, noop_flag: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """[1] float32, the norm of all gradients. Megatron's own without Transformer Engine waits once a parameter."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0]))).float().view(1), None
