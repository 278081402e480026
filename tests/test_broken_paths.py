"""What stands where another thing is wanted (a file for a folder, half a file, nobody's home) is told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1engine.cli import app

GOOD_ROW = '{"step": 1, "loss": 1.0}\n'
RECORD = {"reward": "math", "completion": "1", "answer": "1"}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with broken things."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "good.yaml").write_text("model: {path: m}\ndata: {train: t.jsonl}\n")
    (tmp_path / "cut.yaml").write_text("model: {path: [")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "records.jsonl").write_text(json.dumps(RECORD) + "\n")
    for name, file, content in [
        ("empty_run", "metrics.jsonl", b""),
        ("cut_run", "metrics.jsonl", b"{bad\n"),
        ("bytes_run", "metrics.jsonl", b"\xff\n"),
        ("cut_summary", "summary.json", b'{"a"'),
        ("list_summary", "summary.json", b"[1]"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(GOOD_ROW)
        (tmp_path / name / file).write_bytes(content)
    (tmp_path / "no_page" / "report.html").mkdir(parents=True)
    (tmp_path / "no_page" / "metrics.jsonl").write_text(GOOD_ROW)
    return tmp_path


LONG = "a" * 300


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("config cut.yaml", "cut.yaml:1: not valid YAML: "),
        ("config bytes.yaml", "bytes.yaml: cannot be read as UTF-8 text: "),
        ("config a_folder", "a_folder: found a folder, required a YAML config file"),
        ("config a_file/x.yaml", "a_file/x.yaml: cannot be read as UTF-8 text: "),
        (f"config {LONG}", f"{LONG}: cannot be read as UTF-8 text: "),
        (
            "config good.yaml run_dir=~nosuchuser/x",
            "override 'run_dir=~nosuchuser/x': run_dir: found ~nosuchuser/x, but",
        ),
        (
            "config good.yaml model.path=~nosuchuser",
            "override 'model.path=~nosuchuser': model.path: found ~nosuchuser, ",
        ),
        ('config good.yaml data.train="a\\0.jsonl"', "data.train: found 'a\\x00.jsonl', required a path without NUL"),
        ("pipeline a_folder", "a_folder: found a folder, required a YAML config file"),
        ("plan a_folder --gpus 1", "a_folder: found a folder, required a YAML config file"),
        ("report a_file", "report: found no metrics.jsonl in a_file"),
        ("report empty_run", "report: empty_run/metrics.jsonl has no row"),
        ("report cut_run", "report: line 1 of cut_run/metrics.jsonl is not JSON: "),
        ("report bytes_run", "report: line 1 of bytes_run/metrics.jsonl is not JSON: "),
        ("report cut_summary", "report: cut_summary/summary.json is not JSON: "),
        ("report list_summary", "report: list_summary/summary.json holds [1], required an object"),
        ("report no_page", "no_page/report.html: Is a directory"),
        ("reward a_folder --out o.jsonl", "a_folder: found no such file, required a .jsonl file of completions"),
        ("reward records.jsonl --out a_folder", "a_folder: found a folder, required the name of a file to write"),
        ("reward records.jsonl --out a_file/o.jsonl", "a_file: File exists"),
        ("convert a_folder t", "a_folder/config.json: no such file; required is a Hugging Face model folder"),
        ("convert a_file t", "a_file/config.json: no such file; required is a Hugging Face model folder"),
        ("convert a_folder a_file", "convert: a_file holds no folder, but a file; required is"),
    ],
)
def test_a_path_that_cannot_be_used_is_named_in_one_line(here, command, message):
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
