"""The end of a run on one screen: held-out numbers before and after, and two completions to read."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

# key of an evaluation -> (name, format, does more mean better; None: neither)
_ROWS = {
    "loss": ("loss (nats a token)", "{:.4f}", False),
    "pass_at_1": ("pass@1", "{:.1%}", True),
    "cons_at_k": ("cons@k", "{:.1%}", True),
    "format": ("format followed", "{:.1%}", True),
    "length_mean": ("mean length (tokens)", "{:.1f}", None),
    "truncated": ("truncated", "{:.1%}", False),
}


def summary_table(before: dict[str, float], after: dict[str, float]) -> Table:
    """Held-out evaluation before and after training, side by side.

    Args:
        before: "loss", "pass_at_1", "format", "length_mean", "truncated", with or without the prefix "eval/".
        after:  the same.

    Returns:
        A rich table of the numbers that there are; one that is missing on one side is shown as "-".
    """
    before, after = _plain(before), _plain(after)
    table = Table(title="Held out", title_justify="left")
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for key, (name, form, more_is_better) in _ROWS.items():
        old, new = before.get(key), after.get(key)
        if old is None and new is None:
            continue
        texts = ["-" if value is None else form.format(value) for value in (old, new)]
        table.add_row(name, *texts, _change(old, new, form, more_is_better))
    return table


def print_summary(
    before: dict[str, float], after: dict[str, float], samples: list[dict], *, console: Console | None = None
) -> None:
    """Prints the table, then up to two of the sampled completions in full.

    Args:
        before:  see `summary_table`.
        after:   see `summary_table`.
        samples: rows as in samples.jsonl.
        console: where to print; None: stdout.
    """
    console = console or Console()
    console.print(summary_table(before, after))
    for row in samples[:2]:
        rewards = "  ".join(f"{key} {value}" for key, value in row.items() if key.startswith("reward/"))
        facts = f"step {row.get('step', '-')}  {rewards}  length {row.get('length', '-')}"
        question, completion = str(row.get("question", "")), str(row.get("completion", ""))
        if console.is_terminal:
            body = Text.assemble((question + "\n\n", "bold"), completion)
            console.print(Panel(body, title=Text(facts), title_align="left"))
        else:
            answer = row.get("answer", "-")
            text = f"\n[{facts}]\nquestion: {question}\nreference: {answer}\n{completion}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _plain(numbers: dict[str, float]) -> dict[str, float]:
    return {key.removeprefix("eval/"): value for key, value in numbers.items()}


def _change(old: float | None, new: float | None, form: str, more_is_better: bool | None) -> Text:
    if old is None or new is None:
        return Text("-")
    delta = new - old
    text = ("+" if delta >= 0 else "-") + form.format(abs(delta))
    if more_is_better is None or delta == 0:
        return Text(text)
    return Text(text, style="green" if (delta > 0) == more_is_better else "red")
