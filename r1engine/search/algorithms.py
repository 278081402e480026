"""The searches by their names."""

from __future__ import annotations

from r1engine.config.search import Search
from r1engine.search.asks import Asks
from r1engine.search.beam import beam, best_of, dvts
from r1engine.search.mcts import mcts
from r1engine.search.tree import Tree


def search(tree: Tree, cfg: Search, seed: int) -> Asks:
    """The coroutine of `cfg.method`."""
    if cfg.method == "best_of":
        return best_of(tree, cfg)
    if cfg.method == "beam":
        return beam(tree, cfg)
    return dvts(tree, cfg) if cfg.method == "dvts" else mcts(tree, cfg, seed)
