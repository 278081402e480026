"""What is done with an evaluation afterwards: tables, pages, comparisons, grades, verdicts of others; commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chat_server import ChatServer
from pages import embedded
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.evaluation.compare import paired
from r1engine.evaluation.store import Store

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten questions n + 1."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(folder: Path, data: Path, right: set[int], *options: str) -> Path:
    """An evaluation by the command: questions in `right` are answered right."""

    def reply(number: int, body: dict) -> list:
        n = int(body["messages"][0]["content"].split()[0])
        return ["</think><script>", f"\\boxed{{{n + 1 if n in right else -1}}}"]

    suite = folder / "suite.yaml"
    folder.mkdir(exist_ok=True)
    suite.write_text(
        "rewards: {workers: 1}\nbenchmarks:\n"
        f"  sums: {{kind: questions, file: {data}, samples: 2, consensus: true}}\n"
    )
    server = ChatServer(reply)
    try:
        done = command(server.url, suite, f"out={folder / 'out'}", *options)
    finally:
        server.stop()
    assert done.exit_code == 0, done.output
    return folder / "out"


def command(*words: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)], env={"COLUMNS": "160", "TERM": "dumb"})


@pytest.fixture(scope="module")
def outs(tmp_path_factory, data) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("outs")
    return evaluated(root / "a", data, set(range(8))), evaluated(root / "b", data, {0, 1, 2})


def test_a_table_of_one(outs):
    shown = command("show", outs[0])
    assert shown.exit_code == 0
    row = next(line for line in shown.output.splitlines() if line.startswith("sums"))
    # Wilson's interval of 8 of 10: 49.0 to 94.3
    assert "10 x 2" in row and "80.0 \u00b1 22.7" in row and row.count("80.0 \u00b1") == 2


def test_no_digit_is_cut_off_on_a_narrow_terminal(outs):
    words = ["evaluate", "show", str(outs[0])]
    wide, narrow = (
        {
            word.rstrip(",")  # narrow, the numbers of a benchmark stand in a list
            for word in CliRunner().invoke(app, words, env={"COLUMNS": str(width), "TERM": "dumb"}).output.split()
        }
        for width in (200, 56)
    )
    numbers = {word for word in wide if word[0].isdigit()}
    assert len(numbers) > 4 and numbers <= narrow


def test_side_by_side_with_the_paired_difference(outs):
    (found,) = paired(*outs)
    assert (found.questions, found.difference.mean, found.p) == (10, -0.5, 0.0625)  # McNemar 5:0
    shown = command("show", *outs)
    assert shown.exit_code == 0 and "-50.0" in shown.output and "0.0625" in shown.output


def test_other_numbers_of_a_grader_are_not_compared_and_the_repair_is_named(outs, tmp_path, data):
    old = evaluated(tmp_path / "old", data, {1})
    summary = json.loads((old / "summary.json").read_text())
    summary["benchmarks"]["sums"]["grader"] = "rewards/0"
    (old / "summary.json").write_text(json.dumps(summary))
    shown = command("show", outs[0], old)
    assert shown.exit_code == 2 and f"required the same: r1engine evaluate grade {old}" in shown.output
    assert command("grade", old).exit_code == 0
    assert command("show", outs[0], old).exit_code == 0


def test_grading_again_gives_the_same_and_needs_no_model(outs):
    before = {path: path.read_bytes() for path in (outs[0] / "grades").iterdir()}
    summary = (outs[0] / "summary.json").read_text()
    assert command("grade", outs[0]).exit_code == 0
    assert {path: path.read_bytes() for path in (outs[0] / "grades").iterdir()} == before
    assert (outs[0] / "summary.json").read_text() == summary
    refused = command("grade", outs[0], "temperature=1.0")
    assert refused.exit_code == 2 and "required a key of rewards" in refused.output


def test_grading_again_refuses_another_file_of_questions(tmp_path, data):
    copy = tmp_path / "questions.jsonl"
    copy.write_bytes(data.read_bytes())
    out = evaluated(tmp_path / "x", copy, {1})
    copy.write_bytes(data.read_bytes().replace(b"3 + 1", b"3 + 2"))
    refused = command("grade", out)
    assert refused.exit_code == 2 and "has changed since replies were drawn" in refused.output


def test_the_page_is_whole_in_itself_and_holds_every_reply(outs, tmp_path):
    page = tmp_path / "page.html"
    assert command("show", *outs, "--html", page).exit_code == 0
    text = page.read_text()
    assert re.findall(r'(?:src|href)="|https?://', text.replace("http://127.0.0.1", "")) == []
    rows, charts = embedded(text, "data"), embedded(text, "charts")
    assert len(rows) == 40 and {row["o"] for row in rows} == {0, 1}
    assert any("<script>" in row["t"] for row in rows) and "boxed" not in text  # replies are packed: no HTML to read
    scores = [trace for trace in charts[0]["data"] if "error_x" in trace]
    assert [len(trace["x"]) for trace in scores] == [1, 1] and all(trace["error_x"]["array"][0] > 0 for trace in scores)
    assert scores[0]["y"] > scores[1]["y"]  # the first above the second
    labels = [chart["layout"]["xaxis"]["title"]["text"] for chart in charts[1:]]
    assert labels == ["tokens of a reply", scores[0]["name"]]
    assert sum(charts[2]["data"][1]["text"]) == 10  # each question is a dot, or in one


def test_a_private_benchmark_is_on_pages_without_text(tmp_path, data):
    out = evaluated(tmp_path / "x", data, {1}, "benchmarks.sums.private=true")
    text = (out / "report.html").read_text()
    assert "boxed" not in text and "private: this page holds no text of it" in text
    rows = embedded(text, "data")
    assert "right" in {row["v"] for row in rows}
    assert {(row["t"], row["a"], row["r"]) for row in rows} == {("", None, "")}


def test_verdicts_of_another_harness_have_an_interval(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    rows = [{"question": f"i{n}", "right": n < 5 if n else None} for n in range(11)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    done = command("import", file, out, "--benchmark", "swe_bench_verified")
    assert done.exit_code == 0 and "40.0 \u00b1" in done.output  # 4 of the 10 that are decided
    assert command("show", out).exit_code == 0
    file.write_text('{"question": "a", "right": 1}\n{"question": "a", "right": 0}\n')
    again = command("import", file, out, "--benchmark", "x")
    assert again.exit_code == 2 and "verdicts.jsonl:2: found question 'a', sample 0 again" in again.output
    file.write_text('{"question": "a", "right": "yes"}\n')
    assert "right is 'yes', required true, false" in command("import", file, out, "--benchmark", "x").output


def test_contamination_counts_and_leaves_out(tmp_path):
    long = "a train leaves the town at noon and runs for three hours"
    (tmp_path / "held.jsonl").write_text(json.dumps({"question": long, "answer": "1"}) + "\n")
    rows = [{"question": f"Once {long} more", "answer": "2"}, {"question": "what is two and two", "answer": "4"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(f"benchmarks:\n  mine: {{kind: questions, file: {tmp_path / 'held.jsonl'}}}\n")
    clean = tmp_path / "clean.jsonl"
    done = command("contamination", tmp_path / "train.jsonl", tmp_path / "suite.yaml", "--write", clean)
    assert done.exit_code == 0 and "1 rows overlap" in done.output and "train.jsonl:1 shares with mine" in done.output
    assert [json.loads(line) for line in clean.read_text().splitlines()] == rows[1:]


def test_the_list_has_every_benchmark():
    from r1engine.evaluation.benchmarks import BENCHMARKS

    shown = CliRunner().invoke(app, ["evaluate", "list"], env={"COLUMNS": "80", "TERM": "dumb"})
    words = " ".join(shown.output.split())  # nothing is cut or folded within a word in 80 columns
    assert shown.exit_code == 0
    assert all(row.name in words and row.metric in words and row.wanted in words for row in BENCHMARKS)


def test_what_is_no_evaluation_is_named(tmp_path):
    for words in (("show", tmp_path), ("grade", tmp_path), ("board", tmp_path)):
        done = command(*words)
        assert done.exit_code == 2 and str(tmp_path) in done.output.replace("\n", "")


def test_an_evaluation_that_has_not_ended_says_so(outs, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((outs[0] / "manifest.json").read_bytes())
    shown = command("show", folder)
    assert shown.exit_code == 2 and "has not come to its end" in shown.output
    assert Store(folder).manifest["benchmarks"]["sums"]["samples"] == 2
