"""What a search asks for, and how its answers stand in the vote."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

from r1engine.search.tree import Node, Tree
from r1engine.search.vote import Candidate


class Expand(NamedTuple):
    """Draws from a node."""

    node: Node
    draws: int
    is_whole: bool = False  # to the end of the completion, in one piece
    is_greedy: bool = False  # the likeliest tokens: a look ahead


# Yields asks; is sent the children that each ask brought, one a draw (equal draws: the same child).
Asks = Generator[list[Expand], list[list[Node]], None]


def candidates(tree: Tree) -> list[tuple[Node, Candidate]]:
    """The whole completions of a tree with their weight in the vote: how often each was drawn and visited.

    A search without visits gives each draw one vote; in MCTS each visit is one.
    """
    return [
        (node, Candidate(node.answer, node.value, float(max(1, node.visits) if tree.root.visits else node.samples)))
        for node in tree.ended()
    ]
