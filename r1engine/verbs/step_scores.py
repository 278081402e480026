"""`r1engine evaluate steps`: how well a process reward model finds the first wrong step of solutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch

from r1engine.batch import Prompt
from r1engine.config import StepData, StepScorerSection
from r1engine.config.stage import Template
from r1engine.data.chat import make_format
from r1engine.data.question import Question
from r1engine.data.step_table import marked
from r1engine.data.steps import StepRow, read_steps
from r1engine.evaluation.steps import step_measures
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.search.scored_folder import read_scored_folder
from r1engine.search.scorer import open_scorer
from r1engine.search.tree import StepPath

AT_ONCE = 64  # solutions
SHOWN = ("f1", "error_accuracy", "correct_accuracy", "accuracy", "auc", "calibration_error")


def measure_files(files: Sequence[Path], cfg: StepScorerSection, template: Template) -> dict[str, dict[str, float]]:
    """File -> ProcessBench's F1 and the other measures of `step_measures`; of several "mean", too.

    Args:
        files:    labelled solutions in any form that `read_steps` takes; ProcessBench has one a source.
        cfg:      the model.
        template: how a model of `stage: process_reward` is asked; released ones have their own form.

    Raises:
        ValueError: a file is none, or the model cannot be run or does not say how it is asked.
        RuntimeError: a server does not answer.
    """
    tokenizer = load_tokenizer(cfg.path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer, writer = open_scorer(cfg, device, tokenizer), _Paths(cfg.path, template)
    found: dict[str, dict[str, float]] = {}
    for file in files:
        scores, labels = [], []
        rows = enumerate(read_steps(file))
        while some := list(islice(rows, AT_ONCE)):
            scores += scorer.score(list(writer.paths(some)))
            labels += [row.labels for _, row in some]
            scorer.clear()
        found[str(file)] = step_measures(scores, labels) | {"solutions": len(labels)}
    if len(found) > 1:
        names = [name for name in SHOWN if all(name in one for one in found.values())]
        found["mean"] = {name: fmean(one[name] for one in found.values()) for name in names}
    return found


class _Paths:
    """Labelled solutions as a scorer reads them. A step is tokenized by itself."""

    def __init__(self, folder: Path, template: Template) -> None:
        about = read_scored_folder(folder)
        self._tokenizer, self._marks = load_tokenizer(folder), list(about.marks) if about is not None else []
        data = StepData(template=template)
        try:
            self._form = make_format(folder, self._tokenizer, data) if about is not None else None
        except ValueError as error:
            raise ValueError(
                f"--template: found {template}, required that of the model's training ({error})"
            ) from error

    def paths(self, rows: list[tuple[int, StepRow]]) -> Iterator[StepPath]:
        for number, row in rows:
            texts = marked(row.steps, self._marks) if self._marks else list(row.steps)
            steps = tuple(tuple(one.ids) for one in self._tokenizer.encode_continuations(texts))
            tokens: list[int] = []
            if self._form is not None:
                tokens = self._form.encode_prompts([self._form.prompt(row.question, row.place)])[0]
            yield StepPath(Prompt(number, tokens, row.question, Question(row.question, place=row.place)), steps)


def as_table(found: dict[str, dict[str, float]]) -> str:
    """The measures as Markdown, in per cent."""
    lines = [f"| file | solutions | {' | '.join(SHOWN)} |", "|" + " --- |" * (2 + len(SHOWN))]
    for name, one in found.items():
        cells = [f"{100 * one[key]:.1f}" if key in one else "-" for key in SHOWN]
        lines.append(f"| {Path(name).name} | {one.get('solutions', '-')} | {' | '.join(cells)} |")
    return "\n".join(lines)
