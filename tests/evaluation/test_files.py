"""The owners' files as files: every format, encodings, and what is refused with file and line."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from owners_files import lines, loaded, table

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmarks import BENCHMARKS


def test_all_files_of_a_folder_and_every_format_give_the_same(tmp_path):
    rows = [{"problem": f"p{n}", "answer": str(n)} for n in range(3)]
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    _, one = loaded("aime_2024", tmp_path / "a.jsonl")
    lines(tmp_path / "d.json", *rows)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("b.json", "c.parquet", "d.json", "e.jsonl.gz"):
        assert loaded("aime_2024", tmp_path / name)[1] == one
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")  # beside it on disks of Macs
    assert len(loaded("aime_2024", tmp_path)[1]) == 12


GPQA = ["Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID"]


def test_a_mark_of_byte_order_is_no_part_of_the_text(tmp_path):
    text = json.dumps({"problem": "a", "answer": "1"})
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert loaded("math_500", tmp_path / "x.jsonl")[1][0].question.text == "a"
    path = table(tmp_path / "gpqa_diamond.csv", GPQA, ["Which?", "r", "a", "b", "c", "rec1"], encoding="utf-8-sig")
    assert loaded("gpqa_diamond", path)[1][0].question.text == "Which?"


FIRST = b'{"problem": "a", "answer": "1"}\n'
HEAD = b"question,choices,answer,error_type,source,correct_answer,potential_reason\n"
REFUSED = [
    ("math_500", "x.jsonl", FIRST + b'{"problem": "b", "answer": null}\n', "x.jsonl:2: answer is null"),
    ("math_500", "x.jsonl", FIRST + b'\n{"problem": "b"}\n', "x.jsonl:3: answer is missing"),
    ("math_500", "x.jsonl", b'{"problem": "a", "answer": ["1"]}', "x.jsonl:1: answer is ['1'], required a text or a"),
    ("math_500", "x.jsonl", b'{"problem": " ", "answer": "1"}', "x.jsonl:1: problem is blank"),
    ("math_500", "x.jsonl", b'{"problem": "a", "answer": "1"', "x.jsonl:1: not valid JSON"),
    ("math_500", "x.jsonl", b"[1]", "x.jsonl:1: found list, required an object"),
    ("math_500", "x.json", b'{\n"problem": "a"}', "x.json:1: not valid JSON"),
    ("math_500", "x.jsonl.gz", gzip.compress(FIRST)[:-9], "x.jsonl.gz: found a file that cannot be read"),
    ("math_500", "x.jsonl.gz", FIRST, "x.jsonl.gz: found a file that cannot be read"),
    ("math_500", "x.jsonl", b"\n", "x.jsonl: found no rows"),
    (
        "math_500",
        "x.jsonl",
        FIRST + b"\xd5",
        "x.jsonl:2: found the byte 0xd5, which is no UTF-8; save the file as UTF-8",
    ),
    ("math_500", "x.jsonl", b"\xff\xfe{\x00", "x.jsonl:1: found UTF-16, required UTF-8"),
    ("math_500", "x.jsonl", b'{"prompt": "a"}', "found the fields prompt, required problem|question"),
    ("math_500", "x.parquet", b"PAR1", "x.parquet: found a file that cannot be read"),
    ("aime_2024", "x.jsonl", b'{"problem": "a", "answer": "1/2"}', "required a whole number from 0 to 999"),
    ("gsm8k", "x.jsonl", b'{"question": "a", "answer": "18"}', "required #### and a number"),
    ("mmlu", "law_test.csv", b"q,a,b,c,d,A\nq,a,b\n", "law_test.csv:2: found 3 columns, required 6"),
    ("mmlu", "law_test.csv", b"q,a,b,c,d,E\n", "law_test.csv:1: answer is 'E', required a letter from A to D"),
    ("mmlu", "data.zip", b"PK", "data.zip: found a file that cannot be read"),
    ("gpqa_diamond", "gpqa.csv", b"Question,A,B\nq,a,b\n", "required Question, Correct Answer, Incorrect Answer 1"),
    ("mmlu_redux", "x.csv", HEAD + b"q,nonsense,0,ok,,,\n", "choices is 'nonsense', required a list"),
    ("mmlu_redux", "x.csv", HEAD + b"q,\"['a','b']\",2,ok,,,\n", "answer is '2', required a number from 0 to 1"),
    ("mmlu_redux", "x.csv", HEAD + b"q,\"['a','b']\",1,odd,,,\n", "error_type is 'odd'"),
    (
        "cluewsc",
        "x.jsonl",
        b'{"target": {}, "label": "maybe", "text": "a"}',
        "label is 'maybe', required true or false",
    ),
    ("drop", "x.jsonl", b"{}\n", "found no folder, required one with drop_v0_train.jsonl.gz"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path, name, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError) as refused:
        loaded(name, tmp_path / file)
    assert message in str(refused.value)


@pytest.mark.parametrize("row", BENCHMARKS, ids=lambda row: row.name)
def test_a_file_that_is_not_there_is_refused_by_name(tmp_path, row):
    with pytest.raises(ValueError, match=r"no such file|found no folder"):
        row.load(BenchmarkSettings(file=tmp_path / "missing.jsonl"))
    assert row.wanted and (row.licence or row.name == "questions")
