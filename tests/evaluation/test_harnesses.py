"""Benchmarks that their own harness grades: what is written for it, and what its verdicts mean."""

from __future__ import annotations

import json

import pytest

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Reply
from r1engine.evaluation.benchmarks import benchmark_of
from r1engine.evaluation.harnesses import exported, harness_verdicts
from r1engine.evaluation.statistics import estimate

PATCH = "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n"
ROWS = {
    "alpaca_eval_2": [{"instruction": "Hi?", "dataset": "vicuna", "output": "old"}, {"instruction": "Bye?"}],
    "arena_hard": [{"uid": "u1", "prompt": "Hi?"}, {"uid": "u2", "prompt": "Bye?"}],
    "swe_bench_verified": [
        {"instance_id": "a__b-1", "text": "Repair."},
        {"instance_id": "a__b-2", "prompt": "Repair."},
    ],
}


def items_of(name: str, folder):
    path = folder / "questions.json"
    path.write_text(json.dumps(ROWS[name]))
    return benchmark_of(name, "").load(BenchmarkSettings(file=path))


@pytest.mark.parametrize("name", ROWS)
def test_a_judge_sees_the_summary_and_no_thoughts(tmp_path, name):
    items = items_of(name, tmp_path)
    reply = f"<think>secret ```diff\nno\n```</think>\nHello.\n```diff\n{PATCH}```\n"
    text = exported(name, items, {item.id: reply for item in items}, "mine")
    assert "secret" not in text and ("Hello." in text) == (name != "swe_bench_verified")
    rows = json.loads(text) if name == "alpaca_eval_2" else [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 2
    if name == "alpaca_eval_2":
        assert [(row["instruction"], row["generator"], row["dataset"]) for row in rows] == [
            ("Hi?", "mine", "vicuna"),
            ("Bye?", "mine", "alpaca_eval"),
        ]
    elif name == "arena_hard":
        assert rows[0]["uid"] == "u1" and rows[0]["model"] == "mine" and rows[0]["messages"][0]["content"] == "Hi?"
        assert rows[0]["messages"][-1]["content"]["answer"].startswith("Hello.")
    else:
        assert rows[0] == {"instance_id": "a__b-1", "model_name_or_path": "mine", "model_patch": PATCH}


def test_a_question_without_a_reply_is_named(tmp_path):
    items = items_of("alpaca_eval_2", tmp_path)
    with pytest.raises(ValueError, match=r"no reply to 1 of 2 questions of alpaca_eval_2, .* 'Bye\?'"):
        exported("alpaca_eval_2", items, {items[0].id: "Hello"}, "mine")
    with pytest.raises(ValueError, match="found benchmark mmlu, required one of alpaca_eval_2"):
        exported("mmlu", items, {}, "mine")


def test_a_reply_is_left_to_the_harness_unless_there_is_none(tmp_path):
    bench = benchmark_of("arena_hard", "")
    (item, _) = items_of("arena_hard", tmp_path)
    assert bench.grade(item, 0, Reply("Hello", "stop")).verdict == "undecided"
    assert bench.grade(item, 0, Reply("<think>never", "length")).score == 0.0
    assert exported("swe_bench_verified", [item], {"u1": "no patch"}, "m") == (
        '{"instance_id": "u1", "model_name_or_path": "m", "model_patch": ""}\n'
    )


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_arena_hard_counts_questions_and_not_games(tmp_path):
    def judged(name: str, first: str | None, second: str | None) -> dict:
        return {"uid": name, "model": "mine", "games": [{"score": first}, {"score": second}]}

    rows = [judged("a", "B>A", "A>B"), judged("b", "A>B", "B>A"), judged("c", "A>>B", "A>B"), judged("d", None, "A=B")]
    found = harness_verdicts("arena_hard", lines(tmp_path / "mine.jsonl", *rows))
    assert [tuple(one) for one in found] == [("a", 1.0), ("b", 0.0), ("c", 0.25), ("d", None)]
    both = estimate([one.right for one in found[:2]])
    assert (both.mean, both.standard_error) == (0.5, 0.5)  # four games taken for independent would give .288675
    assert estimate([1.0, 1.0, 0.0, 0.0]).standard_error == pytest.approx(0.288675, abs=1e-6)
    with pytest.raises(ValueError, match=r"mine\.jsonl:1: score is 'A>C', required one of A>B"):
        harness_verdicts("arena_hard", lines(tmp_path / "mine.jsonl", judged("a", "A>C", "A>B")))
    with pytest.raises(ValueError, match="found question a twice"):
        harness_verdicts("arena_hard", lines(tmp_path / "mine.jsonl", rows[0], rows[0]))


def test_alpaca_eval_gives_the_preference_of_each_instruction(tmp_path):
    path = tmp_path / "annotations.json"
    preferences = (1.0, 1.75, 2, None)
    path.write_text(json.dumps([{"instruction": f"{n}?", "preference": p} for n, p in enumerate(preferences)]))
    found = harness_verdicts("alpaca_eval_2", path)
    assert [one.right for one in found] == [0.0, 0.75, 1.0, None]
    (tmp_path / "questions.json").write_text(json.dumps([{"instruction": "0?"}]))
    (item,) = benchmark_of("alpaca_eval_2", "").load(BenchmarkSettings(file=tmp_path / "questions.json"))
    assert item.id == found[0].question
    path.write_text('[{"instruction": "a", "preference": 3}]')
    with pytest.raises(ValueError, match="preference is 3, required a number from 1 to 2"):
        harness_verdicts("alpaca_eval_2", path)


def test_swe_bench_and_aider_say_what_was_solved(tmp_path):
    report = {"resolved_ids": ["a"], "unresolved_ids": ["b"], "empty_patch_ids": ["c"], "error_ids": ["d"]}
    (tmp_path / "mine.run.json").write_text(json.dumps(report))
    found = harness_verdicts("swe_bench_verified", tmp_path / "mine.run.json")
    assert [tuple(one) for one in found] == [("a", 1.0), ("b", 0.0), ("c", 0.0), ("d", None)]
    for language, name, outcomes in (("go", "bob", [False, True]), ("rust", "bob", [False, False]), ("go", "cat", [])):
        folder = tmp_path / "run" / language / "exercises" / "practice" / name
        folder.mkdir(parents=True)
        (folder / ".aider.results.json").write_text(json.dumps({"testcase": name, "tests_outcomes": outcomes}))
    found = harness_verdicts("aider_polyglot", tmp_path / "run")
    assert [tuple(one) for one in found] == [("go/bob", 1.0), ("go/cat", 0.0), ("rust/bob", 0.0)]
    with pytest.raises(ValueError, match="found no verdicts"):
        harness_verdicts("aider_polyglot", tmp_path / "run" / "empty")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: found dict, required an object that is not empty"):
        harness_verdicts("swe_bench_verified", tmp_path / "other.json")


def test_own_lines_are_no_harness_file(tmp_path):
    path = lines(tmp_path / "x.jsonl", {"question": "a", "right": True})
    assert harness_verdicts("arena_hard", path) is None and harness_verdicts("mmlu", path) is None
