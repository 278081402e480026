"""The page of search tells on how many of its runs each gate holds, as the gates themselves find from its table."""

from pathlib import Path

from pages import rows_of

from r1engine.sampling.chain_gates import MEASURES, gates

PAGE = Path(__file__).resolve().parents[2] / "docs" / "search.md"


def table(first: str) -> list[list[str]]:
    """The rows of the table whose heading starts with this cell, the heading first."""
    rows = rows_of(PAGE.read_text())
    start = next(index for index, row in enumerate(rows) if row[0] == first)
    width = len(rows[start])
    end = next((index for index, row in enumerate(rows[start:], start) if len(row) != width), len(rows))
    return rows[start:end]


def test_the_page_counts_the_gates_that_hold():
    head, *rows = table("measure")
    assert [row[0] for row in rows] == list(MEASURES)
    runs = [{row[0]: float(row[at]) for row in rows if row[at] != "-"} for at in range(1, len(head))]
    held = [gates(run) for run in runs]
    counts = [[gate, f"{sum(run[gate] for run in held)} of {len(held)}"] for gate in held[0]]
    assert table("gate")[1:] == counts
