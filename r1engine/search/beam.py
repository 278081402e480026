"""Best-of-N, beam search and diverse verifier tree search (Snell et al., 2024, which the paper's section 4.2 names)."""

from __future__ import annotations

from itertools import chain

from r1engine.config.search import Search
from r1engine.search.asks import Asks, Expand
from r1engine.search.tree import Node, Tree


def best_of(tree: Tree, cfg: Search) -> Asks:
    """`n` whole completions, drawn at once; `width` at a time where a budget may end the search before."""
    size = cfg.n if cfg.budget_tokens is None else cfg.width
    for done in range(0, cfg.n, size):
        yield [Expand(tree.root, min(size, cfg.n - done), is_whole=True)]


def beam(tree: Tree, cfg: Search) -> Asks:
    """`n` draws a step; the best n / width of the steps that do not end go on, until n completions have ended.

    An ended completion leaves the beams and stays an answer. Where fewer go on than n / width, each is drawn from more
    often, so that a step is n draws at most.
    """
    live = [tree.root]
    while live and sum(node.samples for node in tree.ended()) < cfg.n:
        groups = yield [Expand(node, cfg.n // len(live)) for node in live]
        children = _distinct(groups)
        yield from _look_ahead(tree, children, cfg.lookahead)
        live = _best([child for child in children if not child.finish], cfg.n // cfg.width)


def dvts(tree: Tree, cfg: Search) -> Asks:
    """n / width independent trees, each a beam search that keeps one step of `width`; they share no draw."""
    live = [tree.branch() for _ in range(cfg.n // cfg.width)]
    while live:
        groups = [_distinct([group]) for group in (yield [Expand(node, cfg.width) for node in live])]
        yield from _look_ahead(tree, list(chain.from_iterable(groups)), cfg.lookahead)
        best = [_best(group, 1)[0] for group in groups]
        live = [node for node in best if not node.finish]


def _distinct(groups: list[list[Node]]) -> list[Node]:
    return list(dict.fromkeys(chain.from_iterable(groups)))


def _best(nodes: list[Node], count: int) -> list[Node]:
    """The nodes of the highest values, the older one first where they are equal."""
    return sorted(nodes, key=lambda node: (-node.value, node.number))[:count]


def _look_ahead(tree: Tree, children: list[Node], steps: int) -> Asks:
    """Gives each child the value of its greedy continuation by so many steps, whose tokens count like all others."""
    last = {child: child for child in children}
    for _ in range(steps):
        open_ones = [child for child in children if not last[child].finish]
        if not open_ones:
            break
        groups = yield [Expand(last[child], 1, is_greedy=True) for child in open_ones]
        last |= {child: group[0] for child, group in zip(open_ones, groups, strict=True)}
    for child in children:
        child.value = last[child].value
