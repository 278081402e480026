"""Monte Carlo tree search guided by a value model (paper, section 4.2: "MCTS guided by a pre-trained value model").

Selection is AlphaZero's PUCT with MuZero's constants (Schrittwieser et al., 2020, appendix B). A child that has no
visit counts with its own value. Values are in [0, 1] and are not rescaled.
"""

from __future__ import annotations

import math
import random

from r1engine.config.search import DRAWS, Search
from r1engine.search.asks import Asks, Expand
from r1engine.search.tree import Node, Tree


def select(node: Node, c_init: float, c_base: float) -> Node:
    """The child of the largest Q + P sqrt(N) / (1 + n) (c_init + log((N + c_base + 1) / c_base)); the first of equals.

    Q: mean value of the child, P: its prior, n: its visits, N: the node's.
    """
    factor = math.sqrt(node.visits) * (c_init + math.log((node.visits + c_base + 1) / c_base))
    return max(node.children, key=lambda child: child.mean + factor * child.prior / (1 + child.visits))


def descend(root: Node, cfg: Search) -> list[Node]:
    """The nodes from the root to the one whose turn it is: a leaf, or one that may have more children."""
    path = [root]
    while path[-1].children and not may_widen(path[-1], cfg):
        path.append(select(path[-1], cfg.c_init, cfg.c_base))
    return path


def may_widen(node: Node, cfg: Search) -> bool:
    """Whether a node that has children gets more: visits > (children / width)^(1 / widen); never with widen 0.

    The paper's "maximum extension limit for each node" is `width` with widen 0: it "can lead to the model getting
    stuck in local optima".
    """
    is_allowed = cfg.widen > 0 and node.drawn + cfg.width <= DRAWS
    return is_allowed and node.visits > (node.drawn / cfg.width) ** (1 / cfg.widen)


def back_up(path: list[Node], value: float) -> None:
    """A visit more for every node of a path."""
    for node in path:
        node.visits += 1
        node.total += value


def worth(node: Node, *, use_rule: bool) -> float:
    """What a visit of a node brings: its value, or the verdict of an ended one where the rule may be asked.

    An undecided verdict is no 0: the value stands for it.
    """
    if use_rule and node.verdict in ("right", "wrong"):
        return float(node.verdict == "right")
    return node.value


def mcts(tree: Tree, cfg: Search, seed: int) -> Asks:
    """`simulations` times: select a path, expand its end by `width` draws, and back up the value of that end.

    Equal draws are one child, whose prior is its share of them. A path that has ended is visited again at no cost. The
    root, which has no step to be scored, counts with the mean of its children's values.
    """
    rng = random.Random(f"mcts {seed} {tree.prompt.id}")
    root = tree.root
    yield [Expand(root, cfg.width)]
    _add_noise(root, cfg, rng)
    root.value = sum(child.prior * child.value for child in root.children)
    back_up([root], root.value)
    for _ in range(cfg.simulations):
        path = descend(root, cfg)
        leaf = path[-1]
        if leaf.children:  # it is widened, and the simulation goes on below it
            yield [Expand(leaf, cfg.width)]
            while path[-1].children:
                path.append(select(path[-1], cfg.c_init, cfg.c_base))
            leaf = path[-1]
        if not leaf.finish:
            yield [Expand(leaf, cfg.width)]
        back_up(path, worth(leaf, use_rule=cfg.use_rule))


def _add_noise(root: Node, cfg: Search, rng: random.Random) -> None:
    """AlphaZero's: priors of the root's children are mixed with a draw of a Dirichlet distribution."""
    if not cfg.noise:
        return
    drawn = [rng.gammavariate(cfg.noise_alpha, 1.0) for _ in root.children]
    total = sum(drawn) or 1.0
    for child, part in zip(root.children, drawn, strict=True):
        child.prior = (1 - cfg.noise) * child.prior + cfg.noise * part / total
