"""The files of an evaluation: lines that are whole, cut or broken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from r1engine.config import ConfigError
from r1engine.evaluation import store
from r1engine.evaluation.lines import GradeLine, SampleLine
from r1engine.evaluation.store import Store, read_lines

LINE = SampleLine("q\u00e9\u2028\ud800", 0, 'a "text"\r\n{"x": [1,\n2]}\u2029', 3, "stop", 2, 5, 0.5)
LINES = [replace(LINE, s=number) for number in range(60)]


@pytest.fixture(params=[2**24, 100], ids=["one block", "a line a block"])
def path(request, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK_BYTES", request.param)
    file = Store(tmp_path).reply_file("mine", 0)
    for line in LINES:
        file.append(line)
    file.close()
    return tmp_path / "samples" / "mine.0.jsonl"


def test_lines_come_back_as_they_were_and_a_last_one_without_its_end_is_none(path):
    assert list(read_lines(path, SampleLine)) == LINES
    path.write_bytes(path.read_bytes()[:-1])
    assert list(read_lines(path, SampleLine)) == LINES[:-1]
    path.write_bytes(b'{"q": "cut')
    assert list(read_lines(path, SampleLine)) == []


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"1", "must be a mapping"),
        (b'{"q": "x"}', "missing 7 required"),
        (b'{"q": "x"},{"q": "y"}', "Extra data"),
    ],
)
def test_a_broken_line_is_named(path, broken, why):
    lines = path.read_bytes().splitlines()
    lines[40] = broken
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ConfigError, match=rf"mine\.0\.jsonl:41: found no SampleLine: .*{why}"):
        list(read_lines(path, SampleLine))
    with pytest.raises(ConfigError, match=r"mine\.0\.jsonl:1: found no GradeLine: "):
        list(read_lines(path, GradeLine))
