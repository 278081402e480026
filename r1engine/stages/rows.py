"""What stages share between their data and the policy: rows of a rank, scores of tokens, what is logged of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from r1engine.batch import Packed, PackedBatch, RowShape, pack
from r1engine.batch import Sequence as PackedText
from r1engine.model.policy import Policy
from r1engine.ranks import World


def own_rows(shards: Packed, world: World) -> list[PackedBatch]:
    """This data-parallel rank's rows, on its device."""
    return [row.to(world.device) for row in shards[world.dp_rank]]


def shape_for(texts: Sequence[Sequence[int]], policy: Policy, row_tokens: int) -> RowShape:
    """Rows of so many tokens, or of more where a single text has more."""
    longest = max(map(len, texts))
    return policy.row_shape(max(row_tokens, longest + -longest % policy.row_multiple))


def probabilities_at(
    texts: Sequence[list[int]],
    places: Sequence[Sequence[int]],
    policy: Policy,
    world: World,
    row_tokens: int,
    weights: dict[str, torch.Tensor] | None = None,
) -> dict[int, list[float]]:
    """Number of a text -> the sigmoid of the score at each of its places, of the texts in this rank's rows. Collective.

    Args:
        texts:      tokens of each.
        places:     indices of tokens of each.
        policy:     awake.
        world:      the ranks.
        row_tokens: that a packed row holds; more where a single text has more.
        weights:    as of `Policy.scores`.
    """
    # A text tells its number where the target of its first token would stand.
    numbered = [PackedText(text, 0, 1.0, targets=((0, float(i)),)) for i, text in enumerate(texts)]
    rows = own_rows(pack(numbered, shape_for(texts, policy, row_tokens)), world)
    found: dict[int, list[float]] = {}
    for row, values in zip(rows, policy.scores(rows, weights), strict=True):
        probability = values.sigmoid().tolist()
        for start, _ in pairwise(row.cu_seqlens.tolist()):
            if row.loss_weight[start] > 0:  # padding has none
                number = round(float(row.advantage[start]))
                found[number] = [probability[start + place] for place in places[number]]
    return found


def batch_metrics(policy: Policy, shards: Packed, lengths: list[int]) -> dict[str, float]:
    """Of texts of these lengths (tokens) in the rows of all ranks."""
    tokens = sum(lengths)
    return {"texts": len(lengths), "tokens": tokens, "padding_share": 1 - tokens / policy.computed_tokens(shards)}
