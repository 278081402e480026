"""The format rule, case by case."""

from __future__ import annotations

import pytest

from r1engine.rewards.format import format_problem


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
