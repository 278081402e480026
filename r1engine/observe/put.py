"""Files that are whole or not there, also after a power failure; who looks at one meanwhile has the old one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def put_text(path: Path, text: str) -> None:
    """Write a text in the place of what is there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # no space: half a file is of no use
        temporary.unlink(missing_ok=True)
        raise


def put_json(path: Path, value: Any) -> None:
    """The same of a JSON value, in lines."""
    put_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
