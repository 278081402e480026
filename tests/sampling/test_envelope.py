"""The compute-optimal choice: by hand, and that chance alone gains nothing."""

import random

from r1engine.sampling.envelope import bins_of, envelope, envelope_text


def test_the_choice_of_each_bin_by_hand():
    shares = {number: number / 40 for number in range(40)}
    hard, easy = bins_of(shares, 2)
    assert hard == [*range(20)] and easy == [*range(20, 40)]
    beam = {number: number < 20 for number in range(40)}  # right on the hard half
    vote = {number: not is_right for number, is_right in beam.items()}
    [low, high] = envelope({"beam": beam, "vote": vote}, {"beam": 100.0, "vote": 200.0}, [hard, easy])
    assert (low["budget"], low["optimal"], low["single"]) == (100.0, 0.5, 0.5)  # there is no other search yet
    assert (high["budget"], high["optimal"], high["single"]) == (200.0, 1.0, 0.5)
    assert high["chosen"] == [["beam", "beam"], ["vote", "vote"]]
    assert "| 200 | 1.000 | 0.500 | beam | vote |" in envelope_text([low, high])


def test_what_is_chosen_by_chance_is_no_better_than_chance():
    rng, count = random.Random(0), 4000
    shares = {number: rng.random() for number in range(count)}
    verdicts = {f"s{i}": {number: rng.random() < 0.5 for number in range(count)} for i in range(12)}
    found = envelope(verdicts, dict.fromkeys(verdicts, 10.0), bins_of(shares, 400))[-1]
    assert abs(found["optimal"] - 0.5) < 4 * (0.25 / count) ** 0.5  # the best of 12 in a bin of 10 has about 0.75


def test_where_a_search_is_undecided_in_a_bin_it_is_not_wrong_there():
    beam = {number: number % 4 < 3 for number in range(8, 24)}  # nothing decided of the first bin; .75 of the rest
    vote = {number: number % 4 < 2 for number in range(24)}  # .5 everywhere
    drawn = {"beam": 10.0, "vote": 10.0, "none": 10.0}
    found = envelope({"beam": beam, "vote": vote, "none": {}}, drawn, [[*range(8)], [*range(8, 24)]])[-1]
    assert found["chosen"] == [["beam", "beam"], ["beam", "beam"]]


def test_undecided_questions_and_small_sets_are_left_out():
    assert [len(one) for one in bins_of(dict.fromkeys(range(7), 0.5))] == [2, 3, 2]
    [found] = envelope({"a": {0: True, 1: True}}, {"a": 5.0}, [[0, 1, 2, 3]])
    assert found["optimal"] == 1.0 and envelope_text([]) == ""
