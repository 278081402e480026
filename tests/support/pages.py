"""Pages in Markdown, as tests read them: a section, and the cells of tables."""

from __future__ import annotations

import re


def section(page: str, title: str) -> str:
    """What stands between a heading of the second level and the next one."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows_of(text: str) -> list[list[str]]:
    """The cells of each line of the tables, those of the heading first. A | without blanks beside it parts no cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.strip("|-: ")]
    return [[cell.strip() for cell in re.split(r"(?<=\s)\|(?=\s)", line.strip("|"))] for line in lines]
