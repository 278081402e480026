"""IFEval's instructions, one by one, and the file that asks for them."""

from __future__ import annotations

import json

import pytest

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.evaluation.benchmark import Reply
from r1engine.evaluation.benchmarks import benchmark_of
from r1engine.evaluation.ifeval import followed
from r1engine.evaluation.ifeval.checks import CHECKS
from r1engine.evaluation.ifeval.sentences import capital_words, sentences

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
# instruction, arguments, replies that follow it, replies that do not
CASES = [
    ("keywords:existence", {"keywords": ["c++", "cat"]}, ["A CAT knows C++."], ["A cat knows C.", "C++"]),
    ("keywords:frequency", AT_LEAST | {"keyword": "ab", "frequency": 2}, ["ab, AB", "abab"], ["ab"]),
    ("keywords:frequency", LESS | {"keyword": "ab", "frequency": 2}, ["ab", "x"], ["ab ab"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["concatenate"], ["a Cat."]),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_relation": "at least", "let_frequency": 4},
        ["# a\n## b\n# c"],
        ["# a\n## b"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_relation": "less than", "let_frequency": 3},
        ["wow!!"],
        ["wow!!!"],
    ),
    ("keywords:letter_frequency", {"letter": "E", "let_relation": "at least", "let_frequency": 2}, ["eE"], ["e"]),
    ("language:response_language", {"language": "de"}, ["Das ist ein kurzer Satz auf Deutsch."], ["This is English."]),
    ("language:response_language", {"language": "ko"}, ["\uc548\ub155\ud558\uc138\uc694 \uc5ec\ub7ec\ubd84"], ["Hi"]),
    (
        "length_constraints:number_sentences",
        LESS | {"num_sentences": 3},
        ["Dr. Who sat. He left."],
        ["All be. See it! Eh?"],
    ),
    ("length_constraints:number_sentences", AT_LEAST | {"num_sentences": 2}, ["It is. So."], ["At 3.5 p.m. he left."]),
    ("length_constraints:number_words", AT_LEAST | {"num_words": 3}, ["one two-three"], ["one two"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***\na\n***\nb"], ["a\n\nb"]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, ["a***b***c"], ["a\n***\n\n***\nb"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hello"},
        ['a\n\n"hello, you"'],
        ["a\n\nhi", "hello\n\na", "a\n\nhello\n\nb"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] and [b c]"], ["[a"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\np. s. b"], ["a\nPS b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\nP.P.S. b"], ["a\nP.S. b"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n- b", "x\n * a\n * b"], ["* a", "**a**\n* b"]),
    ("detectable_format:constrained_response", {}, ["So: My answer is maybe."], ["My answer is perhaps."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* *b*", "**a** *b*"],
        ["*a*", "** **"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "Section 1 Section 2"],
    ),
    ("detectable_format:json_format", {}, ['```json\n{"a": 1}\n```', "[1]"], ["{'a': 1}", "so: {}"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<< >>", "<title>"]),
    ("combination:two_responses", {}, ["a******b"], ["a******a", "a", "a******b******c"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, ["say hi. Hi!"], ["Hi! Say hi."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['So. "the end."'], ["The end. Yes."]),
    ("startend:quotation", {}, ['"a"', ' "a" '], ['"', "a", '"a" b']),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 3},
        ["I AM HERE", "I'M HERE"],
        ["I AM here"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS A SENTENCE IN ENGLISH."],
        ["This is.", "DAS IST EIN SATZ AUF DEUTSCH."],
    ),
    ("change_case:english_lowercase", {}, ["this is a sentence in english."], ["This is a sentence."]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


@pytest.mark.parametrize(
    ("name", "arguments", "follow", "break_it"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_instruction_is_followed_or_not(name, arguments, follow, break_it):
    assert [reply for reply in follow if followed([(name, arguments)], reply)[0] != [True]] == []
    assert [reply for reply in break_it if followed([(name, arguments)], reply)[0] != [False]] == []


def test_every_instruction_has_a_case_and_a_blank_reply_follows_none():
    assert {name for name, *_ in CASES} == set(CHECKS) and len(CHECKS) == 25
    assert not any(followed([(name, arguments)], " \n ")[1][0] for name, arguments, *_ in CASES)


def test_loose_forgives_an_opening_and_a_closing_line_and_stars():
    quoted = [("startend:quotation", {})]
    for reply in ('Sure:\n"a"', '"a"\nDone.', 'Sure:\n"a"\nDone.', '*"a"*'):
        assert followed(quoted, reply) == ([False], [True])
    assert followed(quoted, 'Sure:\nHere:\n"a"') == ([False], [False])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Mr. Smith met J. Doe in the U.S. Senate. They talked.", 2),
        ("1. first\n2. second", 1),
        ("In 1990. The end", 2),
        ('He said "Go!" and left. "Why?" she asked.', 4),
        ("What?! No...", 2),
        ("Read it, i.e. all. P.S. Bye", 4),
        ("", 0),
    ],
)
def test_sentences_as_punkt_counts_them(text, count):
    assert len(sentences(text)) == count


def test_capital_words_as_the_word_tokenizer_divides_them():
    assert capital_words("I'M AT R&D. YOU CANNOT go; A.I. is 3D, U-TURN") == 11


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return BenchmarkSettings(file=path)


ROW = {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}


def test_the_score_is_strict_and_the_other_three_are_totals(tmp_path):
    row = benchmark_of("ifeval", "")
    both = ["punctuation:no_comma", "startend:quotation"]
    items = row.load(
        write_lines(tmp_path / "x.jsonl", ROW, ROW | {"key": 2, "instruction_id_list": both, "kwargs": [{}, {}]})
    )
    assert [item.id for item in items] == ["1", "2"] and row.ask(items[0], 0) == "Write."
    replies = ("<think>a, b, c</think>no comma", '<think>a, b</think>Sure:\n"yes"')
    marks = [[row.grade(item, 0, Reply(text, "stop"))] for item, text in zip(items, replies, strict=True)]
    assert [mark.score for (mark,) in marks] == [1.0, 0.0]
    assert marks[1][0].reason == "not followed: startend:quotation"
    totals = row.totals(items, marks)
    assert totals == pytest.approx({"prompt_loose": 1.0, "instruction_strict": 2 / 3, "instruction_loose": 1.0})
    assert row.grade(items[0], 0, Reply("<think>never closed", "length")).score == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kwargs": None}, "x.jsonl:1: kwargs is null, required a list"),
        ({"kwargs": [{}, {}]}, "found 1 instructions and 2 kwargs"),
        ({"instruction_id_list": ["no:such"]}, "found the instruction 'no:such', required one of IFEval's 25"),
        (
            {
                "instruction_id_list": ["keywords:frequency"],
                "kwargs": [{"relation": "about", "keyword": "a", "frequency": 1}],
            },
            "relation of keywords:frequency is 'about', required at least or less than",
        ),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": []}]},
            "keywords of keywords:existence is [], required a list of words",
        ),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"relation": "at least"}]},
            "num_words of length_constraints:number_words is None, required a number",
        ),
        (
            {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]},
            "language of language:response_language is 'xx', required one of af, ar",
        ),
        (
            {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": " "}]},
            "end_phrase of startend:end_checker is ' ', required a text",
        ),
    ],
)
def test_a_row_that_cannot_be_judged_is_refused_with_its_line(tmp_path, change, message):
    with pytest.raises(ValueError) as refused:
        benchmark_of("ifeval", "").load(write_lines(tmp_path / "x.jsonl", ROW | change))
    assert message in str(refused.value)
