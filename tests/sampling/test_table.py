"""The table of models: means over questions, intervals, and which neighbours differ."""

from __future__ import annotations

import random

import pytest

from r1engine.config import ConfigError
from r1engine.config.pipeline import load_pipeline
from r1engine.evaluation.statistics import compare, estimate  # tests/evaluation/test_statistics.py proves them
from r1engine.sampling.table import markdown, table_of


def answers(right: dict[int, list[int]], *, domain="sums", language=1.0, tokens=10) -> list[dict]:
    """Rows of a model: question -> whether each of its answers is right; -1: undecided."""
    verdicts = {1: "right", 0: "wrong", -1: "undecided"}
    more = {"domain": domain, "format": 1.0, "language": language, "tokens": tokens, "truncated": False}
    return [{"question": q, "verdict": verdicts[v], **more} for q, values in right.items() for v in values]


def test_a_cell_is_the_mean_over_questions_of_the_mean_over_decided_answers():
    table = table_of({"a": answers({0: [1, 1, 0, 0], 1: [1, -1, -1, -1], 2: [0, 0, 0, 0], 3: [-1] * 4})})
    cell = table["models"]["a"]["all"]["pass@1"]
    assert cell["mean"] == pytest.approx((0.5 + 1.0 + 0.0) / 3) and cell["questions"] == 3
    expected = estimate([0.5, 1.0, 0.0])
    assert (cell["low"], cell["high"]) == pytest.approx((expected.low, expected.high))


def test_neighbours_are_compared_question_by_question_and_adjusted_for_their_number():
    rng = random.Random(0)
    models = {
        name: answers({q: [int(rng.random() < chance) for _ in range(4)] for q in range(40)})
        for name, chance in (("a", 0.3), ("b", 0.8), ("c", 0.8))
    }
    table = table_of(models)

    def means(name: str) -> list[float]:
        rows = models[name]
        return [sum(row["verdict"] == "right" for row in rows if row["question"] == q) / 4 for q in range(40)]

    raw = [compare(means(after), means(before)).p for before, after in (("a", "b"), ("b", "c"))]
    steps = {name: table["steps"][name]["all"]["pass@1"] for name in "bc"}
    assert steps["b"]["from"] == "a" and steps["b"]["p"] == pytest.approx(min(1.0, 2 * raw[0]))
    assert steps["c"]["p"] == pytest.approx(max(raw[1], 2 * raw[0]))
    text = markdown(table)
    assert "| pass@1 |" in text and "| **8" in text.splitlines()[2] and text.splitlines()[2].count("**") == 2


def test_a_break_begins_a_table_and_is_not_compared_across():
    models = {name: answers({q: [int(name == "b")] * 2 for q in range(5)}) for name in "abc"}
    table = table_of(models, breaks=[2])
    assert table["steps"]["c"] == {} and table["steps"]["b"]["all"]["pass@1"]["p"] == 0.0
    assert markdown(table).count("| | ") == 2


def test_domains_have_rows_and_what_is_unknown_is_empty():
    rows = answers({0: [1], 1: [0]}) + answers({2: [1], 3: [1]}, domain="words", language=None)
    text = markdown(table_of({"a": rows}))
    lines = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")
    }
    assert lines["pass@1, words"].startswith("100.0") and lines["pass@1, sums"].startswith("50.0")
    assert lines["one language"].startswith("100.0") and lines["tokens"] == "10.0"


def test_names_must_fit_the_models(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "run_dir: r\nstages:\n  t: {stage: evaluate, questions: q.jsonl, models: [{path: m}], names: [a, b]}\n"
    )
    with pytest.raises(ConfigError, match=r"names: found \['a', 'b'\], required 1 different ones, one a model"):
        load_pipeline(tmp_path / "p.yaml", [])
