"""Files of a JSON value a line, which a kill may cut short."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def lines_of(rows: Iterable[dict[str, Any]]) -> str:
    """The text of such a file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The values of the lines that have their end; none if the file is not there.

    Lines are of bytes: a kill may cut inside a character, and texts may hold other ends of lines, such as U+2028.
    """
    if path.is_file():
        with path.open("rb") as file:
            yield from (json.loads(line) for line in file if line.endswith(b"\n"))
