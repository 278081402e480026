"""Language consistency: the share of words in the target language, and what must not be able to raise it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1engine.rewards.language import _count, check_language, language_of, language_share

SAMPLES = json.loads((Path(__file__).parent / "language_texts.json").read_text(encoding="utf-8"))
TEXTS = SAMPLES["texts"]


@pytest.mark.parametrize("language", TEXTS)
def test_text_is_wholly_in_its_language_and_in_no_other(language):
    for target in TEXTS:
        share, words, _ = language_share(TEXTS[language], target)
        assert share == (1.0 if target == language else 0.0), target
        assert words > 2
    assert language_of(TEXTS[language]) == language


def test_share_is_the_proportion_of_words_and_characters():
    # 12 characters against 9 words.
    share, words, found = language_share(SAMPLES["mixed"], "zh")
    assert (words, found) == (21, {"zh": 12, "Latin script": 9})
    assert share == pytest.approx(12 / 21)
    both = language_share(TEXTS["en"] + " " + TEXTS["fr"], "en")
    assert both[0] == pytest.approx(both[2]["en"] / both[1]) and 0.4 < both[0] < 0.6


def test_what_has_no_language_does_not_count():
    noise = (
        "```python\nfor item in list_of_things: print(item)\n``` `inline code` $\\frac{a}{b} + \\text{area}$"
        " \\[ x = 5 \\]"
        " \\begin{align*} area &= width \\end{align*} \\sin(x) 12 345 AB CD x y sin cos https://example.org/page <b>"
    )
    assert language_share(noise, "zh") == (None, 0, {})
    assert language_share(TEXTS["zh"] + noise, "zh")[0] == 1.0


@pytest.mark.parametrize("text", ["", "$1+1=2$", "12", "\\boxed{5}", "```\nall of it is code\n```", "x = y + z", "Ok."])
def test_nothing_to_judge_is_neutral_and_not_one(text):
    assert language_share(text, "en")[0] is None


def test_unclosed_code_fence_hides_nothing():
    assert language_share("```\n" + TEXTS["en"], "zh")[0] == 0.0


def test_repeated_filler_counts_once():
    honest = language_share(TEXTS["en"] + TEXTS["zh"], "zh")[0]
    padded = language_share(TEXTS["en"] + TEXTS["zh"] + "\u597d\u7684\u3002" * 1000, "zh")[0]
    assert padded < honest + 0.05


def test_han_characters_are_japanese_only_beside_kana():
    assert language_share(TEXTS["ja"] + TEXTS["zh"], "ja")[2] == {"ja": 18, "zh": 22}
    assert language_share("\u6771\u4eac\u5927\u5b66\u3002" + TEXTS["ja"], "ja")[0] == 1.0  # a short name may be
    assert language_share(TEXTS["ja"], "zh")[0] == 0.0


def test_languages_of_one_other_script_are_not_told_apart():
    assert language_share(TEXTS["ru"], "uk")[0] == 1.0


def test_lingua_agrees_where_it_is_installed():
    pytest.importorskip("lingua")
    for language in ("en", "fr", "de", "es"):
        assert language_share(TEXTS[language], language, detector="lingua")[0] == 1.0
        assert language_share(TEXTS[language], "it", detector="lingua")[0] == 0.0


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match=r"here: found language 'xx', required one of ar, be, bg, bn, ca"):
        check_language("xx", "here")


def test_plain_ascii_is_counted_as_beside_other_scripts():
    for sentence in (
        "I think that x1 and log of AB is it's well-known",
        "\\frac a b",
        "",
        "USA NASA Paris sin COSINE 12 a_b",
    ):
        scripts, latin = _count(f"{sentence} \u4e2d\u6587")
        assert _count(sentence) == ({}, latin) and scripts == {"Han": 2}


@pytest.mark.parametrize("name", ["\\alpha_total", "x_total", "total_2", "_total", "2total", "\\frac12total"])
def test_names_of_variables_do_not_count_also_behind_a_command(name):
    assert language_share(f"{name} {TEXTS['zh']}", "zh")[0] == 1.0
