"""The owners' benchmarks: rows that are invented, in the owners' forms; how they are asked and graded."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zipfile
from collections import Counter
from datetime import datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from owners_files import lines, loaded, mark_of, table

from r1engine.evaluation.benchmark import Graded, Judged, Marked, Reply
from r1engine.evaluation.prompts import FOLDER, prompt
from r1engine.rewards import Scorer, ScorerSettings

# ---- mathematics ---------------------------------------------------------------------------------------------------

AIME = {"problem": "How many?", "answer": "073", "id": 60}


@pytest.mark.parametrize(
    ("name", "row", "answer", "right", "wrong"),
    [
        ("aime_2024", AIME, "073", "so \\boxed{73}", "\\boxed{74}"),
        ("aime_2025", {"Problem": "How many?", "Answer": 33, "ID": "x"}, "33", "\\boxed{033}", "33"),
        (
            "math_500",
            {"problem": "Which?", "answer": "0,1", "unique_id": "test/algebra/1.json", "level": 2},
            "0,1",
            "\\boxed{(0,1)}",
            "\\boxed{01}",
        ),
        (
            "gsm8k",
            {"question": "How many?", "answer": "9 * 2 = <<9*2=18>>18\n#### 1,018"},
            "1,018",
            "#### 1018",
            "9 * 2 = 18",
        ),
        (
            "cnmo_2024",
            {"question": "\u591a\u5c11?", "answer": "\\frac{1}{2}"},
            "\\frac{1}{2}",
            "\\boxed{0.5}",
            "\\boxed{5}",
        ),
    ],
)
def test_problems_of_mathematics(tmp_path, scorer, name, row, answer, right, wrong):
    bench, (item,) = loaded(name, lines(tmp_path / "test.jsonl", row))
    assert item.question.answer == answer
    asked = bench.ask(item, 0)
    assert asked.startswith(item.question.text + "\n") and asked.endswith("\\boxed{}.")
    graded = [bench.grade(item, 0, Reply(f"<think>\\boxed{{1}}</think>{text}", "stop")) for text in (right, wrong)]
    assert all(isinstance(one, Graded) for one in graded)
    assert [score.verdict for score in scorer.score(one.record for one in graded)] == ["right", "wrong"]


@pytest.fixture(scope="module")
def scorer():
    with Scorer(ScorerSettings(workers=1)) as scorer:
        yield scorer


def test_ids_are_the_owners_or_of_the_text_and_never_the_line(tmp_path):
    rows = [{"problem": text, "answer": "1"} for text in ("a", "b", "a")]
    _, items = loaded("math_500", lines(tmp_path / "x.jsonl", *rows))
    _, again = loaded("math_500", lines(tmp_path / "x.jsonl", rows[1]))
    assert len({item.id for item in items}) == 3 and again[0].id == items[1].id
    _, own = loaded("math_500", lines(tmp_path / "x.jsonl", rows[0] | {"unique_id": "test/1"}))
    assert own[0].id == "test/1"


# ---- multiple choice -----------------------------------------------------------------------------------------------

MMLU_ROW = ["Which, {A}?", "one", "two, three", "3", "4", "C"]
WSC = {"target": {"span2_text": "he", "span1_text": "Ming"}, "label": "false", "text": "Ming said he\u2026"}
PRO = {"question_id": 7, "question": "Which?", "options": ["a", "b", "c", "N/A"], "answer": "C", "category": "law"}


def mmlu_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for subject in ("law", "art_history"):
            inside = io.StringIO()
            csv.writer(inside).writerows([MMLU_ROW, ["Other?", "a", "b", "c", "d", "A"]])
            archive.writestr(f"data/test/{subject}_test.csv", inside.getvalue())
            archive.writestr(f"data/dev/{subject}_dev.csv", "x")
    return path


def test_mmlu_from_the_owners_zip_a_folder_and_simple_evals_table(tmp_path):
    bench, items = loaded("mmlu", mmlu_zip(tmp_path / "data.zip"))
    assert len(items) == 4 and len({item.id for item in items}) == 4  # the same question in two subjects
    (tmp_path / "test").mkdir()
    table(tmp_path / "test" / "law_test.csv", MMLU_ROW)
    head = ["", "Question", "A", "B", "C", "D", "Answer", "Subject"]
    one_table = table(tmp_path / "mmlu.csv", head, ["0", *MMLU_ROW, "law"])
    for path in (tmp_path / "test", one_table):
        (item,) = loaded("mmlu", path)[1]
        assert item.data["options"] == MMLU_ROW[1:5] and item.question.answer == "C" and item.data["subject"] == "law"
    asked = bench.ask(item, 0)
    assert asked.startswith("Answer the following multiple choice question. The last line of your response should be")
    assert asked.endswith("Think step by step before answering.\n\nWhich, {A}?\n\nA) one\nB) two, three\nC) 3\nD) 4")
    assert mark_of(bench, item, "Answer: C") == Marked("right", 1.0, "C", "chose C")
    assert mark_of(bench, item, "Answer: A").reason == "chose A, required C"
    assert mark_of(bench, item, "no idea") == Marked("wrong", 0.0, None, "no answer could be read")


REDUX = ["question", "choices", "answer", "error_type", "source", "correct_answer", "potential_reason"]


@pytest.mark.parametrize(
    ("kind", "corrected", "right"),
    [
        ("OK", "", "B"),
        ("Expert", "", "B"),
        ("bad_question_clarity", "2", "B"),
        ("wrong_groundtruth", "2", "C"),
        ("Wrong Groundtruth", "D", "D"),
        ("wrong groundtruth", "x, y", "A"),  # the text of an option
        ("multiple correct answers", "A,C", "A,C"),
        ("no correct answer", "5", None),
        ("wrong groundtruth", "Real, inverted, 4 cm", None),  # no option says so
    ],
)
def test_mmlu_redux_takes_the_corrected_labels(tmp_path, kind, corrected, right):
    choices = "['x, y', 'b', 'c', 'd']"
    first = ["first", choices, "0", "ok", "", "", ""]
    path = table(tmp_path / "mmlu_law.csv", REDUX, first, ["q", choices, "1", kind, "", corrected, ""])
    bench, items = loaded("mmlu_redux", path)
    assert [item.question.answer for item in items[1:]] == ([] if right is None else [right])
    assert "- A) x, y\n- B) b" in bench.ask(items[0], 0) and bench.ask(items[0], 0).endswith('"answer": "___"\n}\n```')
    if right == "A,C":
        assert [mark_of(bench, items[1], f'"answer": "{letter}"').score for letter in "ABC"] == [1.0, 0.0, 1.0]


def test_mmlu_pro_shows_no_fillers_and_takes_no_letter_of_one(tmp_path):
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PRO]), path)
    bench, (item,) = loaded("mmlu_pro", path)
    assert item.id == "7" and bench.ask(item, 0) == (
        "The following are multiple choice questions (with answers) about law. Think step by step and then output the "
        'answer in the format of "The answer is (X)" at the end.\n\nQuestion: Which?\nOptions: A. a\nB. b\nC. c\n'
        "Answer: Let's think step by step.\n\n"
    )
    assert mark_of(bench, item, "The answer is (C).").verdict == "right"
    assert mark_of(bench, item, "The answer is (D).") == Marked("wrong", 0.0, None, "found D, which is no option")
    unread = [mark_of(bench, item, f"{n}: I cannot say") for n in range(1000)]
    assert sum(mark.score for mark in unread) == 0


GPQA = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID"]


def test_gpqa_turns_its_options_from_sample_to_sample(tmp_path):
    path = table(tmp_path / "gpqa_diamond.csv", GPQA, ["Which?", "right", "w1", "w2", "w3", "rec1"])
    bench, (item,) = loaded("gpqa_diamond", path)
    assert bench.private and item.id == "rec1"
    places = Counter()
    for sample in range(8):
        shown = bench.ask(item, sample).rpartition("\n\n")[2].split("\n")
        letter = next(line[0] for line in shown if line.endswith(") right"))
        places[letter] += 1
        assert mark_of(bench, item, f"Answer: {letter}", sample).answer == "A"  # votes are for options, not letters
        other = next(line[0] for line in shown if line.endswith(") w2"))
        assert mark_of(bench, item, f"Answer: {other}", sample).answer == "C"
    assert places == dict.fromkeys("ABCD", 2)


def test_c_eval_and_cluewsc_are_asked_in_chinese(tmp_path):
    head = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    table(tmp_path / "law_val.csv", head, ["0", "Q?", "a", "b", "c", "d", "D", ""])
    bench, (item,) = loaded("c_eval", tmp_path)
    assert item.id == "law/0" and "\u5173\u4e8e\u6cd5\u5b66\u8003\u8bd5" in bench.ask(item, 0)
    assert bench.ask(item, 0).endswith(
        "D. d\n\u7b54\u6848\uff1a\u8ba9\u6211\u4eec\u4e00\u6b65\u4e00\u6b65\u601d\u8003\uff0c"
    )
    assert mark_of(bench, item, "\u56e0\u6b64\u7b54\u6848\u9009D\u3002").verdict == "right"
    (tmp_path / "no_such_val.csv").write_text("id,question,A,B,C,D,answer\n0,Q?,a,b,c,d,D\n")
    with pytest.raises(ValueError, match="found the subject no_such"):
        loaded("c_eval", tmp_path)
    bench, (item,) = loaded("cluewsc", lines(tmp_path / "test_public.json", WSC))  # lines, whatever its owners name it
    assert bench.ask(item, 0).startswith(
        "Ming said he\u2026\n\u6b64\u5904\uff0c\u201che\u201d\u662f\u5426\u6307\u4ee3\u201cMing\u201c\uff1f"
    )
    assert [mark_of(bench, item, f"\u7b54\u6848: {letter}").score for letter in "AB"] == [0.0, 1.0]


def test_c_eval_from_the_owners_zip_and_the_folder_that_it_makes(tmp_path):
    head = ["id", "question", "A", "B", "C", "D"]
    for folder, columns, row in (("val", [*head, "answer"], ["0", "Q?", "a", "b", "c", "d", "D"]), ("test", head, [])):
        (tmp_path / folder).mkdir()
        table(tmp_path / folder / f"law_{folder}.csv", columns, row)
    path = tmp_path / "ceval-exam.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/val/._law_val.csv", b"\x00\x05\x16\x07")  # of a zip that was made on a Mac
        for file in (tmp_path / "val/law_val.csv", tmp_path / "test/law_test.csv"):
            archive.write(file, file.relative_to(tmp_path))
    found = [[item.id for item in loaded("c_eval", where)[1]] for where in (path, tmp_path, tmp_path / "val")]
    assert found == [["law/0"]] * 3


# ---- programs ------------------------------------------------------------------------------------------------------


def problem(name: str, day: str, **others) -> dict:
    tests = json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}])
    row = {"question_id": name, "question_content": "Double it.", "contest_date": day, "starter_code": ""}
    return row | {"public_test_cases": tests, "private_test_cases": "[]", "metadata": "{}"} | others


def test_the_window_of_live_code_bench_holds_its_last_day(tmp_path):
    days = {
        "a": "2024-07-31T23:00:00",
        "b": "2024-08-01T00:00:00",
        "c": "2025-01-31T20:00:00",
        "d": "2025-02-01T00:00:00",
    }
    path = lines(tmp_path / "test.jsonl", *(problem(name, day) for name, day in days.items()))
    window = {"first_day": "2024-08-01", "last_day": "2025-01-31"}
    bench, items = loaded("livecodebench", path, **window)
    assert [item.id for item in items] == ["b", "c"] and len(loaded("livecodebench", path)[1]) == 4
    assert "Read the inputs from stdin solve the problem" in bench.ask(items[0], 0)
    with pytest.raises(
        ValueError, match=r"found contests from 2024-07-31 to 2025-02-01, required some from 2026-01-01"
    ):
        loaded("livecodebench", path, first_day="2026-01-01")
    rows = [problem("c", days["c"]) | {"contest_date": datetime.fromisoformat(days["c"])}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    assert [item.id for item in loaded("livecodebench", tmp_path / "test.parquet", **window)[1]] == ["c"]
    with pytest.raises(ValueError, match=r"test\.jsonl:1: contest_date is 'soon', required a date"):
        loaded("livecodebench", lines(path, problem("a", "soon")))


def test_programs_are_graded_by_their_tests(tmp_path):
    starter = {"starter_code": "class Solution:\n    def f(self, n: int) -> int:\n        "}
    bench, (item,) = loaded("livecodebench", lines(tmp_path / "t.jsonl", problem("a", "2024-09-01", **starter)))
    assert f"```python\n{starter['starter_code']}\n```" in bench.ask(item, 0)
    reply = "<think>```python\nprint(0)\n```</think>So:\n```python\nprint(2 * int(input()))\n```"
    graded = bench.grade(item, 0, Reply(reply, "stop"))
    assert graded.answer == "print(2 * int(input()))" and graded.record.question.reward == "code"
    assert bench.grade(item, 0, Reply("<think>```python\nprint(0)\n```", "length")).answer is None


def test_human_eval_continues_a_prompt(tmp_path):
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "test": "def check(candidate):\n    assert candidate(1)",
    }
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    bench, (item,) = loaded("human_eval", path)
    assert item.id == "HumanEval/0" and item.question.tests["entry_point"] == "f"
    assert bench.ask(item, 0).endswith("for this function.\ndef f(x):\n")


# ---- short answers -------------------------------------------------------------------------------------------------


def test_simple_qa_shows_the_judge_what_follows_the_thoughts(tmp_path):
    path = table(tmp_path / "s.csv", ["metadata", "problem", "answer"], ["{}", "Who {target}?", "Ada"])
    bench, (item,) = loaded("simpleqa", path)
    assert bench.needs_judge and bench.ask(item, 0) == "Who {target}?"
    asked = bench.grade(item, 0, Reply("<think>Bob?</think>Ada.", "stop"))
    assert (
        isinstance(asked, Judged)
        and "Question: Who {target}?\nGold target: Ada\nPredicted answer: Ada.\n" in asked.prompt
    )
    assert "Bob" not in asked.prompt and all("Ada." not in canary for canary in asked.canaries)
    assert asked.conclude("A") == Marked(
        "right", 1.0, "Ada.", "correct", {"correct": 1.0, "incorrect": 0.0, "not_attempted": 0.0}
    )
    never = bench.grade(item, 0, Reply("<think>Bob?", "length"))
    assert isinstance(never, Marked) and never.score == 0.0 and never.parts["not_attempted"] == 1.0
    marks = [[asked.conclude(grade)] for grade in "AABC"]
    totals = bench.totals([item] * 4, marks)
    assert totals == pytest.approx(
        {"incorrect": 0.25, "not_attempted": 0.25, "correct_of_attempted": 2 / 3, "f": 4 / 7}
    )


def test_c_simple_qa_asks_in_chinese(tmp_path):
    row = {"id": "x1", "question": "\u8c01?", "answer": "\u963f\u8fbe"}
    bench, (item,) = loaded("c_simpleqa", lines(tmp_path / "c.jsonl", row))
    asked = bench.grade(item, 0, Reply("\u963f\u8fbe", "stop"))
    assert (
        item.id == "x1"
        and "\u95ee\u9898: \u8c01?\n\u6b63\u786e\u7b54\u6848: \u963f\u8fbe\n\u9884\u6d4b\u7b54\u6848: \u963f\u8fbe"
        in asked.prompt
    )
    assert asked.conclude("\u3010\u9519\u8bef\u3011").verdict == "wrong"


def test_frames_with_and_without_its_articles(tmp_path):
    path = table(tmp_path / "test.tsv", ["", "Prompt", "Answer", "wiki_links"], ["0", "Which lake?", "Lake Como", "[]"])
    bench, (item,) = loaded("frames", path)
    assert bench.ask(item, 0) == "Which lake?"
    row = {"Prompt": "Which lake?", "Answer": "Lake Como", "wiki_items": [{"title": "Como", "text": "A lake."}]}
    _, (with_text,) = loaded("frames", lines(tmp_path / "frames.jsonl", row), articles=True)
    assert "<text>\nComo\nA lake.\n</text>\n\nWhich lake?\n\nFormat your response" in bench.ask(with_text, 0)
    assert mark_of(bench, item, "Therefore, the answer is **lake Como**.") == Marked(
        "right", 1.0, "lake Como.", "same text"
    )
    graded = bench.grade(item, 0, Reply("Therefore, the answer is Lago di Como.", "stop"))
    assert isinstance(graded, Graded) and graded.record.question.reward == "judge"
    with pytest.raises(ValueError, match="wiki_items is null, required a list"):
        loaded("frames", path, articles=True)


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_are_word_for_word_what_they_were():
    # A prompt that changes is another benchmark: change the file and its digest together, and the row's `grader`.
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in sorted(FOLDER.iterdir())}
    assert found == PROMPTS
    assert prompt("boxed", question="{question} \\boxed{}").startswith(
        "{question} \\boxed{}\nPlease reason step by step"
    )


PROMPTS = {
    "boxed.txt": "0cce624d",
    "boxed_chinese.txt": "ebd972a5",
    "c_eval.txt": "fb7f4d32",
    "c_eval_subjects.json": "1f1cde29",
    "c_simpleqa_grader.txt": "ceb04711",
    "cluewsc.txt": "4ac964cb",
    "drop_opening.txt": "24be6e37",
    "drop_task.txt": "23e56cdf",
    "frames_articles.txt": "e03a2de9",
    "human_eval.txt": "6a4b3a26",
    "livecodebench.txt": "cea9c759",
    "livecodebench_function.txt": "230ef117",
    "livecodebench_program.txt": "4a9a67f6",
    "mmlu_pro.txt": "a28b1ccb",
    "mmlu_redux.txt": "ce99ee63",
    "multiple_choice.txt": "fe4042ad",
    "simpleqa_grader.txt": "a456b5c4",
}
