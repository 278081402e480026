"""Near-duplicates against the exact Jaccard index, and the mixture."""

import random

import numpy as np
import pytest

from r1engine.data.duplicates import clusters, rank, shingles
from r1engine.data.mixture import PAPER, statistics, wanted

WORDS = [f"w{i}" for i in range(3000)]


def questions(seed):
    """Texts of 40 words; of the first 60 there are copies with the last 1 to 12 words replaced."""
    rng = random.Random(seed)
    texts = [rng.choices(WORDS, k=40) for _ in range(300)]
    texts += [text[:-cut] + rng.choices(WORDS, k=cut) for text in texts[:60] for cut in (rng.randint(1, 12),)]
    return {f"{i:04d}": " ".join(text) for i, text in enumerate(texts)}


def grams(text):
    found = text.split()
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}


def test_near_duplicates_are_those_of_the_exact_index_in_any_order():
    texts = questions(0)
    found = clusters({name: shingles(text) for name, text in texts.items()}, 0.6)
    sets = {name: grams(text) for name, text in texts.items()}
    pairs = {(a, b) for a in sets for b in sets if a < b and len(sets[a] & sets[b]) >= 0.6 * len(sets[a] | sets[b])}
    assert 20 < len(pairs) < 60
    assert {(found[name], name) for name in texts if found[name] != name} == pairs
    backwards = {name: shingles(text) for name, text in reversed(texts.items())}
    assert clusters(backwards, 0.6) == found


def test_case_and_punctuation_do_not_matter_and_short_texts_count_as_a_whole():
    assert np.array_equal(shingles("What is 1 + 2?"), shingles("what, is: 1 2"))
    texts = {"a": "What is 1+2?", "b": "what is 1 + 2", "c": "What is 1+3?", "d": ""}
    found = clusters({name: shingles(text) for name, text in texts.items()}, 0.8)
    assert found == {"a": "a", "b": "a", "c": "c", "d": "d"}
    assert clusters({}, 0.8) == {} and clusters({"a": shingles("x")}, 0.8) == {"a": "a"}


def test_a_chain_of_near_duplicates_is_one():
    text = random.Random(3).choices(WORDS, k=69)
    chain = [text[i : i + 60] for i in range(0, 12, 3)]  # shifted by 3 words: 0.9, by 9 words: 0.72
    found = clusters({str(i): shingles(" ".join(text)) for i, text in enumerate(chain)}, 0.8)
    assert set(found.values()) == {"0"}
    ends = {"0": shingles(" ".join(chain[0])), "3": shingles(" ".join(chain[3]))}
    assert set(clusters(ends, 0.8).values()) == {"0", "3"}


def test_rank_depends_on_seed_and_row_alone():
    assert rank(0, "a:1") == rank(0, "a:1") != rank(1, "a:1")
    assert 0.4 < np.mean([rank(0, str(i)) / 2**64 for i in range(1000)]) < 0.6


def test_mixture_by_counts_and_by_shares():
    available = {"math": 100, "code": 10, "general": 50}
    assert wanted(available, None, None) == available
    assert wanted(available, {"math": 7, "general": 50}, None) == {"math": 7, "general": 50}
    assert wanted(available, None, {"math": 2, "code": 1}) == {"math": 20, "code": 10}
    with pytest.raises(ValueError, match=r"counts\.code: found 10, required 11; counts\.logic: found 0, required 1$"):
        wanted(available, {"code": 11, "logic": 1, "math": 1}, None)
    with pytest.raises(ValueError, match=r"shares\.logic: found no row of it, only code, general, math"):
        wanted(available, None, {"logic": 1.0})


def test_table_5_adds_up():
    domains = [row for name, row in PAPER.items() if name != "total"]
    assert sum(rows for rows, _, _ in domains) == PAPER["total"][0]
    assert sum(rows * tokens for rows, _, tokens in domains) / PAPER["total"][0] == pytest.approx(5355.3, abs=0.06)
    lines = statistics([("general", 1, 10), ("math", 1, 1), ("math", 3, 3), ("own", 1, 5)])
    assert list(lines) == ["math", "general", "own", "total"]
    math = lines["math"]
    assert (math.rows, math.rounds, math.tokens_mean, math.tokens_p50) == (2, 2.0, 2.0, 2.0)
    assert lines["total"].rows == 4 and lines["total"].tokens_mean == 4.75
