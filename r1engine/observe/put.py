"""Files that are whole or not there; who looks at one meanwhile has the old one. Of processes that write one at the
same time the last one's stays."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any


def put_text(path: Path, text: str, *, is_lasting: bool = True) -> None:
    """Write a text in the place of what is there.

    Args:
        path:       of the file.
        text:       all of it.
        is_lasting: wait for the disk, so that a power failure leaves the old file or this one; else only a kill does.
    """
    # Hidden: where a kill has left one, the digest of the folder is as it was.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if is_lasting:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # no space: half a file is of no use
        temporary.unlink(missing_ok=True)
        raise


def put_json(path: Path, value: Any) -> None:
    """The same of a JSON value, in lines."""
    put_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
