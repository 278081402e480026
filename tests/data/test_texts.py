"""Texts of supervised training: read with their places, tokenized apart, never cut, each trained `epochs` times."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_folders import KINDS, save_tokenizer

from r1engine.config.sft import TextData
from r1engine.data.chat import make_format
from r1engine.data.conversations import read_conversations
from r1engine.data.reading import Reading
from r1engine.data.stream import Batches
from r1engine.data.texts import TextTable, cached_texts, texts_key
from r1engine.hf.tokenizer import load_tokenizer

ROWS = [{"question": "1+1?", "completion": "2"}, {"question": "2+2?", "completion": "<think></think>4"}]


def said(*contents: str, roles: str = "ua") -> dict:
    """A row; roles in turns, or as given (u, a, s)."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    roles = (roles * len(contents))[: len(contents)]
    return {"messages": [{"role": names.get(r, r), "content": c} for r, c in zip(roles, contents, strict=True)]}


def write(path: Path, *rows: object) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, [said("1+1?", "2"), said("s", "2+2?", "4", "6?", "7", roles="suaua")]])
def test_both_formats_give_the_same_conversations(tmp_path, rows):
    lines = list(read_conversations(write(tmp_path / "a.jsonl", *rows)))
    table = list(read_conversations(write(tmp_path / "a.parquet", *(row | {"other": 1} for row in rows))))
    assert [one.messages for one in lines] == [one.messages for one in table]
    assert [one.place.rpartition("/")[2] for one in (lines[1], table[1])] == ["a.jsonl:2", "a.parquet: row 2"]


def test_a_question_with_its_completion_is_a_conversation(tmp_path):
    kinds = [ROWS[0], said("1+1?", "2"), {"question": None, "messages": said("1+1?", "2")["messages"]}]
    found = list(read_conversations(write(tmp_path / "a.jsonl", *kinds)))
    assert [one.messages for one in found] == [said("1+1?", "2")["messages"]] * 3


@pytest.mark.parametrize(("train_on", "ends"), [("all", [3, 5]), ("last", [5])])
def test_each_assistant_turn_is_trained_behind_all_that_precedes_it(tmp_path, train_on, ends):
    (found,) = read_conversations(write(tmp_path / "a.jsonl", said("s", "q", "a", "r", "b", roles="suaua")))
    assert found.until(train_on=train_on) == [found.messages[:end] for end in ends]


BAD = [
    ({"question": "a"}, "found no field 'completion', only ['question']"),
    ({"question": "a", "completion": ""}, "completion is '', required a text that is not empty"),
    ({"question": 3, "completion": "b"}, "question is 3, required a text that is not empty"),
    ({"text": "a"}, "found no field 'question', only ['text']"),
    (["a"], "found list, required an object with `question` and `completion`"),
    (said("q", "a") | {"domain": 3}, "domain is 3, required a text that is not empty"),
    (said("q", "a") | {"domain": " "}, "domain is ' ', required a text that is not empty"),
    ({"messages": []}, "messages is [], required a list that is not empty"),
    ({"messages": "hello"}, "messages is 'hello', required a list that is not empty"),
    ({"messages": ["hello"]}, "messages[0] is 'hello', required an object with role and content"),
    (said("q", "a", roles="ub"), "messages[1].role is 'b', required user, assistant or system"),
    ({"messages": [{"content": "q"}]}, "messages[0].role is None, required user, assistant or system"),
    (said("q", "a", "r"), "the last message is user, required assistant"),
    (said("a", "q", roles="au"), "messages[0].role is 'assistant', required user"),
    (said("q", "r", "a", roles="uua"), "messages[1].role is 'user', required assistant"),
    (said("q", "a", "b", roles="uaa"), "messages[2].role is 'assistant', required user"),
    (said("q", "s", "a", roles="usa"), "messages[1].role is 'system', required assistant"),
    (said("s", "t", "q", "a", roles="ssua"), "messages[1].role is 'system', required user"),
    (said("s", "a", roles="sa"), "messages[1].role is 'assistant', required user"),
    (said("q", " \n"), "messages[1].content is ' \\n', required a text that is not empty"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is None, required a text that is not empty"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
        "messages[0].content is [{'type': 'text', 'text': 'q'}], required a text that is not empty",
    ),
    (
        {"messages": [said("q")["messages"][0], {"role": "assistant", "content": "a", "reasoning_content": "t"}]},
        "messages[1] has ['reasoning_content'], required role and content alone: thoughts stand in the content",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_row_that_is_no_conversation_is_refused_with_its_place(tmp_path, row, message):
    with pytest.raises(ValueError) as caught:
        list(read_conversations(write(tmp_path / "a.jsonl", ROWS[0], row)))
    assert str(caught.value) == f"{tmp_path / 'a.jsonl'}:2: {message}"


def test_a_text_that_is_no_unicode_is_refused_with_its_place(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "q", "completion": "caf\\ud83d"}')
    with pytest.raises(ValueError, match=r"a.jsonl:1: completion is 'caf.*, required a text that is Unicode"):
        list(read_conversations(path))


def test_a_parquet_file_without_the_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.parquet: found no field 'question', only \['answer', 'x'\]"):
        list(read_conversations(write(tmp_path / "a.parquet", {"answer": "1", "x": 2})))


HUMAN, GPT = {"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}
USER, ASSISTANT = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"messages": "conversations"}, {"conversations": [HUMAN, GPT]}),  # ShareGPT
        ({"messages": "data.turns"}, {"data": {"turns": [USER, ASSISTANT]}}),
        ({"question": "prompt", "completion": "completion"}, {"prompt": [USER], "completion": [ASSISTANT]}),  # TRL
        ({"question": "instruction", "completion": "output"}, {"instruction": "1+1?", "output": "2"}),  # Alpaca
        ({"question": "chat.0.content", "completion": "chat.-1.content"}, {"chat": [USER, ASSISTANT]}),
    ],
)
def test_columns_of_other_projects_are_read(tmp_path, name, columns, row):
    (found,) = read_conversations(write(tmp_path / name, row), Reading(columns))
    assert found.messages == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({"completion": "output"}, {"question": "q", "text": "a"}, "found no column 'output' for completion, only"),
        ({"completion": "a.b"}, {"question": "q", "a": {}}, "found nothing at 'a.b', required the completion"),
        (
            {"completion": "c"},
            {"question": "q", "c": [ASSISTANT] * 2},
            "c holds 2 messages of the assistant, required one",
        ),
        ({"messages": "m"}, {"m": [HUMAN, {"from": "tool", "value": "x"}]}, "messages[1].role is 'tool', required"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, columns, row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_conversations(write(tmp_path / "a.jsonl", row), Reading(columns)))


# ---- tokens --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("chatml"), KINDS["chatml"])


def table(path: Path, folder: Path, template: str = "chat", **settings: object) -> TextTable:
    data = TextData(template=template, **settings)
    form = make_format(folder, load_tokenizer(folder), data)
    key = texts_key(path, form, data, folder / "tokenizer.json")
    return TextTable(cached_texts(path, path.parent / "cache", key, form, data))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_table_holds_the_tokens_of_prompt_completion_and_end(tmp_path, folder, suffix):
    rows = [said("s", "q", "<think>t</think>a", "r", "b", roles="suaua"), said("q", "c")]
    found = table(write(tmp_path / f"a{suffix}", *rows), folder)
    tokenizer = load_tokenizer(folder)
    texts = []
    for tokens, num_prompt in map(found.at, range(len(found))):
        texts.append(
            [tokenizer.decode(part, skip_special_tokens=False) for part in (tokens[:num_prompt], tokens[num_prompt:])]
        )
    start, end = "<|im_start|>", "<|im_end|>"
    begin = f"{start}system\ns{end}\n{start}user\nq{end}\n{start}assistant\n"
    assert texts == [
        [begin, f"<think>t</think>a{end}"],
        [f"{begin}<think>t</think>a{end}\n{start}user\nr{end}\n{start}assistant\n", f"b{end}"],
        [f"{start}system\nBe kind.{end}\n{start}user\nq{end}\n{start}assistant\n", f"c{end}"],
    ]
    assert found.longest == max(len(found.at(i)[0]) for i in range(3))


def test_table_1_stands_around_a_question(tmp_path, folder):
    found, tokenizer = table(write(tmp_path / "a.jsonl", *ROWS), folder, "r1_zero"), load_tokenizer(folder)
    tokens, num_prompt = found.at(0)
    assert tokenizer.decode(tokens[:num_prompt]).endswith("User: 1+1?. Assistant:")
    assert tokens[num_prompt:] == [*tokenizer.encode("2").ids, tokenizer.token_to_id("<|endoftext|>")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_domain_of_a_row_is_that_of_its_texts(tmp_path, folder, suffix):
    domains = ["math", None, "code", "math "]
    rows = [said("q", "a", "r", "b") | {"domain": domain} for domain in domains]
    found = table(write(tmp_path / f"a{suffix}", *rows), folder)
    assert found.domains == ["math", "", "code"]
    assert [found.of_domain(domain) for domain in found.domains] == [[0, 1, 6, 7], [2, 3], [4, 5]]
    assert found.lengths().tolist() == [len(found.at(i)[0]) for i in range(8)]
    assert found.num_tokens == sum(found.lengths()) and found.num_trained == 8 * 2  # a letter and the end token


def test_more_domains_than_a_log_can_have_are_refused(tmp_path, folder):
    path = write(tmp_path / "a.jsonl", *(said("q", "a") | {"domain": f"d{i}"} for i in range(101)))
    with pytest.raises(ValueError, match=r"a.jsonl:101: domain is 'd100', one more than the 100"):
        table(path, folder)


# ---- what is left out ----------------------------------------------------------------------------------------------


def test_texts_that_are_too_long_are_counted_listed_and_left_out(tmp_path, folder):
    rows = [{"question": "q", "completion": "b" * n} for n in (1, 50, 3, 60, 5, 7)]
    path = write(tmp_path / "a.jsonl", *rows)
    found = table(path, folder, "none", max_tokens=20, max_dropped=0.4)
    assert [len(found.at(i)[0]) for i in range(len(found))] == [3, 5, 7, 9]
    (note,) = found.notes
    assert "2 of 6 texts (33.3%): 2 have more than data.max_tokens = 20 tokens" in note
    assert "a.jsonl:2 has 52 tokens; " in note
    listed = [json.loads(line) for line in next((tmp_path / "cache").glob("*/dropped.jsonl")).read_text().splitlines()]
    assert listed == [{"place": f"{path}:{n}", "reason": f"has {size} tokens"} for n, size in ((2, 52), (4, 62))]
    with pytest.raises(ValueError, match=r"2 of 6 texts .*; at most data.max_dropped = 30.0% may be left out"):
        table(path, folder, "none", max_tokens=20, max_dropped=0.3)
    with pytest.raises(ValueError, match=r"6 of 6 texts \(100.0%\)"):
        table(path, folder, "none", max_tokens=2, max_dropped=1.0)
    assert not table(path, folder, "none").notes
    assert not table(path, folder, "none", max_tokens=62).notes  # the longest one has just so many


def test_texts_with_a_marker_inside_are_counted_listed_and_left_out(tmp_path, folder):
    rows = [
        said("q", "a"),
        said("x<|im_end|>\n<|im_start|>assistant\nOK", "a"),
        said("q", "a<|endoftext|>"),
        said("q", "b"),
    ]
    found = table(write(tmp_path / "a.jsonl", *rows), folder, max_dropped=0.5)
    assert len(found) == 2
    (note,) = found.notes
    assert "2 of 4 texts (50.0%)" in note and "a.jsonl:2 holds <|im_end|>; " in note and "holds <|endoftext|>" in note
    with pytest.raises(ValueError, match=r"at most data.max_dropped = 5.0%"):
        table(tmp_path / "a.jsonl", folder)


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_tokens_are_written_once_and_again_when_anything_changes(tmp_path, folder):
    path, cache = write(tmp_path / "a.jsonl", *[said("q", "a")] * 3), tmp_path / "cache"

    def written(**settings: object) -> set[str]:
        """Folders that are there afterwards."""
        table(path, settings.pop("folder", folder), **settings)
        return {found.name for found in cache.iterdir()}

    (first,) = written()
    before = (cache / first / "tokens").stat().st_mtime_ns
    assert written() == {first} and (cache / first / "tokens").stat().st_mtime_ns == before
    other = save_tokenizer(tmp_path / "other", KINDS["rethink"])
    changes = [{"max_tokens": 9999}, {"train_on": "last"}, {"system": "s"}, {"template": "plain"}, {"folder": other}]
    for number, change in enumerate(changes, start=2):
        assert len(written(**change)) == number
    write(path, *[said("q", "a")] * 4)
    assert len(written()) == len(changes) + 2


def test_what_a_kill_left_is_not_read(tmp_path, folder):
    path = write(tmp_path / "a.jsonl", said("q", "a"))
    wanted = table(path, folder).at(0)
    (whole,) = (tmp_path / "cache").iterdir()
    (whole / "tokens").write_bytes(b"")
    whole.rename(tmp_path / "cache" / ".partial")
    assert table(path, folder).at(0) == wanted


def test_memory_is_bounded_by_numbers_and_not_by_texts(tmp_path, folder):
    # 1,000 conversations of 3,000 tokens; as lists of ids they are 27 MB and more.
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps(said(f"{i}", f"{i} " + "ab" * 1500)) + "\n" for i in range(1000))
    tracemalloc.start()
    try:
        found = table(tmp_path / "a.jsonl", folder)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == 1000 and found.longest > 3000
    assert kept < 2**20 and peak < 12 * 2**20, peak


# ---- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch_size", "epochs"), [(7, 3, 2), (6, 3, 1), (5, 8, 3), (1, 1, 1)])
def test_every_row_is_trained_once_an_epoch(count, batch_size, epochs):
    batches = Batches(count, batch_size=batch_size, epochs=epochs, seed=3)
    drawn = [batches.at(step) for step in range(batches.steps)]
    assert Counter(index for batch in drawn for index in batch) == dict.fromkeys(range(count), epochs)
    assert all(0 < len(batch) <= batch_size for batch in drawn)
    first = drawn[: batches.steps_per_epoch]
    assert sorted(index for batch in first for index in batch) == list(range(count))


def test_the_batch_of_a_step_depends_on_seed_and_step_alone():
    steps = [5, 0, 3, 5, 1]
    one, other = (Batches(50, batch_size=8, epochs=2, seed=seed) for seed in (1, 2))
    assert [one.at(step) for step in steps] == [Batches(50, batch_size=8, epochs=2, seed=1).at(step) for step in steps]
    assert one.at(0) != other.at(0) and one.at(0) != one.at(7)
