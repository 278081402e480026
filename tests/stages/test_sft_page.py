"""Two pages name a test for each fault that they say is not here; every one of them exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import rows_of, section

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("name", "least"), [("sft.md", 25), ("reward-models.md", 12)])
def test_every_test_that_the_page_names_is_there(name, least):
    text = section((ROOT / "docs" / name).read_text(), "What goes wrong elsewhere")
    files = dict(re.findall(r"`(tests/[\w/]+\.py)` \((\w)\)", text))
    tests = {
        letter: re.findall(r"^def test_(\w+)", (ROOT / file).read_text(), re.MULTILINE)
        for file, letter in files.items()
    }
    rows = rows_of(text)[1:]
    assert len(rows) > least
    for fault, _, cell in rows:
        named, letter = 0, ""
        for part in re.finditer(r"\b(\w) `|`([\w.]+)`", re.sub(r"(\b\w) `", r"\1 ` `", cell)):
            letter = part[1] or letter
            if part[2]:
                named += 1
                start, is_cut = part[2].removesuffix("..."), part[2].endswith("...")
                found = [name for name in tests[letter] if name == start or (is_cut and name.startswith(start))]
                assert found, f"{fault}: {letter} {part[2]}"
        assert named, fault
