"""What stages share between their data and the policy: a rank's rows, and what is logged of a supervised batch."""

from __future__ import annotations

from r1engine.batch import PackedBatch
from r1engine.model.policy import Policy
from r1engine.ranks import World


def own_rows(shards: list[list[PackedBatch]], world: World) -> list[PackedBatch]:
    """This data-parallel rank's rows, on its device."""
    return [row.to(world.device) for row in shards[world.dp_rank]]


def batch_metrics(policy: Policy, shards: list[list[PackedBatch]], lengths: list[int]) -> dict[str, float]:
    """Of texts of these lengths (tokens) in the rows of all ranks."""
    tokens = sum(lengths)
    return {"texts": len(lengths), "tokens": tokens, "padding_share": 1 - tokens / policy.computed_tokens(shards)}
