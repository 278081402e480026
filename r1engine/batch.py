"""What flows through one GRPO iteration: Prompt -> Completion -> Sample -> Sequence -> PackedBatch.

A completion is whole on its home, the rank that drew it. The other ranks know its outline, and what they need of it
comes when a row is made (stages/rows.py).

One index convention everywhere: entry t belongs to tokens[t]; logp[t] = log pi(tokens[t] | tokens before it
in the same sequence). The first token of a sequence has logp 0 and weight 0. Nothing is shifted at borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from r1engine.data.question import Question


@dataclass(frozen=True)
class Prompt:
    """One question, rendered and tokenized."""

    id: int  # index in the data file, stable over epochs; part of every sampling seed
    tokens: list[int]
    text: str  # the rendered template
    question: Question


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    prompt: Prompt
    sample: int  # index inside the group
    tokens: list[int]  # sampled tokens, the stop token included
    logp: list[float]  # log-probability of each under the generator, at the sampling temperature (nats)
    text: str  # decoded, special tokens skipped
    truncated: bool  # stopped by the token limit, not by a stop token
    versions: tuple[tuple[int, int], ...] = ()  # (refresh count of weights, tokens drawn from them), in order
    # [T - 1, layers with experts, k] int16, the experts of prompt and completion; the last token was never run
    experts: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class Outline:
    """What every rank knows of a completion: a few numbers. Those that are a completion's mean the same."""

    home: int  # the rank that drew it, and alone has it
    prompt: Prompt
    sample: int
    num_tokens: int
    truncated: bool
    versions: tuple[tuple[int, int], ...] = ()
    experts: tuple[int, ...] | None = None  # shape


def name_of(completion: Completion | Outline) -> str:
    """How messages name a completion."""
    return f"completion {completion.sample} of prompt {completion.prompt.id}"


# (number of tokens up to here, value): of these tokens since the last such place. The last one ends with the sequence.
Runs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sample:
    """A completion with what the objective needs of it."""

    completion: Completion | Outline
    advantage: float | Runs  # of the completion, or of parts of it
    is_masked: bool = False  # True: takes part in nothing (a truncated completion under `truncated: mask`)


@dataclass(frozen=True)
class Away:
    """Stands for the tokens of a sequence that another rank has, and for what belongs to them."""

    name: str  # of the sequence, for messages
    num_tokens: int
    has_logp: bool = False
    experts: tuple[int, ...] | None = None  # shape

    def __len__(self) -> int:
        return self.num_tokens


@dataclass(frozen=True)
class Sequence:
    """One training sequence: a prompt and what follows it, with what the loss needs of the latter."""

    tokens: list[int] | np.ndarray | Away
    num_prompt: int  # the tokens from here on carry `weight`
    weight: float  # loss weight of each of them
    advantage: float | Runs = 1.0  # of the weighted tokens
    logp: list[float] | np.ndarray | None = None  # under the generator, one a weighted token
    experts: torch.Tensor | None = None  # as in Completion
    home: int | None = None  # the rank that has the tokens; to the others they are `Away`; None: every rank has them
    num_stale: int = 0  # older weights than the policy's drew the first so many weighted tokens
    # (index in tokens, target): these tokens alone carry `weight`, and their target as advantage; None: all carry it
    targets: tuple[tuple[int, float], ...] | None = None


@dataclass(frozen=True)
class PackedBatch:
    """Whole sequences laid end to end in one row; the unit that a model forward takes. T tokens, S sequences."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, from 0 in each sequence
    cu_seqlens: torch.Tensor  # [S+1] int32: first token of each sequence, then T
    max_seqlen: int
    advantage: torch.Tensor  # [T] float32
    loss_weight: torch.Tensor  # [T] float32; 0 on prompts and padding
    rollout_logp: torch.Tensor  # [T] float32, under the generator; 0 where not sampled
    old_logp: torch.Tensor | None = None  # [T] float32, under the policy before this rollout's first update
    ref_logp: torch.Tensor | None = None  # [T] float32, under the reference policy
    # [T, layers with experts, k] int16, the generator's choice, to be replayed; -1 where it made none
    experts: torch.Tensor | None = None
    stale: torch.Tensor | None = None  # [T] bool: drawn from older weights than the policy's; None: none is

    @property
    def behaviour_logp(self) -> torch.Tensor | None:
        """[T] float32, under the policy that a token's ratio is against: the generator's own where the token is stale,
        else old_logp. None where that is what a forward pass is about to find."""
        if self.old_logp is None or self.stale is None:
            return self.old_logp
        return torch.where(self.stale, self.rollout_logp, self.old_logp)

    def to(self, device: torch.device) -> PackedBatch:
        """The same row on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def padded(self, num_tokens: int) -> PackedBatch:
        """The same row, filled up to `num_tokens` by a sequence of zeros with weight 0."""
        missing = num_tokens - len(self.tokens)
        if missing == 0:
            return self
        grown = {
            name: torch.cat([values, values.new_full((missing, *values.shape[1:]), -1 if name == "experts" else 0)])
            for name, values in self._tensors().items()
        }
        grown["positions"] = torch.cat([self.positions, torch.arange(missing, device=self.positions.device)])
        grown["cu_seqlens"] = torch.cat([self.cu_seqlens, self.cu_seqlens.new_tensor([num_tokens])])
        return replace(self, max_seqlen=max(self.max_seqlen, missing), **grown)

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


class TokenOutputs(NamedTuple):
    """What a model says of the tokens of a packed row, at its temperature; 0 on the first token of a sequence."""

    logp: torch.Tensor  # [T] float32, log-probability of each token given those before it in its sequence (nats)
    entropy: torch.Tensor  # [T] float32, of the distribution that it is drawn from (nats)
    draft_logp: torch.Tensor | None = None  # [T] float32, under the MTP modules, where these are trained
    # [T] float32, of each sequence up to and with the token, where the head is a score; logp and entropy are 0 then
    score: torch.Tensor | None = None
    # The loss of the row (scalar, differentiable) and the sums of GrpoMetrics by name, where the model was given an
    # objective. logp and entropy have no gradient then, and are 0 on tokens of weight 0.
    loss: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None


@dataclass(frozen=True)
class RowShape:
    """How sequences become rows: see `Policy.row_shape` for those that a policy can take."""

    max_tokens: int  # most tokens of a row
    shards: int = 1  # data-parallel size
    multiple: int = 1  # rows are padded to a multiple of so many tokens
    num_rows_multiple: int = 1  # each shard gets a multiple of so many rows (interleaved pipelines need their stages)


Weighting = Literal["sequence_mean", "token_mean", "constant"]


def to_sequences(
    samples: list[Sample],
    *,
    weighting: Weighting = "sequence_mean",
    constant_tokens: int = 1,
    skip_zero_advantage: bool = False,
    replays_experts: bool = True,
    version: int | None = None,
    rank: int | None = None,
) -> list[Sequence]:
    """The training sequences of one mini-batch of all shards.

    The loss weights of all sequences sum to 1 (`sequence_mean`, `token_mean`), so that the loss is a sum over rows and
    does not depend on how they are packed, split or dealt:

        sequence_mean: 1 / (N * |o_i|)          eq. 1 as DeepSeekMath defines it: mean over tokens, then samples
        token_mean:    1 / sum_i |o_i|          DAPO
        constant:      1 / (N * constant_tokens)   Dr. GRPO

    with N the samples that are not masked.

    Args:
        samples:         the mini-batch of all shards.
        weighting:       as above.
        constant_tokens: length that `constant` divides by: the completion limit (tokens).
        skip_zero_advantage: leave out samples whose advantage is 0. They still count in N and in the tokens, so loss
            and gradient stay the same if there is no KL term.
        replays_experts: hand on the experts that the generator chose.
        version:         of the policy's weights: tokens of older ones are marked as stale; None: none is.
        rank:            home of the completions that are whole here; None: every rank has all.
    """
    used = [s for s in samples if not s.is_masked]
    num_tokens = sum(s.completion.num_tokens for s in used)

    def weight(sample: Sample) -> float:
        if weighting == "token_mean":
            return 1.0 / num_tokens
        if weighting == "constant":
            return 1.0 / (len(used) * constant_tokens)
        return 1.0 / (len(used) * sample.completion.num_tokens)

    return [
        replace(
            _sequence(s.completion, rank, replays_experts=replays_experts),
            weight=weight(s),
            advantage=s.advantage,
            # Tokens of older weights come first.
            num_stale=sum(n for v, n in s.completion.versions if version is not None and v < version),
        )
        for s in used
        if not skip_zero_advantage or np.any(per_token(s.advantage))
    ]


def _sequence(completion: Completion | Outline, rank: int | None, *, replays_experts: bool) -> Sequence:
    """Prompt and completion, of weight 0."""
    prompt = completion.prompt
    if isinstance(completion, Completion):
        experts = completion.experts if replays_experts else None
        tokens = prompt.tokens + completion.tokens
        return Sequence(tokens, len(prompt.tokens), 0.0, logp=completion.logp, experts=experts, home=rank)
    shape = completion.experts if replays_experts else None
    away = Away(name_of(completion), len(prompt.tokens) + completion.num_tokens, has_logp=True, experts=shape)
    return Sequence(away, len(prompt.tokens), 0.0, home=completion.home)


class Packed:
    """The sequences of each row of each shard; every shard has equally many rows, at least one. A row is made when it
    is asked for: a rank needs those of one shard, however many there are."""

    def __init__(self, shards: list[list[list[Sequence]]], multiple: int) -> None:
        """
        Args:
            shards:   of each the sequences of its rows.
            multiple: of tokens, that rows are filled up to.
        """
        self.shards, self._multiple = shards, multiple

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, shard: int) -> list[PackedBatch]:
        return [self.row(sequences) for sequences in self.shards[shard]]

    def row(self, sequences: list[Sequence]) -> PackedBatch:
        """The row of these sequences, which are all whole here, else a RuntimeError names one that is not."""
        return _row(sequences, self._multiple)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        return (self[shard] for shard in range(len(self)))

    def row_lengths(self) -> list[list[int]]:
        """Tokens of each row of each shard, padding included."""
        return [[filled_up(_size(items), self._multiple) for items in rows] for rows in self.shards]


def pack(sequences: list[Sequence], shape: RowShape) -> Packed:
    """Deal sequences to shards, longest first to the least loaded, and pack each shard's into rows by best fit.

    Raises:
        ValueError: a sequence does not fit a row.
    """
    return pack_units([[sequence] for sequence in sequences], shape)


def pack_units(units: list[list[Sequence]], shape: RowShape) -> Packed:
    """The same for units, such as pairs, of sequences that stay side by side in one row.

    Raises:
        ValueError: a unit does not fit a row.
    """
    capacity = shape.max_tokens - shape.max_tokens % shape.multiple
    shard_units: list[list[list[Sequence]]] = [[] for _ in range(shape.shards)]
    load = [0] * shape.shards
    for unit in sorted(units, key=lambda unit: -_size(unit)):
        if (size := _size(unit)) > capacity:
            what = "a sequence" if len(unit) == 1 else f"{len(unit)} sequences that stay together,"
            raise ValueError(f"pack: {what} of {size} tokens does not fit a row of {capacity}")
        least = load.index(min(load))
        shard_units[least].append(unit)
        load[least] += size
    rows = [_best_fit(dealt, capacity) for dealt in shard_units]
    num_rows = max(1, *(len(r) for r in rows))
    num_rows += -num_rows % shape.num_rows_multiple
    return Packed([shard + [[]] * (num_rows - len(shard)) for shard in rows], shape.multiple)


def filled_up(num_tokens: int, multiple: int) -> int:
    """Tokens of a row with so many, which is filled up to a multiple and never empty."""
    return max(num_tokens + -num_tokens % multiple, multiple)


def _size(unit: list[Sequence]) -> int:
    return sum(len(sequence.tokens) for sequence in unit)


def _best_fit(units: list[list[Sequence]], capacity: int) -> list[list[Sequence]]:
    """Each unit (longest first) goes to the fullest row that still takes it; the sequences of each row."""
    rows: list[list[Sequence]] = []
    free: list[int] = []
    for unit in units:
        need = _size(unit)
        best = min((i for i in range(len(rows)) if free[i] >= need), key=free.__getitem__, default=None)
        if best is None:
            rows.append([])
            free.append(capacity)
            best = len(rows) - 1
        rows[best].extend(unit)
        free[best] -= need
    return rows


def per_token(advantage: float | Runs) -> float | np.ndarray:
    """The advantage of all tokens, or [T] float64, of each."""
    if not isinstance(advantage, tuple):
        return advantage
    return np.repeat([value for _, value in advantage], np.diff([0, *(end for end, _ in advantage)]))


def _row(items: list[Sequence], multiple: int) -> PackedBatch:
    """One row. A sequence of zeros with weight 0 fills it up to the multiple; an empty row is nothing else."""
    for s in items:
        if isinstance(s.tokens, Away):
            raise RuntimeError(f"pack: found no tokens of {s.tokens.name}, required from its home, rank {s.home}")
    num_tokens = _size(items)
    padding = filled_up(num_tokens, multiple) - num_tokens
    items = [*items, Sequence([0] * padding, padding, 0.0)] if padding else items
    lengths = [len(s.tokens) for s in items]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu_seqlens[-1])
    starts = cu_seqlens.tolist()
    advantage, loss_weight, rollout_logp = torch.zeros(3, total).unbind()
    for start, s in zip(starts, items, strict=False):
        weighted = slice(start + s.num_prompt, start + len(s.tokens))
        if s.targets is None:
            loss_weight[weighted], advantage[weighted] = s.weight, torch.as_tensor(per_token(s.advantage))
        for index, target in s.targets or ():
            loss_weight[start + index], advantage[start + index] = s.weight, target
        if s.logp is not None:
            rollout_logp[weighted] = torch.from_numpy(np.array(s.logp, np.float32))
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate([np.array(s.tokens, np.int64) for s in items])),
        positions=torch.arange(total) - cu_seqlens[:-1].repeat_interleave(torch.tensor(lengths)),
        cu_seqlens=cu_seqlens.int(),
        max_seqlen=max(lengths),
        advantage=advantage,
        loss_weight=loss_weight,
        rollout_logp=rollout_logp,
        experts=_experts(items, starts),
        stale=_stale(items, starts),
    )


def _experts(items: list[Sequence], starts: list[int]) -> torch.Tensor | None:
    """[T, layers with experts, k] int16 of a row; None where no sequence has any."""
    recorded = next((s.experts for s in items if s.experts is not None), None)
    if recorded is None:
        return None
    experts = torch.full((starts[-1], *recorded.shape[1:]), -1, dtype=torch.int16)
    for start, s in zip(starts, items, strict=False):
        if s.experts is not None:
            experts[start : start + len(s.experts)] = s.experts
    return experts


def _stale(items: list[Sequence], starts: list[int]) -> torch.Tensor | None:
    """[T] bool of a row; None where no token is stale."""
    if not any(s.num_stale for s in items):
        return None
    stale = torch.zeros(starts[-1], dtype=torch.bool)
    for start, s in zip(starts, items, strict=False):
        first = start + s.num_prompt
        stale[first : first + s.num_stale] = True
    return stale
