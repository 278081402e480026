"""What the folder of a process reward model says of its scores: which steps they are of, and what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from r1engine.config.process import ScoreMeaning, StepMarking
from r1engine.hf.files import read_json

NAME = "step_scores.json"


class ScoredFolder(NamedTuple):
    """The content of the file NAME of a folder."""

    marks: tuple[str, ...]
    max_step_tokens: int | None
    means: ScoreMeaning

    @classmethod
    def of(cls, steps: StepMarking, means: ScoreMeaning) -> ScoredFolder:
        """What is trained with these steps, on labels that mean this."""
        return cls(tuple(steps.marks), steps.max_step_tokens, means)

    def to_text(self) -> str:
        """The file."""
        return json.dumps(self._asdict(), ensure_ascii=False) + "\n"


def read_scored_folder(folder: Path) -> ScoredFolder | None:
    """What a folder says; None if it has no such file, as those of others.

    Raises:
        ValueError: the file is not as `to_text` writes it.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    found: dict[str, Any] = read_json(path)
    try:
        marks, limit, means = tuple(found["marks"]), found["max_step_tokens"], found["means"]
        if means not in ("correctness", "value"):
            raise ValueError(f"means is {means!r:.40}, required correctness or value")
        return ScoredFolder(marks, limit, means)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; required marks, max_step_tokens and means") from error
