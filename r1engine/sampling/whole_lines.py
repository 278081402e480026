"""Files of a JSON value a line, which a kill may cut short."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def lines_of(rows: Iterable[dict[str, Any]]) -> str:
    """The text of such a file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The values of the lines that have their end; none if the file is not there.

    Only a line feed ends a line: texts may hold other ends of lines, such as U+2028, as they are.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
