"""What stages share between their data and the policy: rows of a rank, scores of tokens, what is logged of a batch.

A rank makes the rows of its data-parallel shard. What it lacks of a row comes from the homes of the sequences, as
arrays; so a rank receives its own shard, once, and holds one row of it twice at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from r1engine.batch import Away, Packed, PackedBatch, RowShape, pack
from r1engine.batch import Sequence as PackedText
from r1engine.model.policy import Policy
from r1engine.ranks import World

Found = TypeVar("Found")


def own_rows(shards: Packed, world: World) -> list[PackedBatch]:
    """This data-parallel rank's rows, on its device. Collective where sequences have a home.

    Raises:
        RuntimeError: a sequence is not at its home.
    """
    return [shards.row(sequences).to(world.device) for sequences in _own_sequences(shards, world)]


def _own_sequences(shards: Packed, world: World) -> Iterator[list[PackedText]]:
    """Those of each row of this rank's shard, with their tokens. All shards' n-th rows travel at once."""
    if world.size == 1 or all(text.home is None for rows in shards.shards for row in rows for text in row):
        yield from shards.shards[world.dp_rank]
        return
    shard_of: list[int] = world.everyones(world.dp_rank)
    for rows in zip(*shards.shards, strict=True):
        sent: list[tuple[int, torch.Tensor]] = []
        for shard, texts in enumerate(rows):
            others = [rank for rank in range(world.size) if shard_of[rank] == shard and rank != world.rank]
            at_home = [text for text in texts if text.home == world.rank] if others else []
            arrays = [array for text in at_home for array in _arrays(text)]
            sent += [(rank, array) for rank in others for array in arrays]
        own = [text if text.home in (None, world.rank) else _with_room(text) for text in rows[world.dp_rank]]
        received = [(text.home, text) for text in own if text.home is not None and text.home != world.rank]
        world.exchange(sent, [(home, array) for home, text in received for array in _arrays(text)])
        yield own


def _arrays(text: PackedText) -> list[torch.Tensor]:
    """Tokens, log-probabilities and experts, as they travel: 4 bytes a token, 4 a sampled token, the experts' own."""
    if isinstance(text.tokens, Away):
        raise RuntimeError(f"rows: found no tokens of {text.tokens.name} at its home, rank {text.home}")
    found = [torch.from_numpy(np.asarray(text.tokens, np.int32))]
    found += [] if text.logp is None else [torch.from_numpy(np.asarray(text.logp, np.float32))]
    return found + ([] if text.experts is None else [text.experts.contiguous()])


def _with_room(text: PackedText) -> PackedText:
    """The text of another rank, with room for what comes."""
    away = text.tokens
    assert isinstance(away, Away)
    logp = np.empty(len(away) - text.num_prompt, np.float32) if away.has_logp else None
    experts = None if away.experts is None else torch.empty(away.experts, dtype=torch.int16)
    return replace(text, tokens=np.empty(len(away), np.int32), logp=logp, experts=experts)


def shape_for(texts: Sequence[PackedText], policy: Policy, row_tokens: int) -> RowShape:
    """Rows of so many tokens, or of more where a single text has more."""
    longest = max(len(text.tokens) for text in texts)
    return policy.row_shape(max(row_tokens, longest + -longest % policy.row_multiple))


def probabilities_at(
    texts: Sequence[PackedText],
    places: Sequence[Sequence[int]],
    policy: Policy,
    world: World,
    row_tokens: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> dict[int, list[float]]:
    """Number of a text -> the sigmoid of the score at each of its places, of the texts in this rank's rows. Collective.

    Args:
        texts:      the same on every rank; one may be whole only at its home.
        places:     indices of tokens of each.
        policy:     awake.
        world:      the ranks.
        row_tokens: that a packed row holds; more where a single text has more.
        weights:    as of `Policy.scores`.
    """
    # A text tells its number where the target of its first token would stand.
    numbered = [replace(text, weight=1.0, targets=((0, float(i)),)) for i, text in enumerate(texts)]
    rows = own_rows(pack(numbered, shape_for(texts, policy, row_tokens)), world)
    found: dict[int, list[float]] = {}
    for row, values in zip(rows, policy.scores(rows, weights), strict=True):
        probability = values.sigmoid().tolist()
        for start, _ in pairwise(row.cu_seqlens.tolist()):
            if row.loss_weight[start] > 0:  # padding has none
                number = round(float(row.advantage[start]))
                found[number] = [probability[start + place] for place in places[number]]
    return found


def of_all_shards(own: dict[int, Found], world: World) -> dict[int, Found]:
    """Number of a text -> what is found of it, on every rank, where each has that of its shard. Collective."""
    shares = world.everyones(own if world.is_first_of_shard else {})
    return {number: found for share in shares for number, found in share.items()}


def batch_metrics(policy: Policy, shards: Packed, lengths: list[int]) -> dict[str, float]:
    """Of texts of these lengths (tokens) in the rows of all ranks."""
    tokens = sum(lengths)
    return {"texts": len(lengths), "tokens": tokens, "padding_share": 1 - tokens / policy.computed_tokens(shards)}
