"""Solutions cut into steps, with a label of each: own files, PRM800K, Math-Shepherd, ProcessBench, and TRL's rows.

A label is in [0, 1]: 1 right, 0 wrong, between them a share of right rollouts; None: not known. Unknown is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1engine.data.rows import Row, missing, read_rows

HEADER = "steps_file"  # field of the first line of an own file, which is no solution
OWN = ("question", "steps", "labels", "tokens", "verdict", "source", "id")
FIELDS = (*OWN, "problem", "label", "input", "prompt", "completions")
SHEPHERD_MARK = " \u043a\u0438"  # " ki" in Cyrillic letters
NO_SOLUTION = ("bad_problem", "give_up")  # finish_reason of PRM800K


@dataclass(frozen=True)
class StepRow:
    """A solution: its steps, and what is known of each."""

    question: str
    steps: tuple[str, ...]  # texts
    labels: tuple[float | None, ...]  # one a step
    place: str  # "steps.jsonl:7", for error messages
    tokens: tuple[tuple[int, ...], ...] | None = None  # of each step, as they were drawn
    source: str = ""  # who labelled: "rollouts/each", "prm800k", ...

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.labels):
            found = f"{len(self.steps)} steps and {len(self.labels)} labels"
            raise ValueError(f"{self.place}: found {found}, required equally many, at least one")
        if self.tokens is not None and len(self.tokens) != len(self.steps):
            found = f"{len(self.steps)} steps and the tokens of {len(self.tokens)}"
            raise ValueError(f"{self.place}: found {found}, required those of each step")

    @property
    def is_of_rollouts(self) -> bool:
        """Whether the labels say how often one gets to the answer from there, not whether the step is right."""
        return self.source.startswith(("rollouts", "values"))


def read_steps(path: Path) -> Iterator[StepRow]:
    """The solutions of a .jsonl or .parquet file, in file order; one of PRM800K may give none or several.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a row is none of the known forms; it is named.
    """
    found = False
    for row in read_rows(path, FIELDS, one_of=("question", "label", "prompt", "input")):
        if HEADER in row.fields:
            continue
        for solution in _solutions(row):
            found = True
            yield solution
    if not found:
        raise ValueError(f"{path}: found no solution with labelled steps, required at least one")


def _solutions(row: Row) -> list[StepRow]:
    has = row.fields.keys()
    if {"question", "steps", "labels"} <= has:
        return [_own(row)]
    if {"question", "label"} <= has and isinstance(row.fields["label"], dict):
        return _prm800k(row)
    if {"input", "label"} <= has:
        return [_math_shepherd(row)]
    if {"problem", "steps", "label"} <= has:
        return [_process_bench(row)]
    if {"prompt", "completions", "labels"} <= has:
        steps = _texts(row, "completions")
        return [StepRow(_text(row, "prompt"), steps, _labels(row, row.fields["labels"]), row.place, source="trl")]
    raise ValueError(
        f"{row.place}: {missing('question', row.columns)}; required `question`, `steps` and `labels`, or a row of "
        "PRM800K (question, label), Math-Shepherd (input, label), ProcessBench (problem, steps, label) or TRL "
        "(prompt, completions, labels)"
    )


def _own(row: Row) -> StepRow:
    tokens = row.fields.get("tokens")
    if tokens is not None:
        is_tokens = isinstance(tokens, list) and all(isinstance(step, list) for step in tokens)
        if not is_tokens or not all(type(token) is int and token >= 0 for step in tokens for token in step):
            raise ValueError(f"{row.place}: tokens is {tokens!r:.60}, required a list of token ids of each step")
        tokens = tuple(tuple(step) for step in tokens)
    steps, labels = _texts(row, "steps"), _labels(row, row.fields["labels"])
    source = str(row.fields.get("source", ""))
    return StepRow(_text(row, "question"), steps, labels, row.place, tokens, source)


def _prm800k(row: Row) -> list[StepRow]:
    """The path that was chosen, and each alternative to one of its steps as a path of which that step is labelled.

    A step that the labelers wrote themselves has no rating, and stays in the paths behind it without a label.
    """
    where, label = row.place, row.fields["label"]
    try:
        question = row.fields["question"]["problem"]
        if label["finish_reason"] in NO_SOLUTION:
            return []
        chosen: list[tuple[str, float | None]] = []
        alternatives = []
        for step in label["steps"]:
            rated = [(one["text"], _rating(one, where)) for one in step["completions"] or ()]
            number = step["chosen_completion"]
            others = [one for index, one in enumerate(rated) if index != number and one[1] is not None]
            texts = tuple(text for text, _ in chosen)
            unknown = (None,) * len(texts)
            alternatives += [((*texts, text), (*unknown, value)) for text, value in others]
            if number is None and step.get("human_completion") is None:
                break
            chosen.append(rated[number] if number is not None else (_human(step["human_completion"]), None))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: found {type(error).__name__} {error}, required a row of PRM800K") from error
    paths = [(tuple(text for text, _ in chosen), tuple(value for _, value in chosen))] if chosen else []
    return [StepRow(question, steps, labels, where, source="prm800k") for steps, labels in [*paths, *alternatives]]


def _rating(completion: dict[str, Any], where: str) -> float | None:
    """1 and 0 ("does not make any progress", but is not wrong) are right."""
    rating = completion["rating"]
    if rating is None or completion.get("flagged"):
        return None
    if rating not in (-1, 0, 1):
        raise ValueError(f"{where}: rating is {rating!r:.40}, required -1, 0 or 1")
    return float(rating >= 0)


def _human(written: Any) -> str:
    return str(written["text"] if isinstance(written, dict) else written)


def _math_shepherd(row: Row) -> StepRow:
    """Question and steps in one text: a mark behind each step, and in `label` + or - in its place."""
    text, labelled = _text(row, "input"), _text(row, "label")
    *parts, rest = text.split(SHEPHERD_MARK)
    at, signs = 0, list[str]()
    for part in parts:
        if labelled[at : at + len(part)] != part or labelled[at + len(part) : at + len(part) + 2] not in (" +", " -"):
            raise ValueError(
                f"{row.place}: label differs from input before mark {len(signs) + 1}, required ' +' or ' -'"
            )
        signs.append(labelled[at + len(part) + 1])
        at += len(part) + 2
    if not parts or rest.strip() or labelled[at:].strip():
        raise ValueError(f"{row.place}: found {len(parts)} marks{SHEPHERD_MARK!a}, required one behind each step")
    question, begins, first = parts[0].partition("Step 1:")
    if not begins:
        raise ValueError(f"{row.place}: found no 'Step 1:' in input, required it behind the question")
    steps = (begins + first, *(part.lstrip("\n") for part in parts[1:]))
    labels = tuple(float(sign == "+") for sign in signs)
    return StepRow(question.strip(), steps, labels, row.place, source="rollouts/math-shepherd")


def _process_bench(row: Row) -> StepRow:
    """`label` is the index of the first wrong step, or -1; what follows it is unknown."""
    steps, first = _texts(row, "steps"), row.fields["label"]
    if type(first) is not int or not -1 <= first < len(steps):
        raise ValueError(f"{row.place}: label is {first!r:.40}, required -1 or the index of one of {len(steps)} steps")
    right = len(steps) if first == -1 else first
    labels = [1.0 if index < right else 0.0 if index == right else None for index in range(len(steps))]
    return StepRow(_text(row, "problem"), steps, tuple(labels), row.place, source="processbench")


def _labels(row: Row, found: Any) -> tuple[float | None, ...]:
    """Numbers in [0, 1], true, false or null."""
    values = found if isinstance(found, list) else [found]
    for value in values:
        is_number = isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1
        if value is not None and not is_number:
            raise ValueError(
                f"{row.place}: labels holds {value!r:.40}, required numbers in [0, 1], true, false or null"
            )
    return tuple(None if value is None else float(value) for value in values)


def _texts(row: Row, field: str) -> tuple[str, ...]:
    found = row.fields[field]
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{row.place}: {field} is {found!r:.60}, required a list of texts that are not empty")
    return tuple(found)


def _text(row: Row, field: str) -> str:
    found = row.fields[field]
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{row.place}: {field} is {found!r:.60}, required a text that is not empty")
    return found
