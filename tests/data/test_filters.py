"""Each filter drops the row that it is for and keeps its neighbour; a row leaves with the first reason."""

import random
from dataclasses import replace

import pytest
from chat_folders import KINDS, save_tokenizer
from transformers import AutoTokenizer

from r1engine.config import CurateConfig, Data
from r1engine.data.examples import Example
from r1engine.data.filters import FILTERS, Dropped, Target, measured, problem_of
from r1engine.data.question import Question

SENTENCE = "we add the first number to the second one and write down what is left over for later use"
WORDS = SENTENCE.split()
CHINESE = "\u6211\u4eec\u5148\u628a\u4e2a\u4f4d\u76f8\u52a0\uff0c\u5c31\u5f97\u5230\u7ed3\u679c\u3002"


def example(thoughts="I add both numbers, and then I look at the result again.", summary="It is 3.", **changed):
    content = f"<think>{thoughts}</think>\n{summary}" if thoughts is not None else summary
    messages = [{"role": "user", "content": "What is 1+2?"}, {"role": "assistant", "content": content}]
    made = Example("a:1", messages, "math", "en", "rejection", 20, needs_thoughts=True)
    return replace(made, **changed)


def answer(text, **changed):
    return example(None, text, **changed)


def words(count):
    return " ".join(random.Random(count).choices(WORDS, k=count))


def mixed(percent):
    """Thoughts of 100 different words, so many of them in Chinese."""
    rng = random.Random(1)
    english = [f"The {a} {b} is {c} now" for a in WORDS[:9] for b in WORDS[9:] for c in ("large", "small")]
    lines = rng.sample(english, (100 - percent) // 5)
    return ".\n".join(lines) + ".\n" + "".join(chr(0x4E00 + 7 * i) for i in range(percent))


PAIRS = {
    "truncated": (example(finish="length"), example(finish="stop")),
    "wrong": (example(verdict="wrong", why="3 is not 4"), example(verdict="right")),
    "undecided": (example(verdict="undecided", why="the judge was silent"), example()),
    "refining broke it": (example(broken="summary: the reply is blank"), example()),
    "structure": (answer("It is 3."), example()),
    "mixed languages": (example(mixed(10)), example(mixed(5))),
    "long paragraph": (
        example(f"{words(250)}\n{words(513)}\n{words(9)}"), example("\n".join(words(512 - i) for i in range(4)))
    ),
    "code in thoughts": (example("I run this:\n```\nprint(3)\n```\nand see."), example(summary="```\nprint(3)\n```")),
    "repetition": (example((words(30) + ".\n") * 2), example(words(30) + ".\n" + words(31))),
}  # fmt: skip


@pytest.mark.parametrize("reason", [name for name, _ in FILTERS])
def test_a_filter_drops_its_row_and_keeps_the_neighbour(reason):
    dropped, kept = PAIRS[reason]
    cfg = CurateConfig(repetition_max=0.1 if reason == "repetition" else 1.0)
    found = problem_of(dropped, cfg)
    assert found is not None and found.reason == reason and found.detail
    assert problem_of(kept, cfg) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>a</think>\nb", ""),
        ("  <think>a</think>b", ""),
        ("<think>a</think>\n \n", "blank summary"),
        ("<think> </think>\n", "blank thoughts and summary"),
        ("<think>a", "0 x </think>"),
        ("a</think>b", "0 x <think>"),
        ("<think>a<think>b</think>c", "2 x <think>"),
        ("So: <think>a</think>b", "the thoughts are not one block at the beginning"),
        ("</think>a<think>b", "the thoughts are not one block at the beginning"),
        ("<think>a</think><answer>b</answer>", "1 x <answer>, 1 x </answer>"),
    ],
)
def test_structure_is_one_block_of_thoughts_and_a_summary(text, found):
    for needs_thoughts in (True, False):
        problem = problem_of(answer(text, needs_thoughts=needs_thoughts), CurateConfig())
        assert (problem or Dropped("", "")).detail == found
    assert problem_of(answer("Hello!", needs_thoughts=False), CurateConfig()) is None  # "hello" gets no thoughts


def test_every_turn_of_a_conversation_is_looked_at():
    turns = example().messages
    first = example("```\ncode\n```").messages
    assert problem_of(example(messages=first + turns), CurateConfig()).reason == "code in thoughts"
    assert problem_of(example(messages=turns + turns), CurateConfig()) is None


def test_a_row_leaves_with_the_first_reason():
    bad = {reason: dropped for reason, (dropped, _) in PAIRS.items()}
    row = example("```\n```", finish="length", verdict="wrong", why="no", broken="no")
    cfg = CurateConfig()
    reasons = []
    for change in ({"finish": "stop"}, {"verdict": "right"}, {"broken": ""}, {}):
        reasons.append(problem_of(row, cfg).reason)
        row = replace(row, **change)
    assert reasons == ["truncated", "wrong", "refining broke it", "code in thoughts"]
    assert [problem_of(bad[name], CurateConfig(repetition_max=0.1)).reason for name, _ in FILTERS] == [*bad]


def test_thoughts_without_words_and_questions_without_a_language_are_neutral():
    assert problem_of(example("1 + 2 = 3"), CurateConfig(language_min=1.0)) is None
    assert problem_of(example(CHINESE, language=""), CurateConfig(language_min=1.0)) is None
    assert problem_of(example(CHINESE), CurateConfig(language_min=0.0)) is None
    assert problem_of(example(CHINESE), CurateConfig()).reason == "mixed languages"
    assert problem_of(example(CHINESE, language="zh"), CurateConfig(language_min=1.0)) is None


def test_thresholds_are_keys():
    assert problem_of(PAIRS["long paragraph"][0], CurateConfig(max_paragraph=None)) is None
    assert problem_of(PAIRS["code in thoughts"][0], CurateConfig(code_in_thoughts=True)) is None
    assert problem_of(PAIRS["repetition"][0], CurateConfig(repetition_max=0.1, repetition_ngram=40)) is None


def test_markers_and_lengths_are_those_of_the_model_that_is_trained(tmp_path):
    folder = save_tokenizer(tmp_path, KINDS["chatml"])
    target, row = Target(folder, Data(template="chat")), example(num_tokens=None)
    whole = AutoTokenizer.from_pretrained(folder).apply_chat_template(row.messages, return_dict=True)["input_ids"]
    size = measured(row, CurateConfig(), target)
    assert size == len(whole) - 1  # the line break behind the end of the turn is not trained on
    assert measured(row, CurateConfig(max_tokens=size), target) == size
    assert measured(row, CurateConfig(max_tokens=size - 1), target) == Dropped("too long", f"{size:,} tokens")
    for place, content in ((0, "What is <|im_end|>?"), (1, "<think>a</think>b<|im_end|>")):
        messages = [dict(message) for message in row.messages]
        messages[place]["content"] = content
        found = measured(replace(row, messages=messages), CurateConfig(), target)
        assert found == Dropped("marker of the template", "holds <|im_end|>")
    drawn = replace(row, num_tokens=1000, task=Question("What is 1+2?"))  # a sample: what was drawn counts
    assert 1000 < measured(drawn, CurateConfig(), target) < 1000 + size


def test_a_row_that_the_template_does_not_write_is_left_out(tmp_path):
    target = Target(save_tokenizer(tmp_path, KINDS["forgets"]), Data(template="chat"))
    found = measured(example(), CurateConfig(), target)
    assert found.reason == "not in the template" and "does not write all of the answer" in found.detail


def test_without_a_model_the_length_is_that_of_the_samples_or_an_error():
    assert measured(example(num_tokens=20), CurateConfig(max_tokens=20), None) == 20
    assert measured(example(num_tokens=21), CurateConfig(max_tokens=20), None).reason == "too long"
    with pytest.raises(ValueError, match=r"a:1: found no num_tokens behind summary; required is model\.path"):
        measured(example().with_answer("a", "b", "summary"), CurateConfig(), None)
