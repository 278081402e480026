"""What the miniature of search knows exactly: labels, searched steps and policies against the truth of the chains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np

from r1engine.data.steps import read_steps
from r1engine.demo.tiny_chain import LENGTH, Chain, chain_of, right_solution, step_truth, step_values
from r1engine.evaluation.ratings import area_under_curve
from r1engine.hf.tokenizer import PromptTokenizer
from r1engine.observe.report import read_rows_of
from r1engine.sampling.search_rows import Row
from r1engine.sampling.whole_lines import whole_lines

LOST = 0.1  # accuracy below which a policy is lost
END = 10  # rollouts at the end of a training that tell what became of the policy

Numbers = dict[str, float]


def label_quality(path: Path) -> Numbers:
    """Labels by rollouts against the truth: hard ones (any right rollout) as classes, soft ones as values.

    The last step is left out: its label is the solution's own verdict.
    """
    hard: list[tuple[bool, bool]] = []
    soft: list[tuple[float, float]] = []
    for row in read_steps(path):
        chain, steps = chain_of(row.question), list(row.steps)
        known = zip(row.labels[:-1], step_truth(chain, steps), step_values(chain, steps), strict=False)
        for label, truth, value in known:
            if label is not None:
                hard.append((label > 0, truth > 0))
                soft.append((label, value))
    called, is_right = np.array(hard).T
    label, value = np.array(soft).T
    return {
        "label accuracy": float((called == is_right).mean()),
        "wrong called right": float(called[~is_right].mean()),
        "right called wrong": float((~called[is_right]).mean()),
        "soft label: rmse to value": float(np.sqrt(((label - value) ** 2).mean())),
        "soft label: correlation": float(np.corrcoef(label, value)[0, 1]),
    }


def trained(run_dir: Path) -> Numbers:
    """Of reinforcement learning: accuracy, length, own reward of the first rollout and of the last `END` ones (means),
    and from where on the policy is lost.

    A constant answer is right by luck, 0 in a quarter of the questions. So "all steps right" is the share of the logged
    completions of the last `END` rollouts that are the right solution from the first step to the answer.
    """
    rows = [row for row in read_rows_of(run_dir) if "reward/accuracy" in row]
    accuracy = [row["reward/accuracy"] for row in rows]
    alarms = [row["step"] for row in rows if row.get("alarm/process")]
    last = max((i for i, value in enumerate(accuracy) if value >= LOST), default=-1)
    found = {"accuracy best": max(accuracy)}
    for name, key in (
        ("accuracy", "reward/accuracy"),
        ("tokens", "completion/length_mean"),
        ("steps", "process/steps"),
        ("own reward", "reward/process"),
    ):
        if key in rows[0] and (ending := [row[key] for row in rows[-END:] if key in row]):
            found |= {f"{name} first": rows[0][key], f"{name} last": fmean(ending)}
    found |= {"lost from step": rows[last + 1]["step"]} if last + 1 < len(rows) else {}
    written = [row for row in whole_lines(run_dir / "samples.jsonl") if row["step"] > rows[-1]["step"] - END]
    if written:
        found["all steps right last"] = fmean(
            row["completion"] == right_solution(chain_of(row["question"])) for row in written
        )
    return found | ({"alarm at step": alarms[0]} if alarms else {})


def of_scorer(run_dir: Path) -> Numbers:
    """F1, and step accuracy on the exactly labelled held-out solutions."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return {name: summary[f"{key}_after"] for name, key in (("F1", "f1"), ("step accuracy", "accuracy"))}


def of_trees(rows: list[Row], tokenizer: PromptTokenizer) -> Numbers:
    """Of searches by values: how well a right step is told from a wrong one.

    Returns:
        "AUC of steps": the probability that a right step is worth more than a wrong one; "right sibling above wrong":
        the same of steps that stand behind the same right prefix; "pairs": how many of those there are.
    """
    pairs: list[float] = []
    scores: list[float] = []
    truths: list[bool] = []
    for row in rows:
        chain = chain_of(row["question"])
        for group in _siblings(row, chain, tokenizer):
            scores += [score for score, _, _ in group]
            truths += [is_right for _, is_right, _ in group]
            behind = [(score, is_right) for score, is_right, is_open in group if is_open]
            right = [score for score, is_right in behind if is_right]
            wrong = [score for score, is_right in behind if not is_right]
            pairs += [1.0 if a > b else 0.5 if a == b else 0.0 for a in right for b in wrong]
    area = area_under_curve(np.array(scores), np.array(truths, bool))
    found = {"AUC of steps": area} if area is not None else {}
    return found | ({"right sibling above wrong": fmean(pairs), "pairs": len(pairs)} if pairs else {})


def _siblings(row: Row, chain: Chain, tokenizer: PromptTokenizer) -> Iterator[list[tuple[float, bool, bool]]]:
    """(score, is right, whether all before it is right) of the steps behind each step, without whole completions."""
    texts: dict[int, list[str]] = {0: []}
    groups: dict[int, list[tuple[float, bool, bool]]] = {}
    for node in row["nodes"]:  # a parent stands before its children
        before = texts[node["parent"]]
        steps = tokenizer.decode_batch(node["tokens"], skip_special_tokens=True)
        texts[node["node"]] = [*before, *steps]
        if not node["finish"] and len(steps) == 1:
            truth = step_truth(chain, texts[node["node"]])
            is_open = all(truth[:-1])
            groups.setdefault(node["parent"], []).append((node["scores"][-1], truth[-1] > 0, is_open))
    yield from groups.values()


def process_right(rows: list[Row], tokenizer: PromptTokenizer) -> float:
    """Share of different whole completions of which every step is right, not the answer alone."""
    found = []
    for row in rows:
        chain = chain_of(row["question"])
        for node in row["nodes"]:
            steps = tokenizer.decode_batch(node["tokens"], skip_special_tokens=True)
            found.append(len(steps) == LENGTH + 1 and all(step_truth(chain, steps)))
    return fmean(found)
