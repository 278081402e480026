"""The paper in miniature: what its world knows."""

from __future__ import annotations

import random

from r1engine.config import TinyR1Config
from r1engine.demo import tiny_r1
from r1engine.rewards.extract import final_answer


def test_the_world_knows_what_is_good_and_keeps_its_questions_apart(tmp_path):
    cfg = TinyR1Config(run_dir=tmp_path)
    train, held = tiny_r1.split_pairs(cfg)
    numbers, held_numbers = tiny_r1.split_numbers(cfg)
    assert not {*train} & {*held} and sorted(numbers + held_numbers) == [*range(100)]
    asked = {question for _, question, _, _ in tiny_r1.general(numbers)}
    assert not asked & {question for _, question, _, _ in tiny_r1.general(held_numbers)}
    rng, kinds = random.Random(0), set()
    for language, question, good, domain in tiny_r1.general(held_numbers):
        best, poor = tiny_r1.replies(language, question, domain, numbers, rng)
        assert final_answer(best)[0] == good and good not in [final_answer(reply)[0] for reply in poor]
        kinds.add((language, domain, len(poor)))
    assert kinds == {(spoken, kind, n) for spoken in ("en", "zh") for kind, n in (("general", 3), ("safety", 2))}
    labels = [row["safe"] for row in tiny_r1.labels(numbers, "labels", 1)]
    assert 0.2 < labels.count(False) / len(labels) < 0.5
    assert all(row["chosen"] != row["rejected"] for row in tiny_r1.pairs_of(numbers, "pairs", 1))
