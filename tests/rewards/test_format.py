"""The format rule, case by case."""

from __future__ import annotations

import pytest

from r1engine.data.question import Question
from r1engine.rewards import Record, Scorer, ScorerSettings
from r1engine.rewards.format import format_problem, readable_problem


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>b</answer>",
        " <think> a\nb </think>\n\n<answer>\n b \n</answer>\n",
        "<think>1 < 2 and <b> and </ think></think><answer>x > <y</answer>",  # other brackets are text
        "<think>\\boxed{1}</think><answer>\\boxed{2}</answer>",
    ],
)
def test_well_formed(text):
    assert format_problem(text) == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "found no <think>"),
        ("42", "found no <think>"),
        ("<answer>b</answer>", "found <answer>, required <think>"),
        ("<think>a<answer>b</answer>", "found <answer>, required </think>"),
        ("<think>a</think>", "found no <answer>"),
        ("<think>a</think>b", "found no <answer>"),
        ("<think>a</think><answer>b", "found no </answer>"),
        ("<think>a</think><answer> \n</answer>", "found a blank answer"),
        ("<think>a</think><answer></answer>", "found a blank answer"),
        ("x<think>a</think><answer>b</answer>", "found text before <think>"),
        ("<think>a</think>x<answer>b</answer>", "found text before <answer>"),
        ("<think>a</think><answer>b</answer>x", "found text after </answer>"),
        ("<answer>b</answer><think>a</think>", "found <answer>, required <think>"),
        ("<think>a</think><think>c</think><answer>b</answer>", "found <think>, required <answer>"),
        ("<think><think>a</think></think><answer>b</answer>", "found <think>, required </think>"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "found <answer>, required the end"),
        ("<think>a</think><answer><answer>b</answer></answer>", "found <answer>, required </answer>"),
        ("<think>a</think><answer>b<think></think></answer>", "found <think>, required </answer>"),
        ("</think><answer>b</answer>", "found </think>, required <think>"),
        ("<Think>a</Think><answer>b</answer>", "found <answer>, required <think>"),
    ],
)
def test_broken_format_says_what_breaks_it(text, problem):
    assert format_problem(text) == problem


@pytest.mark.parametrize("text", ["<think></think><answer>b</answer>", "<think> \n</think><answer>b</answer>"])
def test_blank_think_block_is_well_formed_only_where_that_is_allowed(text):
    assert format_problem(text) == "found a blank think block"
    assert format_problem(text, blank_think_allowed=True) == ""


def test_prefilled_think_is_accepted_only_when_the_prompt_had_it():
    text = "a</think><answer>b</answer>"
    assert format_problem(text, think_prefilled=True) == ""
    assert format_problem(text) == "found </think>, required <think>"
    again = "<think>a</think><answer>b</answer>"
    assert format_problem(again, think_prefilled=True) == "found <think>, required </think>"


def test_work_grows_with_the_length_and_not_with_its_square():
    # A backtracking regular expression needs hours for this.
    assert format_problem("<think>" + "<" * 300_000) == "found no </think>"
    assert format_problem("<think>" * 100_000) == "found <think>, required </think>"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<think>hm</think>It is 4.", ""),
        (" \n<think>\nhm\n</think>\n\nIt is \\boxed{4}.\n", ""),
        ("It is 4.", "found no <think> at the beginning"),
        ("Well. <think>hm</think>4", "found no <think> at the beginning"),
        ("<think>hm", "found </think> 0 times, required once"),
        ("<think>a</think>b<think>c</think>d", "found <think> 2 times, required once"),
        ("<think>hm</think><answer>4</answer>", "found <answer>, required a summary without it"),
        ("<think> </think>4", "found a blank think block"),
        ("<think>hm</think> \n", "found no summary behind the thoughts"),
    ],
)
def test_the_readable_rule_of_the_cold_start(text, problem):
    record = Record(Question("", reward="format"), text)
    with Scorer(ScorerSettings(workers=1, format_rule="readable")) as scorer:
        score = scorer.score([record])[0]
    assert (score.verdict, score.reason) == (("wrong", problem) if problem else ("right", "well-formed"))
    if text.strip().startswith("<think>"):
        assert readable_problem(text.strip().removeprefix("<think>"), think_prefilled=True) == problem
