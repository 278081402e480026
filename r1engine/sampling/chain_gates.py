"""What the miniature of search is expected to find: the gates of a trial, two of them counted in another way."""

from __future__ import annotations

import math
from collections.abc import Mapping

from r1engine.sampling.chain_truth import Numbers

MEASURES = {  # name in the table of runs -> what of the report's summary.json it is
    "labels by rollouts: accuracy": ("labels", "label accuracy"),
    "labels by rollouts: wrong called right": ("labels", "wrong called right"),
    "labels by rollouts: right called wrong": ("labels", "right called wrong"),
    "soft labels: error to the exact value (rms)": ("labels", "soft label: rmse to value"),
    "F1, exact labels": ("scorer exact", "F1"),
    "F1, hard labels by rollouts": ("scorer hard", "F1"),
    "F1, soft labels by rollouts": ("scorer soft", "F1"),
    "best-of-4, vote": ("exact best_of_4", "vote"),
    "beam of 4, vote": ("exact beam_4", "vote"),
    "best-of-16, majority": ("exact best_of_16", "majority"),
    "best-of-16, vote": ("exact best_of_16", "vote"),
    "best-of-16, vote by hard labels": ("rollouts best_of_16", "vote"),
    "best-of-16, best": ("exact best_of_16", "best"),
    "best-of-64, best": ("exact best_of_64", "best"),
    "beam of 16, vote": ("exact beam_16", "vote"),
    "DVTS of 16, vote": ("exact dvts_16", "vote"),
    "MCTS of 32 simulations, vote": ("exact mcts_16", "vote"),
    "RL by the rule: accuracy, first": ("reward rule", "accuracy first"),
    "RL by the rule: accuracy, last": ("reward rule", "accuracy last"),
    "RL by the rule: all steps right, last": ("reward rule", "all steps right last"),
    "RL by the sum: accuracy, best": ("reward sum", "accuracy best"),
    "RL by the sum: accuracy, last": ("reward sum", "accuracy last"),
    "RL by the sum: all steps right, last": ("reward sum", "all steps right last"),
    "RL by the sum: steps, first": ("reward sum", "steps first"),
    "RL by the sum: steps, last": ("reward sum", "steps last"),
    "RL by the sum: alarm at step": ("reward sum", "alarm at step"),
    "RL by the minimum: accuracy, best": ("reward min", "accuracy best"),
    "RL by the minimum: accuracy, last": ("reward min", "accuracy last"),
    "RL by the minimum: steps, last": ("reward min", "steps last"),
    "RL by the minimum: alarm at step": ("reward min", "alarm at step"),
    "round: pass@1 before": ("before", "pass@1"),
    "round: MCTS before": ("before", "MCTS"),
    "round: pass@1 after": ("after", "pass@1"),
    "round: MCTS after": ("after", "MCTS"),
    "round: pass@1 after rejection sampling": ("rejected", "pass@1"),
    "round: right sibling above wrong, before": ("before", "right sibling above wrong"),
    "round: right sibling above wrong, after": ("after", "right sibling above wrong"),
    "round: pairs of siblings, before": ("before", "pairs"),
    "round: pairs of siblings, after": ("after", "pairs"),
    "round: tokens of a question, MCTS": ("round", "drawn"),
    "round: tokens of a question, rejection sampling": ("reject", "drawn"),
}


def measures(found: Mapping[str, Numbers]) -> Numbers:
    """The measures of a run, by their names in the table of runs; what a run does not have is left out.

    Args:
        found: summary.json of `tiny_chain_report`.
    """
    return {name: found[what][key] for name, (what, key) in MEASURES.items() if key in found.get(what, {})}


def gates(run: Numbers) -> dict[str, bool]:
    """Which gates hold in a run.

    A completion has its steps and the piece behind the last mark, which counts as one: a right solution has 6, and one
    that stops behind its first step has 2. "Fewer than 2 steps that end" is fewer than 3 of these. The gate on accuracy
    by the sum is one on solutions that are right in all steps: a constant answer is right by luck, 0 in a quarter of
    the questions. A gate does not hold where the run lacks a measure of it.

    Args:
        run: of `measures`.
    """
    run = dict.fromkeys(MEASURES, math.nan) | run
    return {
        "labels by rollouts: accuracy .75 to .90": 0.75 <= run["labels by rollouts: accuracy"] <= 0.9,
        "labels by rollouts: over .25 of wrong called right": run["labels by rollouts: wrong called right"] > 0.25,
        "F1 of exact labels at least .75": run["F1, exact labels"] >= 0.75,
        "F1 of hard labels lower by .2": run["F1, hard labels by rollouts"] <= run["F1, exact labels"] - 0.2,
        "best-of-16: vote above majority by .2": run["best-of-16, vote"] >= run["best-of-16, majority"] + 0.2,
        "beam of 4 above best-of-4": run["beam of 4, vote"] > run["best-of-4, vote"],
        "best of 64 below best of 16": run["best-of-64, best"] < run["best-of-16, best"],
        "RL by the sum: over 3 times the steps": (
            run["RL by the sum: steps, last"] > 3 * run["RL by the sum: steps, first"]
        ),
        "RL by the sum: solutions right in all steps end below .1": run["RL by the sum: all steps right, last"] < 0.1,
        "RL by the minimum: fewer than 2 steps end": run["RL by the minimum: steps, last"] < 3,
        "RL by the rule: accuracy ends above .75": run["RL by the rule: accuracy, last"] > 0.75,
        "MCTS gains .15 before training": run["round: MCTS before"] >= run["round: pass@1 before"] + 0.15,
        "siblings told apart worse after the round": (
            run["round: right sibling above wrong, after"] < run["round: right sibling above wrong, before"]
        ),
    }
