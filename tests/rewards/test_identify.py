"""Languages of many texts at once are those that py3langid names one by one."""

import json
import random
from pathlib import Path

import pytest

from r1engine.rewards import identify
from r1engine.rewards.identify import classify_all, identifier_of

TEXTS = json.loads((Path(__file__).parent / "language_texts.json").read_text())
WORDS = [*json.dumps(TEXTS, ensure_ascii=False).lower().split()]


def texts(seed):
    """From one word to many, of one language or of several, some empty or in capitals."""
    rng = random.Random(seed)
    found = []
    for _ in range(150):
        start, size = rng.randrange(len(WORDS)), rng.choice((1, 2, 8, 8, 8, 40))
        found.append(" ".join(WORDS[start : start + size] if rng.random() < 0.7 else rng.choices(WORDS, k=size)))
    return [*found, "", "1 + 1", found[0].upper(), "\u0065\u0301te\u0301 en France, il fait chaud"]


@pytest.mark.parametrize("candidates", [("de", "en", "es", "fr", "it", "nl", "pt"), ("en", "hr", "vi")])
def test_many_texts_are_classified_as_one_by_one(candidates, monkeypatch):
    many, identifier = texts(0), identifier_of(candidates)
    one_by_one = [identifier.classify(text)[0] for text in many]
    assert classify_all(many, candidates) == one_by_one
    assert len({*one_by_one}) == len(candidates)
    monkeypatch.setattr(identify, "_AT_ONCE", 1000)  # bytes: in several parts
    assert classify_all(many, candidates) == one_by_one
    assert classify_all([], candidates) == []


def test_scores_are_those_of_py3langid():
    candidates = ("de", "en", "fr")
    identifier = identifier_of(candidates)
    many = sorted(texts(1), key=lambda text: -len(identifier._encode(text)))
    encoded = [identifier._encode(text) for text in many]
    for text, scores in zip(many, identify._scores(encoded, candidates), strict=True):
        expected = identifier._raw_score(identifier._encode(text))
        if expected.max() > -1e4:  # py3langid gives texts without any feature a score of their own
            assert scores == pytest.approx(expected, abs=0.02)
