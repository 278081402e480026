"""Data as people have it: columns of other names, solutions for answers, compressed files, folders, public sets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import get_args

import pyarrow
import pyarrow.parquet
import pytest
from reward_records import record

from r1engine.config import ConfigError, RlConfig, load
from r1engine.config.rl import Preset
from r1engine.data.presets import PRESETS
from r1engine.data.prompts import PromptTable, write_prompts
from r1engine.data.questions import read_questions
from r1engine.data.reading import Reading, reference_in
from r1engine.rewards import Scorer, ScorerSettings
from r1engine.rewards.extract import final_answer
from r1engine.stages.check import check_rows
from r1engine.stages.inputs import note_unusable

ROOT = Path(__file__).resolve().parents[2]
SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def found(path: Path, reading: Reading | None = None) -> list[tuple[str, str]]:
    return [(q.text, q.answer) for q in read_questions(path, *([reading] if reading else []))]


ROWS = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]


def test_every_form_of_file_holds_the_same_questions(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(*ROWS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(*ROWS)))
    with pyarrow.output_stream(tmp_path / "c.jsonl.zst", compression="zstd") as file:
        file.write(lines(*ROWS))
    (tmp_path / "d.json").write_text(json.dumps(ROWS))
    (tmp_path / "e.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "f.parquet")
    (tmp_path / "README.md").write_text("no data")
    wanted = [("a", "1"), ("b", "2")]
    for file in tmp_path.iterdir():
        if file.suffix != ".md":
            assert found(file) == wanted, file
    assert found(tmp_path) == wanted * 6
    assert found(tmp_path / "[a-c]*") == wanted * 3
    assert [q.place.rpartition("/")[2] for q in read_questions(tmp_path)[1:8:2]] == [
        "a.jsonl:2", "b.jsonl.gz:2", "c.jsonl.zst:2", "d.json: row 2",
    ]  # fmt: skip


def test_numbers_of_a_list_keep_their_spelling(tmp_path):
    (tmp_path / "a.json").write_text('[{"question": "q", "answer": 0.10}]')
    assert found(tmp_path / "a.json") == [("q", "0.10")]


def test_what_is_no_data_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*ROWS) * 100)[:40])
    with pytest.raises(ValueError, match=r"a.jsonl.gz: cannot be read: .*copy it again"):
        found(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.json").write_text('"text"')
    with pytest.raises(ValueError, match=r"b.json: found str, required a list of objects, or lines as .jsonl"):
        found(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"found no data files, required a .jsonl, .json or .parquet file"):
        found(tmp_path / "*.parquet")


def test_prompts_of_a_folder_know_their_file(tmp_path):
    (tmp_path / "data").mkdir()
    for name in "xy":
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines({"question": name, "answer": "1"}, *ROWS[:1]))
    write_prompts(tmp_path / "data", tmp_path, lambda texts: [[1]] * len(texts), lambda q: q.text, 9)
    table = PromptTable(tmp_path, lambda q: q.text)
    assert [table.question(i).place.rpartition("/")[2] for i in range(4)] == [
        "x.jsonl:1", "x.jsonl:2", "y.jsonl:1", "y.jsonl:2",
    ]  # fmt: skip
    assert [table[i].id for i in range(4)] == [0, 1, 2, 3]


# ---- columns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dots_lead_into_nested_columns_and_messages_are_their_user_message(tmp_path, kind):
    row = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "What?"}],
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "level": 3,
    }
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines(row))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    columns = {"question": "prompt", "answer": "reward_model.ground_truth"}
    assert found(path, Reading(columns)) == [("What?", "34")]
    assert found(path, Reading({**columns, "question": "prompt.0.content"})) == [("s", "34")]
    (question,) = read_questions(path, Reading(columns, keeps_columns=True))
    assert question.columns == row
    assert read_questions(path, Reading(columns))[0].columns is None


def test_a_column_whose_name_has_dots_comes_first(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"q": "x", "a.b": "1", "a": {"b": "2"}}))
    assert found(tmp_path / "a.jsonl", Reading({"question": "q", "answer": "a.b"})) == [("x", "1")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "problem"}, r"a.jsonl:1: data.columns: found no column 'problem' for question, only a, prompt"),
        ({"question": "a", "answer": "a.c"}, r"a.jsonl:1: data.columns: found nothing at 'a.c', required the ans"),
        ({"question": "prompt", "answer": "a.b"}, r"a.jsonl:1: prompt holds 2 messages of the user, required one"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, columns, message):
    users = [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": users, "a": {"b": 1}}))
    with pytest.raises(ValueError, match=message):
        found(tmp_path / "a.jsonl", Reading(columns))


def test_without_columns_the_setting_that_reads_them_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": "p", "reward_model": {"ground_truth": 1}}))
    wanted = r"a run reads these with data.columns=\{question: prompt, answer: reward_model.ground_truth\}"
    with pytest.raises(ValueError, match=wanted):
        found(tmp_path / "a.jsonl")


# ---- references in solutions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "form", "reference"),
    [
        (SOLUTION, "auto", "72"),
        (SOLUTION, "hashes", "72"),
        ("#### 1,000\n#### -5  ", "auto", "-5"),
        ("So $x = \\boxed{\\frac{1}{2}}$.", "auto", "\\frac{1}{2}"),
        ("$\\boxed{1}$ or $\\boxed{2}$", "auto", "$\\boxed{1}$ or $\\boxed{2}$"),
        ("$\\boxed{1}$, no, $\\boxed{2}$", "boxed", "2"),
        ("\\boxed{3}", "auto", "\\boxed{3}"),
        ("#### 3", "value", "#### 3"),
        ("7", "auto", "7"),
    ],
)
def test_reference_stands_where_the_form_says(answer, form, reference):
    assert reference_in(answer, form) == reference


def test_an_answer_of_another_form_is_named_with_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"question": "q", "answer": "72"}))
    with pytest.raises(ValueError, match=r"a.jsonl:1: answer is '72', required a line that begins with ####"):
        found(tmp_path / "a.jsonl", PRESETS["gsm8k"])
    with pytest.raises(ValueError, match=r"a.jsonl:1: answer is '72', required a \\boxed\{\} that is closed"):
        found(tmp_path / "a.jsonl", Reading(answer_form="boxed"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (SOLUTION, "72"),
        ("#### 72\n", "72"),
        ("<think>a</think>It is so.\n#### $1,000", "$1,000"),
        ("#### Step 1\nWe add.", None),
        ("\\boxed{5}\n#### 6", "5"),
        ("a #### 6", None),
    ],
)
def test_a_last_line_with_hashes_is_an_answer(text, answer):
    assert final_answer(text)[0] == answer


# ---- public sets ---------------------------------------------------------------------------------------------------

# A row of each, as its card on the Hub shows it, and what is read of it.
PUBLIC = {
    "gsm8k": ({"question": "How many?", "answer": SOLUTION}, "How many?", "72"),
    "math": (
        {"problem": "Find $x$.", "level": "Level 5", "type": "Algebra", "solution": "It is $\\boxed{3}$, not $4$."},
        "Find $x$.",
        "3",
    ),
    "dapo_math": (
        {
            "data_source": "math_dapo",
            "prompt": [
                {
                    "role": "user",
                    "content": "Solve the following math problem step by step. The last line of your response should "
                    "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
                    'In triangle $ABC$ ...\n\nRemember to put your answer on its own line after "Answer:".',
                }
            ],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        "In triangle $ABC$ ...",
        "34",
    ),
    "deepscaler": ({"problem": "Find.", "answer": "-\\frac{2}{3}", "solution": "1. ..."}, "Find.", "-\\frac{2}{3}"),
    "openr1_math": (
        {"problem": "Find.", "solution": "...", "answer": "v_{B}=4", "messages": [], "generations": ["a"]},
        "Find.",
        "v_{B}=4",
    ),
    "numinamath": (
        {"source": "cn_k12", "problem": "Find.", "solution": "So \\boxed{16}.", "messages": []},
        "Find.",
        "16",
    ),
    "big_math": (
        {"problem": "Find.", "answer": "125", "source": "omnimath", "domain": ["Math"], "llama8b_solve_rate": 0.5},
        "Find.",
        "125",
    ),
}


def test_every_preset_reads_its_set(tmp_path):
    assert set(PRESETS) == set(get_args(Preset)) == set(PUBLIC)
    for name, (row, question, answer) in PUBLIC.items():
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        assert found(path, PRESETS[name]) == [(question, answer)], name
        assert f"| `{name}` |" in (ROOT / "docs" / "data.md").read_text()


def test_a_preset_on_a_file_of_another_shape_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"query": "q", "answer": "1"}))
    reading = Reading(PRESETS["math"].columns, "boxed", name="data.preset math")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"query": "q", "response": "1"}]), tmp_path / "b.parquet")
    for name, there in (("a.jsonl", "answer, query"), ("b.parquet", "query, response")):
        wanted = f"{name}.*: data.preset math: found no column 'problem' for question, only {there}"
        with pytest.raises(ValueError, match=wanted):
            found(tmp_path / name, reading)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.columns.prompt=x"], "data.columns: found prompt, required some of question, answer"),
        (["data.preset=gsm8k", "data.columns.question=x"], "data.preset: found gsm8k beside data.columns"),
        (["data.preset=gsm9k"], "data.preset: found 'gsm9k', required one of 'gsm8k'"),
        (["data.train=a.csv"], r"data.train: found a.csv, required a .jsonl, .json or .parquet file"),
    ],
)
def test_settings_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        load(ROOT / "configs" / "r1_zero.yaml", ["model.path=m", f"data.train={tmp_path}/a.jsonl", *settings])


def test_the_share_of_unusable_references_is_told_and_limited(tmp_path):
    answers = ["5", "9^{9^{9}}", "7", "8"]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"question": a, "answer": a} for a in answers)))
    write_prompts(tmp_path / "a.jsonl", tmp_path, lambda texts: [[1]] * len(texts), lambda q: q.text, 9)
    table = PromptTable(tmp_path, lambda q: q.text)
    with Scorer(ScorerSettings(workers=1, deadline_seconds=60)) as scorer:
        assert "1 of 4 references (25%) are undecided" in note_unusable(scorer, table, 0.25)
        with pytest.raises(ValueError, match=r"1 of 4 .*required at most data.most_unusable = 0.2 of them"):
            note_unusable(scorer, table, 0.2)
        (score,) = scorer.score([record("math", SOLUTION, "72")])
    assert score.verdict == "right" and RlConfig().data.most_unusable == 0.5


def test_a_pipeline_that_is_only_checked_reads_questions_by_their_columns(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"problem": "1+1?", "answer": "2"}))
    check_rows(RlConfig(data={"train": tmp_path / "a.jsonl", "columns": {"question": "problem"}}))
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: data\.columns: found no column 'text' for question"):
        check_rows(RlConfig(data={"train": tmp_path / "a.jsonl", "columns": {"question": "text"}}))
