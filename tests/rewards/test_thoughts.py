"""Where a completion's thoughts end, in one table, and what each reader makes of it."""

from __future__ import annotations

import pytest

from r1engine.rewards.code.grade import final_code
from r1engine.rewards.extract import final_answer
from r1engine.rewards.servers.preference import summary
from r1engine.rewards.thoughts import SplitCompletion, split_thoughts

OPEN = "the think block is not closed"


@pytest.mark.parametrize(
    ("text", "prefilled", "thoughts", "rest", "is_open"),
    [
        ("", False, None, "", False),
        ("a", False, None, "a", False),
        ("<think>a</think>b", False, "a", "b", False),
        ("x<think>a</think>b", False, "a", "b", False),  # what stands before the thoughts is neither
        ("<think></think>", False, "", "", False),
        ("a</think>b", False, "a", "b", False),  # the prompt may have opened the block
        ("a</think>b", True, "a", "b", False),
        ("<think>a</think>b", True, "<think>a", "b", False),
        ("<think>a<think>b</think>c", False, "a<think>b", "c", False),
        ("<think>a</think>b</think>c", False, "a</think>b", "c", False),
        ("<think>a</think>b<think>c</think>d", False, "a</think>b<think>c", "d", False),
        # The first tag decides where the thoughts begin: here, before the text.
        ("a</think>b<think>c</think>d", False, "a</think>b<think>c", "d", False),
        ("</think>a<think>b", False, "", "a<think>b", True),
        # Open at the end.
        ("a", True, "a", "", True),
        ("", True, "", "", True),
        ("x<think>a", False, "a", "", True),
        ("<think>a</think>b<think>c", False, "a", "b<think>c", True),
        ("a</think>b<think>c", True, "a", "b<think>c", True),
    ],
)
def test_text_is_divided_at_the_last_closing_tag(text, prefilled, thoughts, rest, is_open):
    assert split_thoughts(text, think_prefilled=prefilled) == SplitCompletion(thoughts, rest, is_open)


@pytest.mark.parametrize(
    ("text", "answer", "program", "shown"),
    [
        # An answer and a program must come after the last thoughts; the user reads what stands before they begin again.
        ("<think>1</think><answer>2</answer><think>3", (None, OPEN), (None, OPEN), "2"),
        ("<think>1<answer>2</answer>", (None, OPEN), (None, OPEN), ""),
        ("1</think><answer>2</answer>", ("2", ""), ("2", ""), "2"),
        ("<answer>1</answer><think>2</think><answer>3</answer>", ("3", ""), ("3", ""), "3"),
        ("<answer>2</answer>", ("2", ""), ("2", ""), "2"),
        ("<think>1</think><answer>2", (None, "the answer block is not closed"),
         (None, "the answer block is not closed"), "2"),
    ],
)  # fmt: skip
def test_readers_agree_where_the_thoughts_end(text, answer, program, shown):
    assert final_answer(text) == answer
    assert final_code(text, "python") == program
    assert summary(text) == shown
