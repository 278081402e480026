"""Prompts: the template, the data files, and a stream that goes on where it stopped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from shown import as_it_is, in_table_1

from r1engine.batch import Prompt
from r1engine.config.data_files import REQUIRED
from r1engine.data.chat import render
from r1engine.data.prompts import load_prompts
from r1engine.data.question import Question
from r1engine.data.questions import read_questions
from r1engine.data.stream import MixedStream, PromptStream, SharedFile, file_digest


@pytest.fixture
def write(tmp_path):
    def to_file(*rows: dict | str, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return to_file


def encode(text: str) -> list[int]:
    return list(text.encode())


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_questions(path)
    return str(caught.value).replace(str(path), path.name)


# ---- template --------------------------------------------------------------------------------------------------


def test_r1_zero_template_is_table_1_word_for_word():
    assert render("What is 1+1?", "r1_zero") == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: What is 1+1?. Assistant:"
    )


def test_braces_of_a_question_stay():
    assert "User: \\frac{1}{2} {question} {0}. Assistant:" in render("\\frac{1}{2} {question} {0}", "r1_zero")


def test_template_none_is_the_question_itself():
    assert render(" q {x} ", "none") == " q {x} "


# ---- data files ------------------------------------------------------------------------------------------------


def test_jsonl_fields_become_prompts(write):
    path = write(
        {"question": "a", "answer": 2, "id": 99},
        "",
        {"question": "b", "answer": "x", "reward": "exact", "tests": [1], "language": "zh", "other": [1]},
    )
    assert list(load_prompts(path, encode, as_it_is, 5)) == [
        Prompt(0, [97], "a", Question("a", "2", "math")),
        Prompt(1, [98], "b", Question("b", "x", "exact", [1], "zh")),
    ]


def test_row_of_a_question_is_read_as_the_same_question(write):
    rows = [
        {"question": "a", "answer": "2"},
        {"question": "b", "reward": "code", "tests": [{"stdout": "1"}], "language": "zh"},
    ]
    questions = read_questions(write(*rows))
    assert read_questions(write(*(question.as_row() for question in questions))) == questions


def test_parquet_gives_the_same_prompts_as_jsonl(write, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"q{n}", "answer": str(n), "reward": None if n % 2 else "exact", "id": n} for n in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    lines = [{key: value for key, value in row.items() if value is not None} for row in rows]
    same = load_prompts(write(*lines), encode, in_table_1, 1000)
    assert list(load_prompts(tmp_path / "a.parquet", encode, in_table_1, 1000)) == list(same)


def test_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / "no.jsonl") == "no.jsonl: found no such file, required a data file"


def test_unknown_extension_is_refused(write):
    assert refusal(write(name="train.csv")) == "train.csv: found the extension '.csv', required " + REQUIRED


@pytest.mark.parametrize("rows", [[], ["", "  "]])
def test_empty_file_is_refused(write, rows):
    assert refusal(write(*rows)) == "train.jsonl: found no rows, required at least one"


def test_bad_json_names_the_line(write):
    found = refusal(write({"question": "a", "answer": 1}, "", '{"question": "b"'))
    assert found == "train.jsonl:3: not valid JSON: Expecting ',' delimiter at character 18 of the line"


def test_bytes_that_are_no_text_name_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"question": "a", "answer": "b"}\n{"question": "\xff"}\n')
    assert refusal(tmp_path / "a.jsonl") == "a.jsonl:2: found the byte 0xff, which is no UTF-8; save the file as UTF-8"
    (tmp_path / "a.jsonl").write_bytes('{"question": "a", "answer": "b"}\n'.encode("utf-16"))
    assert refusal(tmp_path / "a.jsonl") == "a.jsonl:1: found UTF-16, required UTF-8; save it again as UTF-8"
    (tmp_path / "a.json").write_bytes(b'[\n{"question": "caf\xe9", "answer": "b"}]')
    assert refusal(tmp_path / "a.json") == "a.json:2: found the byte 0xe9, which is no UTF-8; save the file as UTF-8"


def test_a_mark_of_byte_order_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "b"}\n')
    assert [question.text for question in read_questions(tmp_path / "a.jsonl")] == ["a"]


def test_broken_parquet_is_refused(write):
    assert refusal(write("text", name="a.parquet")).startswith("a.parquet: not a Parquet file: ")


def test_parquet_null_is_a_missing_field(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "a", "answer": "1"}, {"question": None, "answer": "2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == "a.parquet: row 2: question is null, required is a value"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 1}, "found no field 'question', only ['answer']"),
        ({"question": None, "answer": 1}, "question is null, required is a value"),
        (
            {"question": "a", "Answer": 1},
            "found no `answer`, required by reward 'math'; the fields there are ['Answer', 'question']",
        ),
        ("[1]", "found list, required an object with `question` and `answer`"),
        ({"question": 3, "answer": 1}, "question is 3, required a text that is not empty"),
        ({"question": " ", "answer": 1}, "question is ' ', required a text that is not empty"),
        (
            {"question": "a", "answer": None},
            "found no `answer`, required by reward 'math'; answer is null",
        ),
        ({"question": "a", "answer": True}, "answer is True, required a number or a text"),
        ({"question": "a", "answer": [1]}, "answer is [1], required a number or a text"),
        ({"question": "a", "answer": ""}, "found no `answer`, required by reward 'math'"),
        ('{"question": "a", "answer": NaN}', "answer is nan, required a finite number or a text"),
        ({"question": "a", "answer": 1, "reward": 2}, "reward is 2, required a text"),
        (
            {"question": "a", "answer": 1, "reward": "mathz"},
            "found reward 'mathz', required one of math, choice, exact, format, language, code, gym, judge, "
            "preference, functions",
        ),
    ],
)
def test_bad_field_names_the_line(write, row, message):
    assert refusal(write({"question": "a", "answer": 1}, row)) == f"train.jsonl:2: {message}"


def test_unknown_language_names_the_line_and_the_known_ones(write):
    found = refusal(write({"question": "a", "answer": 1, "language": "xx"}))
    assert found.startswith("train.jsonl:1: found language 'xx', required one of ar, be, bg, bn, ca, cs, da, de, ")


def test_prompt_without_tokens_is_refused(write):
    with pytest.raises(ValueError, match="has no tokens"):
        load_prompts(write({"question": "a", "answer": 1}), lambda _: [], as_it_is, 3)


def test_digest_changes_with_one_byte(write):
    first = file_digest(write("a"))
    assert first == "87428fc522803d31065e7bce3cf03fe475096631e5e07bbd7a0fde60c4cf25c7"  # sha256sum of "a\n"
    assert file_digest(write("b")) != first


# ---- stream ----------------------------------------------------------------------------------------------------


def stream(count: int, *, seed: int = 0, digest: str = "d") -> PromptStream:
    return PromptStream([Prompt(n, [n], "", Question("")) for n in range(count)], seed=seed, digest=digest)


def ids(prompts: list[Prompt]) -> list[int]:
    return [prompt.id for prompt in prompts]


def test_each_epoch_has_every_prompt_once_in_another_order():
    prompts = stream(50)
    epochs = [ids(prompts.next(50)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(50))}) == 4


def test_order_depends_on_the_seed_and_on_nothing_else():
    random.seed(1)
    first = ids(stream(20).next(40))
    random.seed(2)
    assert ids(stream(20).next(40)) == first
    assert ids(stream(20, seed=1).next(40)) != first
    assert random.Random(2).random() == random.random()  # the global generator was not drawn from


def test_more_than_an_epoch_at_once_runs_on():
    pieces, whole = stream(3), stream(3)
    assert [i for n in (2, 5, 0, 4) for i in ids(pieces.next(n))] == ids(whole.next(11))


@pytest.mark.parametrize("consumed", [0, 3, 4, 5, 41])  # start, inside, both sides of an epoch's end, later
def test_restored_stream_goes_on_exactly(consumed):
    original, resumed = stream(5), stream(5)
    original.next(consumed)
    state = json.loads(json.dumps(original.state()))
    resumed.next(2)
    resumed.restore(state)
    assert ids(resumed.next(12)) == ids(original.next(12))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (stream(6), "the number of prompts changed since the checkpoint: it has 6, this run 5"),
        (stream(5, digest="e"), r"the data file \(sha256\) changed since the checkpoint: it has e, this run d"),
        (stream(5, seed=9), "the seed changed since the checkpoint: it has 9, this run 0"),
    ],
)
def test_state_of_another_run_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        stream(5).restore(other.state())


def test_state_that_names_no_place_is_refused():
    prompts = stream(5)
    with pytest.raises(ValueError, match=r"found epoch 0, position 5, required epoch >= 0 and position in 0\.\.4"):
        prompts.restore({**prompts.state(), "position": 5})
    with pytest.raises(ValueError, match=r"found a state with keys \['epoch'\]"):
        prompts.restore({"epoch": 0})


def test_stream_of_nothing_is_refused():
    with pytest.raises(ValueError, match="found no prompts"):
        stream(0)


def mixed(*shares: tuple[float, int], seed: int = 3) -> MixedStream:
    """Files of 40, 5 and 7 prompts."""
    others = [SharedFile(stream(5 + 2 * i, seed=seed), share, step) for i, (share, step) in enumerate(shares)]
    return MixedStream(stream(40, seed=seed), others, seed=seed)


def sources(prompts: list[Prompt]) -> list[int]:
    return [prompt.id // 10**9 for prompt in prompts]


def test_a_share_begins_at_its_step_and_is_exact_over_several_rollouts():
    prompts = mixed((0.3, 10), (0.25, 0))
    assert sources(prompts.next(8, 0)).count(2) == 2 and 1 not in sources(prompts.next(8, 9))
    drawn = [sources(prompts.next(8, 10)) for _ in range(10)]
    counts = [rollout.count(1) for rollout in drawn]
    assert sum(counts) == 24 and set(counts) == {2, 3}  # 0.3 of 80
    assert all(rollout.count(2) == 2 for rollout in drawn)
    assert len({tuple(rollout) for rollout in drawn}) > 5  # not in the same places: ranks have places


def test_a_mixture_resumes_exactly_and_knows_its_prompts():
    whole = mixed((0.3, 2))
    drawn = [[prompt.id for prompt in whole.next(7, step)] for step in range(12)]
    for cut in (1, 3, 8):
        first, second = mixed((0.3, 2)), mixed((0.3, 2))
        for step in range(cut):
            first.next(7, step)
        second.restore(json.loads(json.dumps(first.state())))
        assert [[prompt.id for prompt in second.next(7, step)] for step in range(cut, 12)] == drawn[cut:]
    assert all(whole.of_id(number).id == number for rollout in drawn for number in rollout)
    assert mixed().state() == stream(40, seed=3).state()  # of a checkpoint before there were shares
    with pytest.raises(ValueError, match=r"data.more: the checkpoint has 1 more files, this run 2"):
        mixed((0.3, 2), (0.1, 0)).restore(whole.state())


def test_all_places_may_be_a_share():
    assert sources(mixed((1.0, 0)).next(6, 0)) == [1] * 6
    assert sources(mixed((0.5, 0), (0.5, 0)).next(6, 0)).count(0) == 0
