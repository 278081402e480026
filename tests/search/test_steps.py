"""Steps: one rule over tokens, the same when a completion is drawn and when it is read."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from r1engine.hf.tokenizer import PromptTokenizer
from r1engine.search.steps import StepMarks

ALPHABET = "ab.\n ;<>/step\u00e9"
TEXTS = ["a\n\nb", "b.\n\na", "</step>", "; a", "step\n\n\n\n", " \u00e9;"] * 20
END = "<|end|>"


def tokenizer(kind: str) -> PromptTokenizer:
    """Small ones of the rules that models have: Qwen's byte-level BPE, Llama's with spaces as a letter, and bytes."""
    made = Tokenizer(models.BPE(byte_fallback=kind == "metaspace"))
    if kind == "metaspace":
        lines = pre_tokenizers.Split(Regex(r"\n"), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="first")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        initial = [*ALPHABET, "\u2581"]
    else:
        split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+|[^\s]+"), "isolated")
        levels = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence([split, *levels] if kind == "byte_level" else levels)
        made.decoder = decoders.ByteLevel()
        initial = pre_tokenizers.ByteLevel.alphabet()
    size = 300 if kind != "bytes" else 257
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=sorted(initial), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return PromptTokenizer(made)


@pytest.fixture(scope="module", params=["byte_level", "metaspace", "bytes"])
def words(request):
    return tokenizer(request.param)


def steps_of(words, text, marks=("\n\n",), stop=frozenset(), limit=None):
    tokens = words.encode(text).ids
    ends = StepMarks(words, marks, limit).ends(tokens, stop)
    return [words.decode(tokens[a:b]).strip(" ") for a, b in zip([0, *ends], ends, strict=False)]


def test_steps_end_with_their_marks_and_blank_ones_are_none(words):
    found = steps_of(words, "a\n\nb\n\n\n\na")
    assert len(found) == 3 and "".join(found) == "a\n\nb\n\n\n\na"
    assert [step.strip() for step in found] == ["a", "b", "a"]
    assert len(steps_of(words, "a\n\nb\n\n \n")) == 2  # blanks at the end belong to the step before
    assert steps_of(words, "\n\n  ") and steps_of(words, "") == []


def test_marks_may_be_inside_a_token_or_go_over_several(words):
    assert [step.strip() for step in steps_of(words, "b.\n\nb.\n\na")] == ["b.", "b.", "a"]
    assert steps_of(words, "a</step>b</step>a", ["</step>"]) == ["a</step>", "b</step>", "a"]
    assert steps_of(words, "a;b</step>a", [";", "</step>"]) == ["a;", "b</step>", "a"]
    marks = StepMarks(words, ["</step>"])
    assert all("</step>" in words.decode([token]) for token in marks.token_ids)
    if words.encode("a</step>").ids[-1] not in marks.token_ids:  # spelled by bytes: found nevertheless
        assert marks.is_end(words.encode("a</step>").ids) and not marks.is_end(words.encode("a</step").ids)


def test_what_is_behind_a_mark_in_its_token_belongs_to_the_step_that_ends():
    made = Tokenizer(models.WordLevel({"a": 0, "b.\n\n  c": 1, "d": 2, END: 3}, unk_token="a"))
    made.decoder = decoders.Fuse()
    marks = StepMarks(PromptTokenizer(made), ["\n\n"])
    assert marks.token_ids == {1}
    assert marks.ends([0, 1, 2], frozenset({3})) == [2, 3]
    assert marks.ends([0, 1, 2, 3], frozenset({3})) == [2, 3]  # the stop token belongs to no step
    assert marks.ends([0, 1, 3], frozenset({3})) == [2]
    assert marks.ends([3], frozenset({3})) == []


def test_a_long_step_ends_without_a_mark(words):
    tokens = words.encode("ababab;ab").ids
    ends = StepMarks(words, [";"], 2).ends(tokens, frozenset())
    assert ends[:2] == [2, 4] and max(b - a for a, b in zip([0, *ends], ends, strict=False)) <= 2
    long = [*words.encode("a").ids] * 100 + words.encode(";").ids
    assert StepMarks(words, [";"]).ends(long, frozenset()) == [len(long)]
    assert StepMarks(words, [";"], 40).ends(long, frozenset()) == [40, 80, len(long)]


def test_steps_are_all_tokens_and_those_that_a_generator_would_stop_at(words):
    rng, marks = random.Random(1), StepMarks(words, ["\n\n", ";", "</step>"], 9)
    for _ in range(400):
        text = "".join(rng.choice([*ALPHABET, "\n\n", "</step>", ";"]) for _ in range(rng.randint(0, 40)))
        tokens = words.encode(text).ids
        ends = marks.ends(tokens, frozenset())
        assert ends == sorted(set(ends)) and (ends[-1] if ends else 0) == len(tokens)
        # One token after another, as they are drawn.
        drawn, step = [], []
        for at, token in enumerate(tokens, 1):
            step.append(token)
            if marks.is_end(step):
                drawn.append(at)
                step = []
        assert drawn[: len(ends) - 1] == ends[:-1]


@pytest.mark.parametrize(("texts", "limit", "message"), [
    ([], None, r"steps\.marks: found \[\]"), (["a", ""], None, "none of them empty"),
    ([";"], 0, r"steps\.max_step_tokens: found 0"),
])  # fmt: skip
def test_marks_that_are_none_are_refused(texts, limit, message):
    with pytest.raises(ValueError, match=message):
        StepMarks(tokenizer("bytes"), texts, limit)
