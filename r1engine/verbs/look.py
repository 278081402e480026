"""`r1engine data`: a data file as the run will see it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table

from r1engine.config import RlConfig
from r1engine.data.prompts import PromptTable
from r1engine.rewards import Record
from r1engine.rewards.from_config import make_scorer
from r1engine.stages.inputs import MOST_REFERENCES, format_of, shown_by, write_questions


def look(cfg: RlConfig, path: Path, rows: int, console: Console) -> None:
    """Print the first prompts as the model is shown them, and what the questions are: tokens, rewards, repeats,
    references that no rule can use.

    Raises:
        ValueError: a row is not what the run needs; file and line are named.
    """
    form = format_of(cfg)
    shown = shown_by(form)
    with TemporaryDirectory(prefix="r1engine-") as folder, make_scorer(cfg.rewards) as scorer:
        write_questions(cfg, path, Path(folder), form, shown)
        table = PromptTable(Path(folder), shown)
        for index in range(min(rows, len(table))):
            _print_prompt(table, index, console)
        distinct = table.distinct(MOST_REFERENCES)
        unusable = scorer.unusable_references([Record(question, "", id=question.place) for question in distinct])
        console.print(_summary(table, len(distinct), len(unusable), cfg))
        for note in table.notes:
            console.print(note, markup=False, highlight=False)
        for record, problem in unusable[:10]:
            line = f"{record.id}: {record.question.answer!r:.60} {problem}"
            console.print(line, markup=False, highlight=False)


def _print_prompt(table: PromptTable, index: int, console: Console) -> None:
    prompt = table[index]
    question = prompt.question
    console.rule(f"{question.place}, {len(prompt.tokens)} tokens", align="left")
    console.print(prompt.text, markup=False, highlight=False)
    reference = question.answer if question.answer else "none"
    console.print(f"reward {question.reward}, reference {reference:.200}", style="dim", markup=False, highlight=False)


def _summary(table: PromptTable, distinct: int, unusable: int, cfg: RlConfig) -> Table:
    lengths = table.lengths()
    quantiles = [int(value) for value in np.quantile(lengths, (0.5, 0.95))]
    found = Table(title=str(table.path))
    found.add_column("what")
    found.add_column("found", justify="right")
    whole = distinct < MOST_REFERENCES
    for name, value in (
        ("questions", f"{len(table):,}"),
        ("distinct ones", f"{distinct:,}" if whole else f"at least {distinct:,}"),
        ("rewards", ", ".join(sorted(table.rewards))),
        ("tokens of a prompt, mean", f"{lengths.mean():.0f}"),
        ("median", f"{quantiles[0]:,}"),
        ("95 % have at most", f"{quantiles[1]:,}"),
        ("longest", f"{int(lengths.max()):,} of {cfg.data.max_prompt_tokens:,}"),
        ("references that no rule can use", f"{unusable:,} of {distinct:,} ({unusable / distinct:.1%})"),
    ):
        found.add_row(name, value)
    return found
