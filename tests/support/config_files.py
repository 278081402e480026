"""A configuration that names its model and data, and what is said of one that is refused."""

from pathlib import Path

import pytest

from r1engine.config import ConfigError, load

SOURCES = "model: {path: /m}\ndata: {train: /a.jsonl}\n"


def problems(path: Path, *overrides: str) -> list[str]:
    """Every problem, with the path of the file as run.yaml."""
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return [line.replace(f"{path}", "run.yaml") for line in caught.value.problems]
