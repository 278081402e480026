"""The table of rules is all that the rest knows of a reward: a row more is a reward more."""

from __future__ import annotations

import importlib
import json

import pytest
from reward_records import record
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.data.questions import read_questions
from r1engine.rewards import Scorer, ScorerSettings, rules
from r1engine.rewards.rule import Task
from r1engine.rewards.rules import RULES, rule_of
from r1engine.rewards.sandbox.inside.plain import encode

# A reward as a newcomer writes it: short answers are graded at once, the others by a worker.
TOY = """
from r1engine.rewards.rule import Grade, Rule, Task


def grade(answer, record, settings):
    if len(answer) < 3:
        return Grade("wrong", "too short")
    return Task(compute, (answer, record.question.answer))


def compute(answer, reference):
    if reference == "none":
        return "undecided", "nothing to compare with"
    is_same = sorted(answer) == sorted(reference)
    return ("right", "an anagram", {"anagram": 1.0}) if is_same else ("wrong", "other letters", {"anagram": 0.25})


def reference_problem(question):
    return "is too short" if len(question.answer) < 3 else ""


ANAGRAM = Rule("anagram", grade, component="anagram", needs="answer", reference_problem=reference_problem)
"""


@pytest.fixture
def with_toy(tmp_path, monkeypatch):
    """The table with one row more, from a file of its own."""
    (tmp_path / "anagram_rule.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(rules, "RULES", (*RULES, importlib.import_module("anagram_rule").ANAGRAM))


def test_a_rule_is_its_file_and_a_row(with_toy, tmp_path):
    lines = [
        {"question": "Mix listen.", "reward": "anagram", "answer": reference, "completion": f"\\boxed{{{answer}}}"}
        for answer, reference in [("silent", "listen"), ("silence", "listen"), ("si", "listen"), ("silent", "none")]
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [question.reward for question in read_questions(source)] == ["anagram"] * 4
    done = CliRunner().invoke(app, ["reward", str(source), "--out", str(out), "workers=1", "deadline_seconds=60"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["verdict"], row["score"], row["reason"].partition(";")[0]) for row in rows] == [
        ("right", 1.0, "an anagram"),
        ("wrong", 0.25, "other letters"),
        ("wrong", 0.0, "too short"),
        ("undecided", None, "nothing to compare with"),
    ]
    assert rows[0]["components"] == {"format": 0.0, "anagram": 1.0} and rows[3]["components"] == {"format": 0.0}
    source.write_text(json.dumps({"question": "Mix.", "reward": "anagram"}))
    with pytest.raises(ValueError, match="found no `answer`, required by reward 'anagram'"):
        read_questions(source)


def test_a_row_tells_which_references_are_unusable(with_toy):
    records = [record("anagram", "", "ab"), record("anagram", "", "abc")]
    with Scorer(ScorerSettings(workers=1)) as scorer:
        assert scorer.unusable_references(records) == [(records[0], "is too short")]


def test_names_are_those_of_the_documentation_and_no_two_are_the_same():
    names = ["math", "choice", "exact", "format", "language", "code", "gym", "judge", "preference", "functions"]
    assert [rule.name for rule in RULES] == names
    assert all(rule_of(name, "here").name == name for name in names)


def test_without_ratings_preference_is_the_format():
    with Scorer(ScorerSettings(workers=1)) as scorer:
        (score,) = scorer.score([record("preference", "<think>a</think><answer>b</answer>")], are_rated=False)
    assert (score.verdict, score.reason, score.components) == ("right", "well-formed", {"format": 1.0})


def test_a_task_of_a_function_that_no_worker_finds_is_refused():
    def inside() -> None: ...

    with pytest.raises(ValueError, match=r"found .*inside, required a function at the top of a module"):
        Task(inside, ())


def test_a_missed_deadline_costs_its_own_component_only():
    # Text alone settles the answer; loading the identifier of languages takes longer than this.
    settings = ScorerSettings(workers=1, deadline_seconds=1e-9, with_language=True)
    with Scorer(settings) as scorer:
        (score,) = scorer.score([record("math", "<think>We add.</think><answer>5</answer>", "5", language="en")])
    assert (score.verdict, score.components) == ("right", {"format": 1.0, "accuracy": 1.0})


def test_gym_record_goes_to_the_workers_that_run_code():
    # This task is compared as text, so that the package is not needed.
    tests = {"task": "spiral_matrix", "entry": encode({"answer": "1 2", "metadata": {}})}
    with Scorer(ScorerSettings(workers=1)) as scorer:
        scores = scorer.score([record("gym", f"<answer>{text}</answer>", tests=tests) for text in ("1 2", "2 1")])
        assert scorer._pool._thread is None and scorer._code_pool._thread is not None
    assert [score.verdict for score in scores] == ["right", "wrong"]
