"""DeepSeek-V3's router: which experts a token goes to, with which weights, and how the load is balanced."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from r1kernels.dispatch import Impl, check_float, choose
from r1kernels.moe_plan import MAX_CHOICES, MAX_EXPERTS
from r1kernels.tracing import has_values, is_traced


class Gate(NamedTuple):
    """What `moe_gate_topk` returns."""

    ids: torch.Tensor  # [T, K] int32, distinct in a row, the highest score first
    weights: torch.Tensor  # [T, K] float32, differentiable
    counts: torch.Tensor  # [E] int32, tokens of each expert
    sequence_counts: torch.Tensor | None  # [S, E] int32, the same in each sequence; None without cu_seqlens
    sequence_scores: torch.Tensor | None  # [S, E] float32, sums of s_i / sum_j s_j over its tokens; differentiable


def moe_gate_topk(
    logits: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    topk: int = 8,
    n_group: int = 8,
    topk_group: int = 4,
    score: Literal["sigmoid", "softmax"] = "sigmoid",
    norm: bool = True,
    scale: float = 2.5,
    replay_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> Gate:
    """Choose `topk` of E experts for each token, inside its `topk_group` best groups (DeepSeek-V3, eq. 12 to 16).

        s      = sigmoid(logits) or softmax(logits)
        groups = the topk_group groups with the highest sum of their two best s + bias
        ids    = the topk experts of those groups with the highest s + bias
        w      = s[ids], divided by (its sum + 1e-20) if norm, times scale

    The bias decides who is chosen and has no part in the weights: they come from s itself, never from
    (s + bias) - bias. Equal scores: the lowest index wins. A NaN counts as -inf, so ids are valid and distinct for any
    logits; the weights of a row whose chosen scores are NaN are NaN. The defaults are DeepSeek-V3's.

    Args:
        logits:     [T, E] float32 or bfloat16 (float64 in the reference), contiguous; computed in float32. E <= 1024.
        bias:       [E] float32, finite, the load-balancing bias (`e_score_correction_bias`); no gradient.
        topk:       K, experts of a token; at most 32 and at most topk_group * E / n_group.
        n_group:    groups of E / n_group neighbouring experts.
        topk_group: groups that a token may use.
        score:      as above; softmax runs over all experts.
        norm:       as above.
        scale:      factor of the weights.
        replay_ids: [T, K] int32: these experts instead of the choice, with weights from today's scores (routing
                    replay). A row whose first id is negative is chosen freely (a token without a recorded routing).
        cu_seqlens: [S + 1] int32, borders of the sequences of a packed row: asks for the sums of each sequence.
        impl:       force an implementation; None picks one by device and dtype.

    Returns:
        Gate(ids, weights, counts, sequence_counts, sequence_scores).

    Raises:
        ValueError: shapes, dtypes or sizes are not the ones above, or a bias is not finite, a replayed id out of range
            or a border out of order (these on a CPU only: on a GPU the check would wait for the device).
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, -1.0, 0.0], [0.0, -2.0, 3.0, 1.0]])
        >>> gate = moe_gate_topk(logits, topk=2, n_group=2, topk_group=1, scale=1.0)
        >>> gate.ids, gate.weights, gate.counts
        (tensor([[1, 0],
                [2, 3]], dtype=torch.int32), tensor([[0.5464, 0.4536],
                [0.5658, 0.4342]]), tensor([1, 1, 1, 1], dtype=torch.int32))
    """
    op = "moe_gate_topk"
    _check_logits(op, logits, bias, score)
    _check_sizes(op, logits.shape[1], topk, n_group, topk_group, scale)
    _check_replay(op, logits, topk, replay_ids, cu_seqlens)
    if is_traced(logits):
        from r1kernels.moe_gate_topk.torch_op import traced

        scale = float(scale)
        return traced(logits, bias, topk, n_group, topk_group, score, norm, scale, replay_ids, cu_seqlens, impl)
    has_kernel = logits.dtype in (torch.float32, torch.bfloat16)
    if choose(op, impl, logits, have=("cuda", "reference") if has_kernel else ("reference",)) == "cuda":
        from r1kernels.moe_gate_topk.cuda_impl import gate
    else:
        from r1kernels.moe_gate_topk.reference import gate
    return Gate(*gate(logits, bias, topk, n_group, topk_group, score, norm, scale, replay_ids, cu_seqlens))


def moe_balance_loss(gate: Gate, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sequence-wise balance loss of each sequence, without its factor alpha (DeepSeek-V3, eq. 17 to 20).

        loss = sum_i f_i P_i,  f_i = E / (K t) * count_i,  P_i = (sum of s_i / sum_j s_j) / t,  t tokens

    Args:
        gate:       of `moe_gate_topk` with the same cu_seqlens. Equation 18 counts the experts with the highest scores,
                    whoever is chosen in the end: for that, of a call without bias, groups (n_group=1, topk_group=1)
                    and replay.
        cu_seqlens: [S + 1] int32, borders of the sequences.

    Returns:
        [S] float32, 1 for a perfectly even load, 0 for an empty sequence; differentiable in the logits.

    Raises:
        ValueError: the gate was computed without cu_seqlens, or for another number of sequences.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 2.0, -1.0, 0.0], [0.0, -2.0, 3.0, 1.0]])
        >>> cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
        >>> gate = moe_gate_topk(logits, topk=2, n_group=1, topk_group=1, cu_seqlens=cu_seqlens)
        >>> moe_balance_loss(gate, cu_seqlens)
        tensor([1.])
    """
    op = "moe_balance_loss"
    if gate.sequence_scores is None or gate.sequence_counts is None:
        raise ValueError(f"{op}: the gate has no sums of sequences; pass cu_seqlens to moe_gate_topk")
    if cu_seqlens.shape != (gate.sequence_scores.shape[0] + 1,):
        raise ValueError(
            f"{op}: the gate has {gate.sequence_scores.shape[0]} sequences, but cu_seqlens is {tuple(cu_seqlens.shape)}"
        )
    num_experts, topk = gate.counts.shape[0], gate.ids.shape[1]
    tokens = cu_seqlens.diff()[:, None].clamp(min=1)
    f = gate.sequence_counts.to(gate.sequence_scores.dtype) * (num_experts / topk) / tokens
    return (f * gate.sequence_scores / tokens).sum(1)


def moe_update_bias(bias: torch.Tensor, counts: torch.Tensor, rate: float) -> torch.Tensor:
    """The bias of the next step: up for experts with less than the mean load, down for the others (section 2.1.2).

        bias + rate * sign(mean(counts) - counts)

    Args:
        bias:   [E] float32.
        counts: [E] int32, tokens of each expert in the whole batch, all ranks summed.
        rate:   gamma; DeepSeek-V3 uses 0.001 and 0 at the end of pre-training.

    Returns:
        [E] float32, a new tensor.

    Raises:
        ValueError: shapes or dtypes are not the ones above, or devices differ.

    Example:
        >>> import torch
        >>> moe_update_bias(torch.zeros(3), torch.tensor([5, 1, 3], dtype=torch.int32), rate=0.001)
        tensor([-0.0010,  0.0010,  0.0000])
    """
    if bias.dim() != 1 or bias.dtype != torch.float32:
        raise ValueError(f"moe_update_bias: bias must be float32 [E], got {bias.dtype} {tuple(bias.shape)}")
    if counts.shape != bias.shape or counts.is_floating_point() or counts.device != bias.device:
        raise ValueError(
            f"moe_update_bias: counts must be integers {tuple(bias.shape)} on {bias.device} as bias, "
            f"got {counts.dtype} {tuple(counts.shape)} on {counts.device}"
        )
    # mean - count has the sign of sum - E * count, which is exact in integers.
    counts = counts.long()
    return bias + rate * (counts.sum() - counts * counts.shape[0]).sign().float()


def _check_logits(op: str, logits: torch.Tensor, bias: torch.Tensor | None, score: str) -> None:
    check_float(op, "logits", logits)
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            f"{op}: logits must be contiguous [T, E], got shape {tuple(logits.shape)} stride {logits.stride()}"
        )
    if score not in ("sigmoid", "softmax"):
        raise ValueError(f"{op}: score must be 'sigmoid' or 'softmax', got {score!r}")
    if bias is None:
        return
    if bias.shape != logits.shape[1:] or bias.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: bias must be float32 ({logits.shape[1]},) for logits {tuple(logits.shape)}, "
            f"got {bias.dtype} {tuple(bias.shape)}"
        )
    if bias.device != logits.device:
        raise ValueError(f"{op}: bias is on {bias.device}, but logits are on {logits.device}")
    if has_values(bias) and not bias.isfinite().all():
        raise ValueError(f"{op}: bias must be finite, got {float(bias[~bias.isfinite()][0])}")


def _check_sizes(op: str, num_experts: int, topk: int, n_group: int, topk_group: int, scale: float) -> None:
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"{op}: the number of experts must be in [1, {MAX_EXPERTS}], got {num_experts}")
    if n_group < 1 or num_experts % n_group:
        raise ValueError(f"{op}: {num_experts} experts do not divide into n_group={n_group} groups")
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"{op}: topk_group must be in [1, n_group={n_group}], got {topk_group}")
    allowed = topk_group * (num_experts // n_group)
    if not 1 <= topk <= min(MAX_CHOICES, allowed):
        raise ValueError(
            f"{op}: topk must be in [1, {MAX_CHOICES}] and at most the {allowed} experts of {topk_group} groups, "
            f"got {topk}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")


def _check_replay(
    op: str, logits: torch.Tensor, topk: int, replay_ids: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> None:
    num_tokens, num_experts = logits.shape
    if replay_ids is not None:
        if replay_ids.shape != (num_tokens, topk) or replay_ids.dtype != torch.int32 or not replay_ids.is_contiguous():
            raise ValueError(
                f"{op}: replay_ids must be contiguous int32 {(num_tokens, topk)}, "
                f"got {replay_ids.dtype} {tuple(replay_ids.shape)}"
            )
        given = replay_ids[replay_ids[:, 0] >= 0] if has_values(replay_ids) else replay_ids[:0]
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < num_experts:
            raise ValueError(
                f"{op}: replay_ids must be in [0, {num_experts}), got {int(given.min())} .. {int(given.max())}"
            )
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32):
        raise ValueError(f"{op}: cu_seqlens must be int32 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if cu_seqlens is not None and has_values(cu_seqlens):
        borders = [0, *cu_seqlens.tolist(), num_tokens]
        if borders != sorted(borders):
            raise ValueError(f"{op}: cu_seqlens must rise from 0 or more to at most {num_tokens}, got {borders[1:-1]}")
    for name, tensor in (("replay_ids", replay_ids), ("cu_seqlens", cu_seqlens)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but logits are on {logits.device}")
