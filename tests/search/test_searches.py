"""The searches on trees that are written down: which steps go on, what is counted, PUCT beside DeepMind's mctx."""

import itertools
import json
import random
from pathlib import Path

import pytest

from r1engine.batch import Prompt
from r1engine.config.search import Search
from r1engine.data.question import Question
from r1engine.search.algorithms import search
from r1engine.search.asks import candidates
from r1engine.search.beam import beam
from r1engine.search.mcts import back_up, descend, mcts, select
from r1engine.search.tree import DrawnSteps, Node, Tree
from r1engine.search.vote import aggregate, choose

PROMPT = Prompt(0, [1, 2], "", Question(""))


class WrittenWorld:
    """Draws from a written tree: the names of a path -> the steps that follow in turn, "." ends one; name -> score."""

    def __init__(self, follow: dict[str, str], score: dict[str, float], how: str = "last") -> None:
        self.follow, self.score, self.tree, self.at = follow, score, Tree(PROMPT, how), {}
        self.expanded: list[list[str]] = []  # paths drawn from, round after round

    def name(self, node: Node) -> str:
        return "".join(chr(token) for token in self.tree.tokens(node))

    def run(self, asks) -> Tree:
        children = None
        while True:
            try:
                asked = asks.send(children)
            except StopIteration:
                return self.tree
            self.expanded.append([self.name(ask.node) for ask in asked])
            children = [self._draw(ask) for ask in asked]

    def _draw(self, ask) -> list[Node]:
        path = self.name(ask.node)
        drawn = []
        for _ in range(ask.draws):
            turn = self.at[path] = self.at.get(path, -1) + 1
            step = self.follow[path].split()[turn % len(self.follow[path].split())]
            drawn.append(DrawnSteps((tuple(map(ord, step)),), "stop" if step.endswith(".") else "", turn))
        children = self.tree.grow(ask.node, drawn, is_lookahead=ask.is_greedy)
        for child in dict.fromkeys(children):
            self.tree.set_scores(child, [self.score[self.name(child)]])
            child.answer = self.name(child) if child.finish else None
        return children

    def ended(self) -> list[str]:
        return [self.name(node) for node in self.tree.ended()]


def settings(**keys) -> Search:
    return Search.model_validate(keys)


def test_scores_of_steps_by_hand():
    scores = [0.9, 0.5, 0.8]
    assert aggregate(scores, "last") == 0.8
    assert aggregate(scores, "min") == 0.5
    assert aggregate(scores, "prod") == pytest.approx(0.36)
    assert aggregate(scores, "mean") == pytest.approx(0.733333, abs=1e-6)
    with pytest.raises(ValueError, match="found no score of a step"):
        aggregate([], "min")


def test_beam_keeps_the_written_steps():
    world = WrittenWorld(
        {"": "a b c d", "b": "e f.", "d": "g h", "be": "k. l.", "dh": "m. n."},
        {"a": 0.1, "b": 0.8, "c": 0.2, "d": 0.9, "be": 0.7, "dg": 0.1, "dh": 0.6}
        | {"bf.": 0.4, "bek.": 0.3, "bel.": 0.9, "dhm.": 0.5, "dhn.": 0.2},
    )
    world.run(beam(world.tree, settings(method="beam", n=4, width=2)))
    assert world.expanded == [[""], ["d", "b"], ["be", "dh"]]
    # What ended early keeps its place among the answers.
    assert world.ended() == ["bf.", "bek.", "bel.", "dhm.", "dhn."]
    assert choose([one for _, one in candidates(world.tree)], "best") == 2


def test_beam_of_one_goes_best_first_and_counts_what_it_gives_up():
    world = WrittenWorld(
        {"": "aaa bbb ccc ddd", "ccc": "ee. ff. gg. hh."},
        {"aaa": 0.1, "bbb": 0.2, "ccc": 0.9, "ddd": 0.3} | {f"ccc{x}.": 0.5 for x in ("ee", "ff", "gg", "hh")},
    )
    world.run(beam(world.tree, settings(method="beam", n=4, width=4)))
    assert world.expanded == [[""], ["ccc"]]
    assert world.tree.spent.drawn == 24  # 2 levels of 4 draws of 3 tokens, whatever survives


def test_beam_counts_equal_steps_once_and_their_tokens_each_time():
    world = WrittenWorld({"": "a a a b", "a": "c."}, {"a": 0.9, "b": 0.1, "ac.": 1.0})
    world.run(beam(world.tree, settings(method="beam", n=4, width=4)))
    first = world.tree.root.children[0]
    assert (first.samples, first.prior, world.tree.spent.drawn) == (3, 0.75, 4 + 4 * 2)
    assert world.ended() == ["ac."]
    assert candidates(world.tree)[0][1].weight == 4


def test_dvts_never_mixes_its_trees():
    world = WrittenWorld(
        {"": "a b c d", "b": "e. f", "d": "g h.", "bf": "i. j.", "dg": "k. l."},
        {"a": 0.1, "b": 0.9, "c": 0.2, "d": 0.3, "bf": 0.5, "dg": 0.6}
        | {"be.": 0.4, "dh.": 0.1, "bfi.": 0.7, "bfj.": 0.2, "dgk.": 0.3, "dgl.": 0.2},
    )
    world.run(search(world.tree, settings(method="dvts", n=4, width=2), 0))
    # The second tree goes on with its own best, though a beam of 4 would have kept b twice.
    assert world.expanded == [["", ""], ["b", "d"], ["bf", "dg"]]
    assert [child.steps for child in world.tree.root.children] == [(), ()]
    assert world.ended() == ["be.", "dh.", "bfi.", "bfj.", "dgk.", "dgl."]


def test_a_look_ahead_values_a_step_by_what_follows_it_and_is_paid():
    follow = {"": "a b", "a": "c", "b": "d e.", "bd": "f. g."}
    score = {"a": 0.9, "b": 0.1, "ac": 0.0, "bd": 0.8} | {"be.": 0.4, "bdf.": 0.9, "bdg.": 0.8}
    world = WrittenWorld(follow, score)
    world.run(beam(world.tree, settings(method="beam", n=2, width=2, lookahead=1)))
    assert [rounds[0] for rounds in world.expanded[:3]] == ["", "a", "b"]  # the look ahead made b the better one
    assert world.tree.root.children[1].value == 0.8
    assert world.tree.spent.drawn == sum(len(x.steps[0]) * x.samples for x in world.tree.nodes[1:])
    assert "bd" in [world.name(node) for node in world.tree.nodes if node.is_lookahead]


def test_a_look_ahead_is_no_answer():
    world = WrittenWorld({"": "a b", "a": "c. d.", "b": "d."}, {"a": 1, "b": 0, "ac.": 1, "ad.": 1, "bd.": 1})
    world.run(beam(world.tree, settings(method="beam", n=2, width=2, lookahead=1)))
    assert world.ended() == ["ad.", "ac."]  # drawn after the greedy ac., which is not among them twice
    assert sum(node.is_lookahead for node in world.tree.nodes) == 2


FIXTURE = json.loads((Path(__file__).parent / "mctx_visits.json").read_text())


@pytest.mark.parametrize(("number", "expected"), [*itertools.product(range(8), FIXTURE["visits"])])
def test_visits_are_those_of_mctx(number, expected):
    game, width = FIXTURE["games"][number], FIXTURE["width"]
    inner = sum(width**depth for depth in range(FIXTURE["depth"]))
    state: dict[Node, int] = {}

    def expand(node: Node) -> None:
        for action in range(width):
            child = Node(0, node, prior=game["priors"][state[node]][action])
            state[child] = width * state[node] + 1 + action
            child.value, child.finish = game["values"][state[child]], "stop" if state[child] >= inner else ""
            node.children.append(child)

    root = Node(0, None, value=game["values"][0])
    state[root] = 0
    expand(root)
    back_up([root], root.value)
    for _ in range(expected["simulations"]):
        path = descend(root, settings(method="mcts"))
        if not path[-1].finish:
            expand(path[-1])
        back_up(path, path[-1].value)
    assert [child.visits for child in root.children] == expected["visits"][number]


def test_selection_by_hand():
    """Values .2 and .8, priors .5, c 1.25: after 1 to 4 simulations the second child has 1, 2, 2, 3 visits.

    N = 3, n = (0, 2): .2 + .625 * 1.732 = 1.28 is more than .8 + .625 * 1.732 / 3 = 1.16.
    N = 4, n = (1, 2): .2 + .625 * 2 / 2 = .83 is less than .8 + .625 * 2 / 3 = 1.22.
    """
    root = Node(0, None, value=0.5)
    root.children = [Node(i, root, prior=0.5, value=value, finish="stop") for i, value in enumerate((0.2, 0.8))]
    back_up([root], 0.5)
    seen = []
    for _ in range(4):
        child = select(root, 1.25, 19652)
        back_up([root, child], child.value)
        seen.append([one.visits for one in root.children])
    assert seen == [[0, 1], [0, 2], [1, 2], [1, 3]]


def test_with_enough_simulations_the_best_leaf_is_found():
    rng = random.Random(3)
    follow, score = {}, {}
    for depth in range(4):
        for path in itertools.product("abc", repeat=depth):
            end = "." if depth == 3 else ""
            follow["".join(path)] = " ".join(x + end for x in "abc")
    leaves = {"".join(path) + ".": rng.random() for path in itertools.product("abc", repeat=4)}
    for path in [p for depth in range(1, 4) for p in map("".join, itertools.product("abc", repeat=depth))]:
        score[path] = max(value for leaf, value in leaves.items() if leaf.startswith(path))  # exact values
    world = WrittenWorld(follow, score | leaves)
    world.run(mcts(world.tree, settings(method="mcts", width=3, simulations=200), 0))
    best = choose([one for _, one in candidates(world.tree)], "best")
    assert candidates(world.tree)[best][0].answer == max(leaves, key=leaves.get)


def test_the_extension_limit_ends_a_tree_and_widening_lifts_it():
    def world() -> WrittenWorld:
        return WrittenWorld({"": "a. b. c. d."}, {"a.": 0.1, "b.": 0.2, "c.": 0.3, "d.": 0.9})

    narrow, wide = world(), world()
    narrow.run(mcts(narrow.tree, settings(method="mcts", width=2, simulations=20), 0))
    assert (narrow.ended(), narrow.tree.spent.drawn) == (["a.", "b."], 4)
    wide.run(mcts(wide.tree, settings(method="mcts", width=2, simulations=20, widen=0.5), 0))
    assert wide.ended() == ["a.", "b.", "c.", "d."]
    assert sum(child.prior for child in wide.tree.root.children) == pytest.approx(1)
    assert wide.tree.root.visits == 21


def test_a_rule_values_ends_and_what_it_cannot_decide_keeps_its_value():
    world = WrittenWorld({"": "a. b."}, {"a.": 0.25, "b.": 0.5})
    asks = mcts(world.tree, settings(method="mcts", width=2, simulations=30, use_rule=True, c_init=0.01), 0)
    children = world._draw(next(asks)[0])
    children[0].verdict, children[1].verdict = "undecided", "wrong"
    with pytest.raises(StopIteration):
        asks.send([children])
    assert children[0].mean == 0.25
    assert children[1].visits == 0 or children[1].mean == 0.0
    assert children[0].visits > 15


def test_noise_changes_the_roots_priors_alone_and_repeats():
    def priors(seed: int, noise: float) -> list[float]:
        world = WrittenWorld({"": "a. b."}, {"a.": 0.5, "b.": 0.5})
        world.run(mcts(world.tree, settings(method="mcts", width=2, simulations=1, noise=noise), seed))
        return [child.prior for child in world.tree.root.children]

    assert priors(0, 0.0) == [0.5, 0.5]
    assert priors(0, 0.25) == priors(0, 0.25) != priors(1, 0.25)
    assert sum(priors(0, 0.25)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "beam", "n": 2, "width": 4}, "search.n: found 2, required a multiple of search.width = 4"),
        ({"method": "beam", "use_rule": True}, "search.use_rule: found true with method beam, required mcts"),
        ({"method": "mcts", "lookahead": 2}, "search.lookahead: found 2 with method mcts, required beam or dvts"),
        ({"method": "best_of", "n": 5000}, "search.n: found 5000, required at most 4096 draws from one step"),
        (
            {"method": "beam", "n": 4096, "width": 4096, "lookahead": 1},
            "search.n: found 4096, required at most 4095 draws from one step",
        ),
        ({"method": "mcts", "width": 5000}, "search.width: found 5000, required at most 4096 draws from one step"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(keys, message):
    assert settings(**keys).problems() == [message]


def test_a_scorer_that_gives_another_number_of_scores_is_refused():
    tree = Tree(PROMPT, "min")
    (child,) = tree.grow(tree.root, [DrawnSteps(((1, 2), (3,)), "stop", 0)])
    assert tree.score_path(child) == (PROMPT, ((1, 2), (3,)), 0)
    with pytest.raises(ValueError, match="found 1 scores, required 2, one a step"):
        tree.set_scores(child, [0.5])
    for score in (float("nan"), 1.5, -0.1):
        with pytest.raises(ValueError, match=f"scorer: found the score {score}, required 0 to 1"):
            tree.set_scores(tree.root.children[0], [score] * len(tree.root.children[0].steps))
