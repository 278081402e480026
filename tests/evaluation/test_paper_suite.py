"""The paper's benchmarks through the command: one suite of invented rows in the owners' forms, on a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_server import ChatServer
from model_server import ModelServer, says
from pages import embedded
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.evaluation.choice_order import shown_order
from r1engine.evaluation.show import paper_scores, papers

GPQA = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Record ID\n"
IFEVAL = {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


def command(*words: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})


def reply(number: int, body: dict) -> list:
    """Right in GPQA whatever the order, and elsewhere."""
    asked = body["messages"][0]["content"]
    if "multiple choice" in asked:
        letter = next(line[0] for line in asked.splitlines() if line.endswith(") right"))
        return ["so, so</think>", f"Answer: {letter}"]
    if "mills?" in asked:
        return ["a, b</think>", "Answer: 12 mills"]
    return ["well, well</think>", "diff --git" if "Repair" in asked else "Two it is"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    (folder / "gpqa.csv").write_text(GPQA + "".join(f"Which {n}?,right,a,b,c,rec{n}\n" for n in range(3)))
    (folder / "ifeval.jsonl").write_text(json.dumps(IFEVAL) + "\n")
    (folder / "simple.jsonl").write_text('{"problem": "1 + 1?", "answer": "two"}\n')
    (folder / "arena.jsonl").write_text('{"uid": "u1", "prompt": "Hi?"}\n{"uid": "u2", "prompt": "Bye?"}\n')
    (folder / "drop").mkdir()
    mills = {
        "context": "In 2011 the town had 12 mills. Question: How many mills? Answer:",
        "completion": "12",
        "ref_text": "12 mills|12",
    }
    (folder / "drop" / "drop_v0_train.jsonl").write_text((json.dumps(mills) + "\n") * 3)
    (folder / "drop" / "drop_v0_dev.jsonl").write_text(json.dumps(mills) + "\n")
    judge, server = ModelServer(lambda path, body: says("A")), ChatServer(reply)
    (folder / "suite.yaml").write_text(
        f"rewards: {{workers: 1, judge: {{urls: ['{judge.url}/v1'], model: yes-man}}}}\nbenchmarks:\n"
        f"  gpqa_diamond: {{file: {folder / 'gpqa.csv'}, samples: 4, consensus: true}}\n"
        f"  ifeval: {{file: {folder / 'ifeval.jsonl'}, samples: 1}}\n"
        f"  drop: {{file: {folder / 'drop'}, samples: 1}}\n"
        f"  simpleqa: {{file: {folder / 'simple.jsonl'}, samples: 1}}\n"
        f"  arena_hard: {{file: {folder / 'arena.jsonl'}, samples: 1}}\n"
    )
    try:
        done = command(server.url, folder / "suite.yaml", f"out={folder / 'out'}")
    finally:
        server.stop()
        judge.stop()
    assert done.exit_code == 0, done.output
    return folder / "out"


def grades(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "grades" / f"{name}.jsonl").read_text().splitlines()]


def test_each_benchmark_is_asked_and_graded_in_its_own_way(out):
    found = json.loads((out / "summary.json").read_text())["benchmarks"]
    assert {name: one["score"] and one["score"]["mean"] for name, one in found.items()} == {
        "gpqa_diamond": 1.0,
        "ifeval": 1.0,
        "drop": 1.0,
        "simpleqa": None,
        "arena_hard": None,
    }
    assert found["ifeval"]["totals"] == {"prompt_loose": 1.0, "instruction_strict": 1.0, "instruction_loose": 1.0}
    gpqa = grades(out, "gpqa_diamond")
    assert {line["answer"] for line in gpqa} == {"A"} and found["gpqa_diamond"]["cons"]["mean"] == 1.0
    for number in range(3):
        letters = {"ABCD"[shown_order(f"rec{number}", 4, sample).index(0)] for sample in range(4)}
        assert letters == set("ABCD")
        assert {line["reason"][-2] for line in gpqa if line["q"] == f"rec{number}"} == letters


def test_a_judge_that_always_says_yes_decides_nothing(out):
    (line,) = grades(out, "simpleqa")
    assert (line["verdict"], line["score"]) == ("undecided", None)
    assert line["reason"] == "the judge takes an answer that cannot be right"


def test_what_a_harness_grades_goes_out_without_thoughts_and_comes_back(out, tmp_path):
    file = tmp_path / "answers.jsonl"
    done = command("export", out, file, "--benchmark", "arena_hard", "--model", "mine")
    assert done.exit_code == 0 and "2 replies" in done.output.replace("\n", "")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["uid"], row["messages"][-1]["content"]["answer"]) for row in rows] == [
        ("u1", "Two it is"),
        ("u2", "Two it is"),
    ]
    games = [{"uid": row["uid"], "games": [{"score": "B>A"}, {"score": "A=B"}]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in games))
    back = command("import", file, tmp_path / "back", "--benchmark", "arena_hard")
    assert back.exit_code == 0 and "75.0 \u00b1" in back.output
    refused = command("export", out, file, "--benchmark", "mmlu", "--model", "mine")
    assert refused.exit_code == 2 and "found no benchmark mmlu, required one of" in refused.output
    file.write_text("{}\n")
    refused = command("import", file, tmp_path / "back", "--benchmark", "arena_hard")
    assert refused.exit_code == 2 and "required uid, games" in refused.output


def test_private_texts_are_on_no_page(out):
    page = (out / "report.html").read_text()
    private = [row for row in embedded(page, "data") if not row["t"]]
    assert "Which 1?" not in page + json.dumps(embedded(page, "data")) and private


def test_the_papers_scores_and_what_contradicts_them():
    assert papers("aime_2024")["DeepSeek-R1"] == 79.8 and papers("ifeval")["DeepSeek-R1"] == 83.3
    assert papers("codeforces")["DeepSeek-R1"] in (96.3, 2029) and papers("hellaswag") == {}
    scores = paper_scores()["scores"]
    assert len(scores) == 212 and all(0 <= s["value"] <= 100 for s in scores if s["metric"] != "rating")
    notes = paper_scores()["notes"]
    assert {(n["model"], n["paper"]) for n in notes["differs_in_the_github_readme"]} >= {("QwQ-32B-Preview", 50.0)}
    assert notes["open_r1_reproduction"]["aime_2024"]["DeepSeek-R1-Distill-Llama-8B"] == 43.9
