"""Prompts of a file: what is refused and where it stands, and sets that are large, repetitive or too long."""

from __future__ import annotations

import json
import tracemalloc
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from shown import as_it_is, in_table_1

from r1engine.data.prompts import PromptTable, load_prompts, write_prompts
from r1engine.data.questions import read_questions
from r1engine.rewards.offline import read_records


def encode(text: str) -> list[int]:
    return list(text.encode())


def jsonl(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parquet(path: Path, columns: dict[str, pyarrow.Array | list]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def refusal(path: Path, load=read_questions) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    return str(caught.value).replace(str(path), path.name)


# ---- numbers and nulls -----------------------------------------------------------------------------------------

LITERALS = [
    "0.00001", "1e-05", "1e-5", "1E3", "1e3", "0.10", "1.0", "-0.0", "3.5e-7", "12345678901234567.25", "1e16",
    "0.30000000000000004", "100.", "7", "-42", "123456789012345678901234567890",
]  # fmt: skip


@pytest.mark.parametrize("literal", [x for x in LITERALS if not x.endswith(".")])
def test_a_number_of_a_line_keeps_its_spelling(tmp_path, literal):
    line = f'{{"question": "q", "answer": {literal}, "tests": [0.5, 1e-05]}}'
    (question,) = read_questions(jsonl(tmp_path / "a.jsonl", line))
    assert question.answer == literal
    assert question.tests == [0.5, 1e-05]  # inside of other values numbers stay numbers
    assert [type(value) for value in question.tests] == [float, float]
    record = f'{{"reward": "math", "completion": "c", "answer": {literal}}}'
    assert read_records(jsonl(tmp_path / "b.jsonl", record))[0].question.answer == literal


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (pyarrow.array([0.1, 1e-05, 1e16, 2.5], pyarrow.float32()), ["0.1", "0.00001", "10000000000000000.0", "2.5"]),
        (pyarrow.array([0.1, 1e-05, 1e16, 1 / 3]), ["0.1", "0.00001", "10000000000000000.0", "0.3333333333333333"]),
        (pyarrow.array(np.array([0.1, 1000.0], np.float16)), ["0.1", "1000.0"]),
        (pyarrow.array([7, -42], pyarrow.int8()), ["7", "-42"]),
        (pyarrow.array([2**63], pyarrow.uint64()), [str(2**63)]),
        (pyarrow.array([Decimal("0.10"), Decimal("1E+3"), None]), ["0.10", "1000.00", ""]),
        (pyarrow.array([0.1, 0.1], pyarrow.float32()).dictionary_encode(), ["0.1", "0.1"]),
        (pyarrow.array(["1e-05", "0.10"], pyarrow.large_string()), ["1e-05", "0.10"]),
    ],
)
def test_a_number_of_a_column_is_the_shortest_of_its_width(tmp_path, values, wanted):
    columns = {"question": ["q"] * len(wanted), "answer": values, "reward": ["format"] * len(wanted)}
    assert [q.answer for q in read_questions(parquet(tmp_path / "a.parquet", columns))] == wanted


@pytest.mark.parametrize("field", ["answer", "reward", "tests", "language", "other"])
def test_null_is_absent_in_both_formats(tmp_path, field):
    row = {"question": "q", "answer": "1", "reward": "language", "language": "en"}
    without, with_null = {k: v for k, v in row.items() if k != field}, row | {field: None}
    (wanted,) = read_questions(jsonl(tmp_path / "a.jsonl", without))
    assert read_questions(jsonl(tmp_path / "b.jsonl", with_null)) == [wanted]
    columns = {name: pyarrow.array([value], pyarrow.string()) for name, value in with_null.items()}
    assert read_questions(parquet(tmp_path / "c.parquet", columns)) == [wanted]


# ---- what is refused, and where ---------------------------------------------------------------------------------

MESSAGES = [[{"role": "user", "content": "1+1"}]]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"problem": ["1+1"], "solution": ["2"]},
            "['problem', 'solution'] (a run reads these with data.columns={",
        ),
        (
            {"data_source": ["gsm8k"], "prompt": MESSAGES, "reward_model": [{"ground_truth": "2"}]},
            "['data_source', 'prompt', 'reward_model'] (a run reads these with data.columns={question: prompt, answer: "
            "reward_model.ground_truth})",
        ),
        (
            {"messages": MESSAGES, "answer": ["2"]},
            "['answer', 'messages'] (a run reads these with data.columns.quest",
        ),
        ({"x": [1], "y": [None]}, "['x', 'y']"),
    ],
)
def test_the_columns_that_are_there_are_named(tmp_path, columns, told):
    where = {jsonl: "a.jsonl:1", parquet: "b.parquet"}
    for write, rows in ((jsonl, [{name: values[0] for name, values in columns.items()}]), (parquet, [columns])):
        path = write(tmp_path / where[write].split(":")[0], *rows)
        assert refusal(path).startswith(f"{where[write]}: found no field 'question', only {told}")


def test_a_missing_answer_names_the_columns_that_are_not_read_too(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"question": ["q"], "solution": ["2"]})
    wanted = (
        "a.parquet: row 1: found no `answer`, required by reward 'math'; the fields there are ['question', 'solution']"
    )
    assert refusal(path) == wanted


BAD = {
    "half a pair in the question": '{"question": "caf\\ud83d bad", "answer": "2"}',
    "half a pair in the answer": '{"question": "q", "answer": "\\udc00"}',
    "half a pair in the reward": '{"question": "q", "answer": "1", "reward": "\\ud800"}',
    "deep": "[" * 100_000,
    "digits": '{"question": "q", "answer": ' + "7" * 5000 + "}",
    "no object": "7",
    "null": "null",
    "infinite": '{"question": "q", "answer": -Infinity}',
    "beyond float64": '{"question": "q", "answer": 1e999}',
    "a list": '{"question": ["q"], "answer": "1"}',
    "an unknown language": '{"question": "q", "answer": "1", "language": "\\u00e9"}',
    "two values": '{"question": "q", "answer": "1"} {}',
    "cut": '{"question": "q", "answ',
}


@pytest.mark.parametrize("bad", BAD)
def test_every_refused_line_is_named(tmp_path, bad):
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": 1}, "", BAD[bad])
    assert refusal(path).startswith("a.jsonl:3: ")
    assert refusal(path, lambda path: load_prompts(path, encode, as_it_is, 100)).startswith("a.jsonl:3: ")


def odd_columns() -> dict[str, dict]:
    """Columns whose second row is refused."""
    q, a = ["q", "q"], ["1", "1"]
    no_text = pyarrow.array([b"q", b"\xff\xfe"]).cast(pyarrow.string(), safe=False)
    return {
        "bytes that are no text": {"question": no_text, "answer": a},
        "bytes": {"question": q, "answer": pyarrow.array([None, b"1"]), "reward": ["format"] * 2},
        "a date": {"question": q, "answer": pyarrow.array([None, date(2026, 1, 1)]), "reward": ["format"] * 2},
        "not a number": {"question": q, "answer": [1.0, float("nan")]},
        "tests of dates": {"question": q, "answer": a, "tests": [None, [date(2026, 1, 1)]]},
        "null": {"question": ["q", None], "answer": a},
    }


@pytest.mark.parametrize("bad", list(odd_columns()))
def test_every_refused_row_is_named(tmp_path, bad):
    path = parquet(tmp_path / "a.parquet", odd_columns()[bad])
    assert refusal(path, lambda path: load_prompts(path, encode, as_it_is, 100)).startswith("a.parquet: row 2: ")


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"question": [f"q{i}" for i in range(5000)], "answer": ["1"] * 5000})
    data = bytearray(path.read_bytes())
    data[200:2000] = b"\x00" * 1800
    path.write_bytes(data)
    assert refusal(path).startswith("a.parquet: the rows behind 0 cannot be read: ")


def test_a_text_that_the_tokenizer_refuses_is_named(tmp_path):
    def fussy(text: str) -> list[int]:
        if "bad" in text:
            raise TypeError("TextInputSequence must be str")
        return encode(text)

    path = jsonl(tmp_path / "a.jsonl", *({"question": text, "answer": 1} for text in ("a", "b", "bad", "c")))
    message = refusal(path, lambda path: load_prompts(path, fussy, as_it_is, 100))
    assert message == "a.jsonl:3: cannot be tokenized: TypeError: TextInputSequence must be str"


# ---- too long ---------------------------------------------------------------------------------------------------


def test_all_overlong_prompts_are_counted_and_listed(tmp_path):
    sizes = [3, 50, 4, 60, 60, 5, 50]
    path = jsonl(tmp_path / "a.jsonl", "", *({"question": "x" * size, "answer": i} for i, size in enumerate(sizes)))
    message = refusal(path, lambda path: load_prompts(path, encode, as_it_is, 4))
    listed = "a.jsonl:3 (50), a.jsonl:5 (60), a.jsonl:6 (60), a.jsonl:7 (5), a.jsonl:8 (50)"
    assert message.startswith("a.jsonl: 5 of 7 prompts have more than max_prompt_tokens = 4 tokens, the longest 60: ")
    assert listed in message.replace(str(path), path.name) and "data.overlong=skip" in message
    kept = load_prompts(path, encode, as_it_is, 4, overlong="skip")
    assert [(p.id, p.question.answer, p.question.place) for p in kept] == [
        (0, "0", f"{path}:2"),
        (2, "2", f"{path}:4"),
    ]
    assert len(kept.notes) == 1 and kept.notes[0].startswith(f"left out: {path}: 5 of 7 prompts")
    with pytest.raises(ValueError, match="7 of 7 prompts have more than"):
        load_prompts(path, encode, as_it_is, 2, overlong="skip")
    assert len(load_prompts(path, encode, as_it_is, 60)) == 7


def test_a_long_list_of_overlong_prompts_is_cut_and_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"question": "x" * 9, "answer": i} for i in range(2000)))
    message = refusal(path, lambda path: load_prompts(path, encode, as_it_is, 4))
    assert "2,000 of 2,000 prompts" in message and message.count("a.jsonl:") < 30 and "and 1,980 more" in message


# ---- large and repetitive sets -----------------------------------------------------------------------------------


def test_a_question_that_stands_there_often_is_stored_and_tokenized_once_and_told(tmp_path):
    questions = [{"question": f"What is {i}?", "answer": str(i)} for i in range(20)]
    rows = [question | {"id": copy} for copy in range(100) for question in questions]
    seen: list[str] = []
    table = load_prompts(
        jsonl(tmp_path / "a.jsonl", *rows), lambda text: seen.append(text) or encode(text), as_it_is, 99
    )
    assert len(table) == 2000 and len(seen) == 20
    assert table.notes == [
        "a.jsonl: 2,000 rows hold 20 distinct questions; a question is drawn as often as it stands there"
    ]
    assert [table[i].question.text for i in (0, 19, 20, 1999)] == [
        "What is 0?",
        "What is 19?",
        "What is 0?",
        "What is 19?",
    ]
    assert [table[i].id for i in (0, 20, 1999)] == [0, 20, 1999]
    assert table[1999].question.place.endswith("a.jsonl:2000")
    assert [question.text for question in table.distinct(30)] == [question["question"] for question in questions]
    other_answer = load_prompts(
        jsonl(tmp_path / "b.jsonl", *questions, questions[0] | {"answer": "x"}), encode, as_it_is, 99
    )
    assert not other_answer.notes


def test_memory_is_bounded_by_numbers_and_not_by_texts(tmp_path):
    # 4,000 questions of 4 kB are 16 MB of text and, as lists of ids, 130 MB of memory.
    rows = [{"question": f"{i} " + "x" * 4000, "answer": str(i)} for i in range(4000)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    tracemalloc.start()
    try:
        table = load_prompts(path, encode, in_table_1, 9999)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 2**20 and peak < 40 * 2**20
    assert table[3999].tokens == encode(table[3999].text)


def test_tables_of_one_folder_are_the_same_and_outlive_it(tmp_path):
    rows = [{"question": f"q{i % 3}", "answer": i, "tests": {"a": [i, 0.1]}, "language": "en"} for i in range(7)]
    folder = tmp_path / "folder"
    folder.mkdir()
    write_prompts(jsonl(tmp_path / "a.jsonl", *rows), folder, lambda texts: list(map(encode, texts)), in_table_1, 999)
    first, second = PromptTable(folder, in_table_1), PromptTable(folder, in_table_1)
    for file in folder.iterdir():
        file.unlink()
    assert list(first) == list(second) and first[-1] == second[6] and first[2:4] == [first[2], first[3]]
    assert [prompt.question for prompt in first] == read_questions(tmp_path / "a.jsonl")
    assert first.rewards == {"math"}
    with pytest.raises(IndexError):
        first[7]
