"""Decontamination: what is planted is found, what is unrelated is not, against sets of tuples."""

import json
import random

import pytest

from r1engine.data import contamination
from r1engine.data.contamination import EvaluationIndex, EvaluationText, Overlap, read_evaluation_texts, units

ENGLISH = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("ane", "olt", "ice", "ust", "ermal", "ingo", "ora", "eeds")]
CHINESE = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 600))
CODE = ["def", "return", "for", "in", "range", "x", "y", "total", "+=", "(", "):", "\n    ", "if", "==", "1", "not"]


def english(rng, size):
    return " ".join(rng.choices(ENGLISH, k=size)).capitalize() + "?"


def chinese(rng, size):
    return "".join(rng.choices(CHINESE, k=size)) + "\uff1f"


def code(rng, size):
    return "def solve(values):\n    " + " ".join(rng.choices(CODE, k=3 * size))


WRITERS = {"en": english, "zh": chinese, "code": code}


def ngrams(found, size):
    return [tuple(found[i : i + size]) for i in range(len(found) - size + 1)]


def planted(rng, text, write):
    """A text as it comes back in other data: other case, spaces and punctuation, and something around it."""
    if write is not code:
        text = text.upper() if rng.random() < 0.5 else text.replace(" ", "\n ").replace("?", "!!")
    return f"{write(rng, rng.randint(3, 40))}\n\n{text} ({write(rng, rng.randint(3, 40))})"


@pytest.mark.parametrize("language", WRITERS)
def test_every_planted_copy_is_found_and_nothing_unrelated(language):
    rng, write = random.Random(language), WRITERS[language]
    items = [EvaluationText(write(rng, rng.randint(12, 80)), f"set.jsonl:{i}") for i in range(200)]
    index = EvaluationIndex(items)
    for item in items:
        found = index.find([planted(rng, item.text, write)])
        assert found is not None and found.place == item.place
        assert index.find([write(rng, 60)], [planted(rng, item.text, write)]) == found  # in an answer, too
    unrelated = random.Random("another world")
    rows = [(write(unrelated, 30), write(unrelated, 120)) for _ in range(5000 // len(WRITERS) + 1)]
    assert [row for row in rows if index.find(row[:1], row[1:])] == []


def test_agrees_with_sets_of_tuples():
    rng = random.Random(1)
    words = ["one", "two", "three"]  # so few that n-grams repeat and overlap
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(300)]
    index = EvaluationIndex([EvaluationText(text, str(i)) for i, text in enumerate(texts[:20])], size=6)

    def grams(text):
        return set(ngrams(text.split(), 6))

    known = set().union(*map(grams, texts[:20]))
    whole = {tuple(text.split()) for text in texts[:20] if len(text.split()) < 6}
    expected = [bool(grams(text) & known or tuple(text.split()) in whole) for text in texts]
    assert [index.find([text]) is not None for text in texts] == expected
    assert 0 < sum(expected[20:]) < 280
    for text in (text for text in texts if grams(text) & known):
        gram = next(gram for gram in ngrams(text.split(), 6) if gram in known)  # the first of the text
        where = next(str(i) for i, other in enumerate(texts[:20]) if gram in grams(other))  # its first place
        assert index.find([text]) == Overlap(where, " ".join(gram))


def test_ten_units_are_one_too_many_and_nine_are_not():
    item = EvaluationText("a b c d e f g h i j k l", "e:1")
    index = EvaluationIndex([item, EvaluationText("m n o p q r s t u v", "e:2")])
    assert index.find(["x b c d e f g h i j x"]) is None
    assert index.find(["x b c d e f g h i j k x"]) == Overlap("e:1", "b c d e f g h i j k")
    assert index.find(["i j k l m n o p q r"]) is None  # from one item into the next
    assert index.find(["k j i h g f e d c b"]) is None  # the same words
    assert len(index) == 3 + 1


def test_a_short_question_counts_only_as_a_whole_question():
    index = EvaluationIndex([EvaluationText("What is 2 + 2?", "e:1"), EvaluationText("four", "e:1", is_question=False)])
    assert index.find(["what is 2+2"]) == Overlap("e:1", "what is 2 2")
    assert index.find(["what is 2 + 2 + 2?"]) is None
    assert index.find(["four"]) is None
    assert index.find(["How many?"], ["What is 2 + 2?"]) is None  # an answer that asks it


def test_equal_hashes_of_other_words_are_no_match(monkeypatch):
    monkeypatch.setattr(contamination, "_FACTOR", 1)  # a sum: the same words in any order have one hash
    index = EvaluationIndex(
        [EvaluationText("a b c d e f g h i j", "e:1"), EvaluationText("j b c d e f g h i a", "e:2")]
    )
    assert index.find(["b a c d e f g h i j"]) is None
    assert index.find(["j b c d e f g h i a"]).place == "e:2"


def test_units_are_words_or_characters():
    assert units("Let f(x)=\\frac{1}{2}, snake_case!") == ["let", "f", "x", "frac", "1", "2", "snake", "case"]
    assert units("\u5df2\u77e5a>1, \uff21\uff22\uff23") == [
        "\u5df2",
        "\u77e5",
        "a",
        "1",
        "abc",
    ]  # full width letters, too
    ascii_text = "".join(map(chr, range(128)))
    assert units(ascii_text) == units(ascii_text + "\u2026")  # the quick way and the other one
    assert units("") == [] and EvaluationIndex([]).find(["a b c d e f g h i j"]) is None


def test_reads_questions_answers_and_solutions(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [{"question": "Why?", "answer": 3}, {"question": "Who?", "answer": "He", "solution": "As he says."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(text.text, text.place, text.is_question) for text in read_evaluation_texts(path)]
    first, second = f"{path}:1", f"{path}:2"
    assert found == [
        ("Why?", first, True), ("Who?", second, True), ("He", second, False), ("As he says.", second, False)
    ]  # fmt: skip
    path.write_text('{"question": 3}\n')
    with pytest.raises(ValueError, match=r"set\.jsonl:1: question is 3, required a text"):
        list(read_evaluation_texts(path))
    path.write_text('{"problem": "Why?"}\n')
    with pytest.raises(ValueError, match=r"found no field 'question'.*data.columns.question=problem"):
        list(read_evaluation_texts(path))
