"""log-probability and entropy of the labels, from logits that may be split over tensor-parallel ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1kernels.dispatch import Impl, check_float, choose


class LogProb(NamedTuple):
    """What `logprob_entropy` returns; both are [...] float32 (float64 for float64 logits), in nats."""

    logp: torch.Tensor  # differentiable in the logits
    entropy: torch.Tensor  # not differentiable


def logprob_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    tp_group: torch.distributed.ProcessGroup | None = None,
    inplace_backward: bool = False,
    impl: Impl | None = None,
) -> LogProb:
    """Log-probability of each label and entropy of each row of softmax(logits / temperature).

        z       = logits / temperature
        logp    = z[label] - logsumexp(z)
        entropy = logsumexp(z) - sum(softmax(z) * z)

    No [..., V] tensor is kept besides the logits themselves: the backward pass recomputes the
    probabilities, in place when asked. With `tp_group` the vocabulary is split evenly over its ranks in
    rank order, and three scalars a row cross the wire.

    Args:
        logits:           [..., V_local] float, this rank's slice of the vocabulary (nats).
        labels:           [...] int64, global token ids.
        temperature:      softmax temperature, > 0.
        tp_group:         process group of the vocabulary split; None: the whole vocabulary is here.
        inplace_backward: write the gradient over the logits, which are lost then. A second backward
                          pass through the same graph is wrong with it.
        impl:             force an implementation; None picks one.

    Returns:
        LogProb(logp, entropy), each [...] float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, dtypes or the temperature do not fit, or a label is outside the vocabulary (CPU only:
            on a GPU the check would wait for the device).
    """
    op = "logprob_entropy"
    check_float(op, "logits", logits)
    choose(op, impl, logits, have=("reference",))
    if labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{op}: labels must be int64 {tuple(logits.shape[:-1])} for logits {tuple(logits.shape)}, "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be > 0, got {temperature}")
    rank, ranks = (tp_group.rank(), tp_group.size()) if tp_group is not None else (0, 1)
    vocab_size = logits.shape[-1] * ranks
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(f"{op}: labels must be in [0, {vocab_size}), got {int(labels.min())} .. {int(labels.max())}")
    from r1kernels.logprob_entropy.reference import LogProbEntropy

    rows = logits.reshape(-1, logits.shape[-1])
    local_labels = labels.reshape(-1) - rank * logits.shape[-1]
    logp, entropy = LogProbEntropy.apply(rows, local_labels, temperature, tp_group, inplace_backward)
    return LogProb(logp.view(labels.shape), entropy.view(labels.shape))
