"""Labels by rollouts: each step, bisection and OmegaPRM's tree, by hand; what is undecided is never 0."""

import random

import pytest

from r1engine.config import Labelling
from r1engine.demo import tiny_chain as demo
from r1engine.search.label import RolledOut, RolloutAsk, exploitation, exploration, label_of, make_labellers

SOLUTION = ((1,), (2,), (3,), (4,), (5,))


def run(solutions, cfg, rolled):
    """Labels of these solutions; `rolled(ask)` answers. Returns them and the prefixes that were rolled out."""
    asked, found = [], []
    for labeller in make_labellers(solutions, cfg):
        answers = None
        try:
            while True:
                asks = next(labeller) if answers is None else labeller.send(answers)
                asked += asks
                answers = [rolled(ask) for ask in asks]
        except StopIteration as ended:
            found += ended.value
    return found, asked


def by_label(labels):
    """Rollouts of a prefix of n steps are right if labels[n - 1] is 1, undecided if it is None."""
    verdicts = {1: "right", 0: "wrong", None: "undecided"}

    def rolled(ask: RolloutAsk):
        return [RolledOut(((9,),), verdicts[labels[len(ask.prefix) - 1]])] * ask.rollouts

    return rolled


@pytest.mark.parametrize(
    ("truth", "probes", "labels"),
    [
        ([1, 1, 0, 0, 0], [3, 2], [1, 1, 0, None, None]),
        ([0, 0, 0, 0, 0], [3, 2, 1], [0, None, None, None, None]),
        ([1, 1, 1, 1, 0], [3, 4], [1, 1, 1, 1, 0]),
        ([1, None, 0, 0, 0], [3, 2], [None, None, None, None, None]),  # who cannot say where it is says nothing
        ([1, 1, 1, None, 0], [3, 4], [1, 1, 1, None, None]),
    ],
)
def test_bisection_by_hand(truth, probes, labels):
    cfg = Labelling(method="bisect", rollouts=4)
    [found], asked = run([RolledOut(SOLUTION, "wrong")], cfg, by_label(truth))
    assert [len(ask.prefix) for ask in asked] == probes and all(ask.rollouts == 4 for ask in asked)
    assert found.labels == labels
    assert [i + 1 for i, count in enumerate(found.decided) if count is not None] == sorted(probes)


def test_bisection_looks_at_wrong_solutions_only():
    cfg = Labelling(method="bisect")
    right, unknown = run([RolledOut(SOLUTION, "right"), RolledOut(SOLUTION, "undecided")], cfg, None)[0]
    assert right.labels == [1.0] * 5 and unknown.labels == [None] * 5


def test_rollouts_of_each_step_stop_when_one_is_right():
    seen: dict[int, int] = {}

    def rolled(ask):
        found = []
        for _ in range(ask.rollouts):
            place = len(ask.prefix)
            seen[place] = seen.get(place, 0) + 1
            # From step 1 the third rollout is right, from 2 none, from 3 all are undecided, from 4 the first is right.
            verdict = {1: "right" if seen.get(1) == 3 else "wrong", 2: "wrong", 3: "undecided", 4: "right"}[place]
            found.append(RolledOut(((9,),), verdict))
        return found

    [found], _ = run([RolledOut(SOLUTION, "wrong")], Labelling(rollouts=8), rolled)
    assert found.labels == [1.0, 0.0, None, 1.0, 0.0]
    assert seen == {1: 4, 2: 8, 3: 8, 4: 1}  # 1, 2, 4, 8
    assert found.right == [1, 0, 0, 1, None] and found.decided == [4, 8, 0, 1, None]


def test_soft_labels_are_shares_of_decided_rollouts():
    def rolled(ask):
        verdicts = ["right", "wrong", "wrong", "undecided"] if len(ask.prefix) == 1 else ["undecided"] * 4
        return [RolledOut((), verdict) for verdict in verdicts]

    cfg = Labelling(kind="soft", rollouts=4)
    [found], asked = run([RolledOut(SOLUTION[:3], "undecided")], cfg, rolled)
    assert found.labels == [pytest.approx(1 / 3), None, None] and [ask.rollouts for ask in asked] == [4, 4]
    assert label_of(1, 4, Labelling(above=0.25)) == 0.0 and label_of(2, 4, Labelling(above=0.25)) == 1.0
    assert label_of(0, 0, cfg) is None


def test_omegaprm_s_choice_by_hand():
    cfg = Labelling(method="tree")
    assert exploitation(0.5, 250, cfg) == pytest.approx(0.670820, abs=1e-6)
    assert exploration(3, 16, cfg) == 0.125


def test_the_tree_bisects_each_rollout_once_and_labels_each_prefix_once():
    rng, chosen = random.Random(4), []

    def rolled(ask):
        # The step 7 is the error: behind it nothing is right.
        found = []
        for _ in range(ask.rollouts):
            rest = tuple((rng.choice([6, 7, 8, 9, 10, 11]),) for _ in range(5 - len(ask.prefix)))
            is_right = (7,) not in ask.prefix + rest
            found.append(RolledOut(rest, "right" if is_right else "wrong"))
        chosen.append(ask.prefix)
        return found

    solutions = [RolledOut(((6,), (8,), (7,), (6,), (8,)), "wrong"), RolledOut(((8,),) * 5, "right")]
    cfg = Labelling(method="tree", rollouts=16, searches=12)
    found, _ = run(solutions, cfg, rolled)
    assert len(chosen) == len(set(chosen))  # no prefix is rolled out twice
    labelled = {}
    for one in found:
        for count, label in enumerate(one.labels, 1):
            if label is not None:
                assert labelled.setdefault(one.steps[:count], label) is label  # once
                if label == 0:
                    assert (7,) in one.steps[:count]
    assert labelled[((8,),) * 5] == 1.0 and len(labelled) >= 9 and {*labelled.values()} == {0.0, 1.0}
    first = next(one for one in found if one.steps[:3] == solutions[0].steps[:3])
    assert first.steps == solutions[0].steps[:3] and first.labels[2] == 0.0  # its first error


def test_labels_of_the_chains_converge_to_their_exact_value():
    """The generator of the texts is the policy: soft labels are its value within four standard errors, and hard labels
    of right steps are wrong as often as (1 - V)^K says."""
    rng, rollouts = random.Random(5), 1024
    asked = [demo.new_chain(rng) for _ in range(2)]

    def verdicts(chain, prefix, count):
        """Of the texts' generator behind a prefix, whose last result stands in its last token."""
        rest = demo.Chain(prefix[-1][0], chain.operations[len(prefix) :])
        found = []
        for _ in range(count):
            value = rest.first
            for op, number in rest.operations:
                read = "+" if op == "*" and rng.random() < demo.MISREAD_RATE else op
                value = demo.applied(read, value, number)
                if rng.random() < demo.SLIP_RATE:
                    value = (value + rng.randrange(1, 10)) % 10
            found.append(RolledOut((), "right" if value == chain.answer else "wrong"))
        return found

    misses, expected = 0, []
    for chain in asked:
        results = [int(step[-1]) for step in chain.steps]
        solution = RolledOut(tuple((result,) for result in results), "right")
        values = [demo.exact_value(chain, n + 1, result) for n, result in enumerate(results[:-1])]
        soft = Labelling(kind="soft", rollouts=rollouts)
        [found], _ = run([solution], soft, lambda ask, chain=chain: verdicts(chain, ask.prefix, ask.rollouts))
        for label, value in zip(found.labels, values, strict=False):
            assert abs(label - value) <= 4 * (value * (1 - value) / rollouts) ** 0.5 + 1e-9
        for _ in range(150):
            [hard], _ = run(
                [solution], Labelling(rollouts=2), lambda ask, c=chain: verdicts(c, ask.prefix, ask.rollouts)
            )
            misses += sum(label == 0 for label in hard.labels[:-1])
        expected += [(1 - value) ** 2 for value in values for _ in range(150)]
    deviation = sum(p * (1 - p) for p in expected) ** 0.5
    assert abs(misses - sum(expected)) < 4 * deviation
