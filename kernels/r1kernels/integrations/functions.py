"""Log-probability functions under the names and signatures of TRL, verl, slime and Megatron-core.

Results are float32 (float64 for float64 logits) and differentiable; no copy of the logits is made, except for slime's
dense mask. The `patch` of a trainer's module in this package puts them where that trainer calls its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from r1kernels.linear_logprob import linear_logprob
from r1kernels.logprob_entropy import LogProb, logprob_entropy


def selective_log_softmax(
    logits: torch.Tensor, index: torch.Tensor, temperature: float = 1.0, row_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """TRL: log-probability of each index, [...] or [..., K] from logits [..., V]; float32, also of bfloat16 logits.
    Rows where `row_mask` (of index's shape) is 0 are not read and give 0.
    """

    def of(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        mask = None if mask is None else mask != 0
        return logprob_entropy(logits, labels, temperature=temperature, row_mask=mask, return_entropy=False).logp

    if index.dim() == logits.dim() - 1:
        return of(index, row_mask)
    masks = [None] * index.shape[-1] if row_mask is None else row_mask.unbind(-1)
    return torch.stack([of(*pair) for pair in zip(index.unbind(-1), masks, strict=True)], dim=-1)


def selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL: (log-probability, entropy), [...] each, from one read of the logits; 0 where `row_mask` is 0."""
    mask = None if row_mask is None else row_mask != 0
    found = logprob_entropy(logits, index, temperature=temperature, row_mask=mask, entropy_grad=entropy_requires_grad)
    return found.logp, _entropy(found)


def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    """TRL and verl: entropy of each row, [...]. `chunk_size` is accepted; nothing needs chunks here."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _entropy(logprob_entropy(logits, labels, entropy_grad=True))


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
    """verl: log-probability of the labels, [...]; by default the gradient is written over the logits."""
    return logprob_entropy(logits, labels, return_entropy=False, inplace_backward=inplace_backward).logp


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl: (log-probability, entropy), both differentiable and [T] flat, from hidden states [..., H] and the output
    layer [V_local, H]; the logits never exist whole. `reduction` "sum" or "mean" makes the log-probabilities a scalar,
    the entropies stay [T].

    As in verl, the hidden states' gradients of a group's ranks are still to be added up, which the backward pass of
    Megatron's gather_from_sequence_parallel_region does; linear_logprob itself returns their sum.

    Raises:
        ValueError: `reduction` is something else, or as linear_logprob.
    """
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"linear_cross_entropy: reduction must be none, sum or mean, got {reduction!r}")
    group = _if_split(dist_process_group)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if group is not None and hidden.requires_grad:
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda grad: grad / group.size())  # the caller adds up what is the sum already
    found = linear_logprob(
        hidden, weight, labels.reshape(-1), temperature=temperature, tp_group=group, entropy_grad=True
    )
    logp = {"none": found.logp, "sum": found.logp.sum(), "mean": found.logp.mean()}[reduction.lower()]
    return logp, _entropy(found)


def calculate_log_probs_and_entropy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: torch.Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """slime: log-probability [R, 1] and entropy [R] or None, from logits [R, V_local]; `chunk_size` is accepted.

    `log_prob_keep_mask` [R, V_local] bool says which tokens top-p sampling left: the log-probability is that among them
    and the label itself, the entropy that of the whole row, as in slime. The mask costs a copy of the logits; keep sets
    (`keep_ids` and `keep_offsets` of logprob_entropy) cost none. A group of None is one rank.
    """
    group = _if_split(tp_group)
    if not len(logits):
        return logits.new_zeros(0), logits.new_zeros(0) if with_entropy else None
    if log_prob_keep_mask is None:
        found = logprob_entropy(
            logits, tokens, tp_group=group, return_entropy=with_entropy, entropy_grad=with_entropy and with_entropy_grad
        )
        return found.logp[:, None], found.entropy
    entropy = None
    if with_entropy:
        entropy = logprob_entropy(logits, tokens, tp_group=group, entropy_grad=with_entropy_grad).entropy
    column = tokens - (0 if group is None else group.rank() * logits.shape[1])
    is_here = (column >= 0) & (column < logits.shape[1])
    column = torch.where(is_here, column, 0)[:, None]
    kept = log_prob_keep_mask.scatter(1, column, log_prob_keep_mask.gather(1, column) | is_here[:, None])
    masked = logits.masked_fill(~kept, -torch.inf)
    return logprob_entropy(masked, tokens, tp_group=group, return_entropy=False).logp[:, None], entropy


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Megatron-core: negated log-probability [s, b] from [s, b, V_local]; the logits survive. Give the group: None is
    one rank.
    """
    group = _if_split(tp_group)
    return -logprob_entropy(vocab_parallel_logits, target, return_entropy=False, tp_group=group).logp


def _entropy(found: LogProb) -> torch.Tensor:
    assert found.entropy is not None  # as by default
    return found.entropy


def _if_split(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group, unless it is of one rank."""
    return None if group is None or group.size() == 1 else group
