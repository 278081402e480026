"""docs/evaluation-cases.md: every report is there once, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pages import rows_of, section

TESTS = Path(__file__).resolve().parents[1]
TEXT = (TESTS.parent / "docs" / "evaluation-cases.md").read_text()


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table."""
    return rows_of(section(TEXT, title))[1:]


def functions_of(path: Path) -> set[str]:
    """The test functions of a file."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_reported_fault_has_its_row():
    assert [cells[0] for cells in rows("Reports")] == [str(number) for number in range(1, 56)]


def test_every_row_names_tests_that_exist():
    named = 0
    for title in ("Reports", "By hand", "Refused, told, survived"):
        for cells in rows(title):
            tests = re.findall(r"`([\w/]+\.py)::(test_\w+)`", cells[-1])
            assert tests and cells[-1].count("`") == 2 * len(tests), cells
            for file, name in tests:
                path = next(path for path in (TESTS / "evaluation" / file, TESTS / file) if path.is_file())
                assert name in functions_of(path), f"{file} has no {name}"
            named += len(tests)
    assert named > 80
