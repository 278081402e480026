"""DROP's F1 against AllenNLP's own cases and against every alignment there is."""

from __future__ import annotations

import gzip
import json
import random
from itertools import permutations

import pytest

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Reply
from r1engine.evaluation.benchmarks import benchmark_of
from r1engine.evaluation.drop import drop_scores, normal_text, span_scores


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        (["td"], ["td", "td"], 0, 0.5),
        (["the", "fat", "cat", "the fat", "fat cat", "the fat cat"], ["cat"], 0, 1 / 6),
        (["78"], ["78-yard"], 0, 2 / 3),
        (["yard"], ["36 yard td"], 0, 0),
        (["John Karman", "Joe Hardy"], ["Joe Karman", "John Hardy"], 0, 0.5),
        (["12.25"], ["12.25"], 1, 1),
        (["10"], ["10.0"], 1, 1),
        (["36 yards"], ["36 yard"], 0, 0.5),
        (["35 yards"], ["36 yards"], 0, 0),
        ([""], ["x"], 0, 0),
    ],
)
def test_f1_by_hand(answer, reference, exact, f1):
    assert span_scores(answer, reference) == (exact, pytest.approx(f1))


def test_text_is_normalized_as_there():
    assert normal_text("S.K. Singh") == "sk singh"
    assert normal_text("The 1,000 a-an men, 007") == "1000.0 men 7.0"
    assert normal_text("78-yard") == "78.0 yard"


def test_the_best_annotator_counts_and_several_spans_may_stand_in_one_line():
    assert drop_scores("Bears and Packers", [["Bears", "Packers"]]) == (1.0, 1.0)
    assert drop_scores("Rock, Paper", [["Rock, Paper"]]) == (1.0, 1.0)
    assert drop_scores("5", [["4"], ["5 yards"], ["6"]]) == (0.0, pytest.approx(2 / 3))


def test_the_alignment_is_the_best_of_all():
    draw = random.Random(0)
    words = "abcdef"
    for _ in range(60):
        spans = [[" ".join(draw.sample(words, 2)) for _ in range(draw.randint(1, 5))] for _ in range(2)]
        pairs = {(x, y): span_scores([x], [y])[1] for x in spans[0] for y in spans[1]}
        short, long = sorted(spans, key=len)
        turned = short is spans[1]
        best = max(
            sum(pairs[(y, x) if turned else (x, y)] for x, y in zip(short, chosen, strict=True))
            for chosen in permutations(long, len(short))
        )
        assert span_scores(*spans)[1] == pytest.approx(best / len(long))


PASSAGE = "Passage: In 2011 the town had 12 mills. Question: How many mills? Answer:"


def simple_evals_folder(folder):
    train = [
        {"context": f"Passage: {n} cows. Question: Cows? Answer:", "completion": str(n), "ref_text": str(n)}
        for n in range(9)
    ]
    dev = [{"context": PASSAGE, "completion": "12", "ref_text": "12|12 mills"}]
    for name, rows in (("train", train), ("dev", dev)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"drop_v0_{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def test_questions_of_simple_evals_files_with_three_examples(tmp_path):
    row = benchmark_of("drop", "")
    (item,) = row.load(BenchmarkSettings(file=simple_evals_folder(tmp_path)))
    asked = row.ask(item, 0)
    assert asked.startswith("You will be asked to read a passage and answer a question.")
    assert asked.count("\n---\n") == 4 and asked.count(" cows. ") == 3 and len(set(item.data["examples"])) == 3
    task = 'Think step by step, then write a line of the form "Answer: $ANSWER" at the end of your response.'
    assert asked.endswith(f"---\n{PASSAGE} \n\n{task}\n" + 20 * " ")
    replies = {"Answer: 12": 1.0, "Answer: 12 mills": 1.0, "Answer: 12\n\nPassage: The 2011 census": 1.0}
    for reply, score in (replies | {"Answer: 13": 0.0, "Answer: 12.25": 0.0, "12": 0.0}).items():
        mark = row.grade(item, 0, Reply(reply, "stop"))
        assert (mark.score, mark.verdict) == (score, "right" if score else "wrong")
    assert row.grade(item, 0, Reply("<think>Answer: 12", "length")).answer is None


def test_questions_of_the_owners_json_belong_to_their_passage(tmp_path):
    def pair(name, answer, *others):
        return {"query_id": name, "question": "How many?", "answer": answer, "validated_answers": list(others)}

    number, none = {"number": "3", "date": {}, "spans": []}, {"number": "", "date": {}, "spans": []}
    date = {"number": "", "date": {"day": "3", "month": "May", "year": ""}, "spans": []}
    spans = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Bears", "Packers"]}
    data = {"nfl_1": {"passage": "P.", "qa_pairs": [pair("a", number), pair("b", spans, number), pair("c", date)]}}
    for name in ("train", "dev"):
        (tmp_path / f"drop_dataset_{name}.json").write_text(json.dumps(data))
    row = benchmark_of("drop", "")
    items = row.load(BenchmarkSettings(file=tmp_path))
    assert [item.id for item in items] == ["a", "b", "c"] and {item.cluster for item in items} == {"nfl_1"}
    assert items[1].data["references"] == [["Bears", "Packers"], ["3"]] and items[2].question.answer == "3 May"
    shown = {example.rpartition("Answer: ")[2] for item in items for example in item.data["examples"]}
    assert shown == {"3", "Bears, Packers", "3 May"}  # an example shows all of an answer's spans
    data["nfl_1"]["qa_pairs"][:2] = [pair("a", none), pair("b", none, number)]
    (tmp_path / "drop_dataset_dev.json").write_text(json.dumps(data))
    items = row.load(BenchmarkSettings(file=tmp_path))
    assert [item.id for item in items] == ["b", "c"] and items[0].data["references"] == [["3"]]
    for answer in (None, {"text": "3"}):
        data["nfl_1"]["qa_pairs"][0] = pair("a", answer)
        (tmp_path / "drop_dataset_dev.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"dev\.json: nfl_1: a: an answer is .*, required one with number, spans"):
            row.load(BenchmarkSettings(file=tmp_path))


def test_a_number_that_is_0_is_an_answer(tmp_path):
    zero = {"number": 0, "date": {"day": "", "month": "", "year": ""}, "spans": []}
    pair = {"query_id": "a", "question": "How many?", "answer": zero, "validated_answers": []}
    data = {"p": {"passage": "None.", "qa_pairs": [pair] * 3}}
    for name in ("train", "dev"):
        (tmp_path / f"drop_dataset_{name}.json").write_text(json.dumps(data))
    items = benchmark_of("drop", "").load(BenchmarkSettings(file=tmp_path))
    assert [item.question.answer for item in items] == ["0"] * 3
