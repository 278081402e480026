"""Drop-in replacements for the log-probability functions of other trainers, under their names and signatures.

    import trl.trainer.utils, r1kernels.integrations
    trl.trainer.utils.selective_log_softmax = r1kernels.integrations.selective_log_softmax

Results are float32 (float64 for float64 logits) and differentiable; no copy of the logits is made.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from r1kernels.logprob_entropy import logprob_entropy


def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """TRL: log-probability of each index, [...] or [..., K] from logits [..., V]. float32, also of bfloat16 logits."""
    if index.dim() == logits.dim() - 1:
        return logprob_entropy(logits, index, return_entropy=False).logp
    columns = [logprob_entropy(logits, column, return_entropy=False).logp for column in index.unbind(-1)]
    return torch.stack(columns, dim=-1)


def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    """TRL and verl: entropy of each row, [...]. `chunk_size` is accepted; nothing needs chunks here."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return logprob_entropy(logits, labels, entropy_grad=True).entropy


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
    """verl: log-probability of the labels, [...]; by default the gradient is written over the logits."""
    return logprob_entropy(logits, labels, return_entropy=False, inplace_backward=inplace_backward).logp


def calculate_log_probs_and_entropy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = False,
    chunk_size: int = -1,
    with_entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """slime: ([R, 1], [R] or None) from [R, V_local]; `chunk_size` is accepted. For top-p replay pass keep sets to
    `logprob_entropy` (keep_ids, keep_offsets): slime's [R, V_local] mask would cost more than the logits' read.
    """
    group = None if tp_group is None or tp_group.size() == 1 else tp_group
    found = logprob_entropy(
        logits, tokens, tp_group=group, return_entropy=with_entropy, entropy_grad=with_entropy and with_entropy_grad
    )
    return found.logp[:, None], found.entropy


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Megatron-core: negated log-probability [s, b] from [s, b, V_local]; the logits survive. Give the group: None is
    one rank.
    """
    group = None if tp_group is None or tp_group.size() == 1 else tp_group
    return -logprob_entropy(vocab_parallel_logits, target, return_entropy=False, tp_group=group).logp
