"""Texts for supervised training: read with their places, tokenized apart, every one trained `epochs` times."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1engine.data.stream import Batches
from r1engine.data.texts import Text, TokenizedTexts, read_texts
from r1engine.hf.tokenizer import PromptTokenizer

ROWS = [{"question": "1+1?", "completion": "2"}, {"question": "2+2?", "completion": "<think></think>4"}]


@pytest.fixture
def write(tmp_path):
    def to_file(*rows: object) -> Path:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to_file


def test_both_formats_give_the_same_texts(write, tmp_path):
    pq.write_table(pa.Table.from_pylist([row | {"other": 1} for row in ROWS]), tmp_path / "texts.parquet")
    lines, table = read_texts(write(*ROWS), "none"), read_texts(tmp_path / "texts.parquet", "none")
    assert [(t.prompt, t.completion) for t in lines] == [("1+1?", "2"), ("2+2?", "<think></think>4")]
    assert [(t.prompt, t.completion) for t in table] == [(t.prompt, t.completion) for t in lines]
    assert [t.place.rpartition("texts")[2] for t in (lines[1], table[1])] == [".jsonl:2", ".parquet: row 2"]


def test_a_template_stands_around_the_question(write):
    assert read_texts(write(*ROWS), "r1_zero")[0].prompt.endswith("User: 1+1?. Assistant:")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "found no field 'completion', only ['question']"),
        ({"question": "a", "completion": ""}, "completion is '', required a text that is not empty"),
        ({"question": 3, "completion": "b"}, "question is 3, required a text that is not empty"),
        (["a"], "found list, required an object with `question` and `completion`"),
    ],
)
def test_a_row_that_is_no_text_is_refused_with_its_place(write, row, message):
    with pytest.raises(ValueError) as caught:
        read_texts(write(ROWS[0], row), "none")
    assert str(caught.value).endswith(f"texts.jsonl:2: {message}")


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    """One token a word; a BOS (0) is put in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "a": 1, "b": 2, "</s>": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="b"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PromptTokenizer(made)


def test_tokens_are_those_of_prompt_completion_and_end(tokenizer):
    texts = TokenizedTexts([Text("a a", "b", ""), Text("b", "a b a", "")], tokenizer, end_token=3, max_tokens=6)
    assert len(texts) == 2
    assert texts.at(0) == ([0, 1, 1, 2, 3], 3)
    assert texts.at(1) == ([0, 2, 1, 2, 1, 3], 2)


def test_texts_that_are_too_long_are_counted_and_named(tokenizer):
    texts = [Text("a", "b " * n, f"f:{n}") for n in (1, 5, 9)]
    message = r"data: 2 of 3 texts are too long \(f:5 has 8; f:9 has 12 tokens\), required at most data.max_tokens = 7"
    with pytest.raises(ValueError, match=message):
        TokenizedTexts(texts, tokenizer, end_token=3, max_tokens=7)


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
