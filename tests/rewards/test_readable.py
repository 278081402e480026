"""The readable pattern of the cold start: what is written can be read back, and what cannot is refused."""

from __future__ import annotations

from itertools import product

import pytest

from r1engine.rewards.readable import read_readable, write_readable


def test_pattern_is_the_papers():
    assert write_readable("so 1+1=2", "It is 2.") == "|special_token|so 1+1=2|special_token|It is 2."


@pytest.mark.parametrize("token", ["|a|", "||", "aa"])
def test_what_can_be_written_is_read_back(token):
    # Every pair of short texts over the token's own characters: where parts look like the token, and where not.
    texts = ["".join(letters) for size in range(5) for letters in product("|a ", repeat=size)]
    written = 0
    for reasoning, summary in product(texts, repeat=2):
        try:
            text = write_readable(reasoning, summary, token)
        except ValueError:
            continue
        written += 1
        assert read_readable(text, token) == (reasoning, summary)
    assert written > 2000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a||b||c", "found 'a||b||c' at the start, required the token '||'"),
        ("||a", "found the token '||' 1 times, required 2"),
        ("||a||b||c", "found the token '||' 3 times, required 2"),
        ("|| ||b", "the reasoning is blank"),
        ("||a|| ", "the summary is blank"),
    ],
)
def test_broken_pattern_is_refused(text, message):
    with pytest.raises(ValueError) as caught:
        read_readable(text, "||")
    assert str(caught.value) == f"readable pattern: {message}"


def test_parts_that_could_not_be_read_back_are_refused():
    for reasoning, summary, token, message in (
        ("a||b", "c", "||", "the reasoning holds the token '||'"),
        ("a", "|", "||", "the summary holds the token '||'"),
        ("a|", "b", "||", "the reasoning holds the token '||'"),
        (" ", "b", "||", "the reasoning is blank"),
        ("a", "b", " ", "found the token ' ', required one that is not blank"),
    ):
        with pytest.raises(ValueError) as caught:
            write_readable(reasoning, summary, token)
        assert str(caught.value) == f"readable pattern: {message}"
