"""Pages as tests read them: of Markdown a section and the cells of tables, of HTML what is packed in it."""

from __future__ import annotations

import json
import re
from typing import Any

from r1engine.observe.packed import unpacked


def section(page: str, title: str) -> str:
    """What stands between a heading of the second level and the next one."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows_of(text: str) -> list[list[str]]:
    """The cells of each line of the tables, those of the heading first. A | without blanks beside it parts no cells."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.strip("|-: ")]
    return [[cell.strip() for cell in re.split(r"(?<=\s)\|(?=\s)", line.strip("|"))] for line in lines]


def embedded(text: str, name: str) -> Any:
    """The JSON that a page holds in its script element of this id."""
    return json.loads(unpacked(re.search(rf'<script type="text/plain" id="{name}">(.*?)</script>', text, re.DOTALL)[1]))
