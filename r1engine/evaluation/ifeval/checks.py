"""The 25 instructions of IFEval (Zhou et al., arXiv 2311.07911), each a check of a reply that a program can make.

A check is the rule of Google's own program with two repairs. A letter to be counted may be any character: there a `#`
or `!` is replaced by a random letter, so that two of the 541 prompts are judged by chance. The language of a reply is
found without chance (py3langid, where langdetect draws random numbers).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from r1engine.evaluation.ifeval.sentences import capital_words, sentences

Arguments = dict[str, Any]
RELATIONS: dict[str, Callable[[int, int], bool]] = {"at least": int.__ge__, "less than": int.__lt__}
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}  # markers that may be spaced
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_CODES = """
af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro ru sk
sl sq sv sw ta te th tl tr uk ur vi zh
"""
LANGUAGES = _CODES.split()  # that a reply may be asked for, ISO 639-1
_FIRST_WORD_ENDS = re.compile(r"""[.,?!'"]""")


def _holds(found: int, relation: str, number: int) -> bool:
    return RELATIONS[relation](found, number)


# ---- words and letters ---------------------------------------------------------------------------------------------


def _has_keywords(reply: str, given: Arguments) -> bool:
    return all(re.search(re.escape(word), reply, re.IGNORECASE) for word in given["keywords"])


def _keyword_frequency(reply: str, given: Arguments) -> bool:
    found = re.findall(re.escape(given["keyword"].strip()), reply, re.IGNORECASE)
    return _holds(len(found), given["relation"], given["frequency"])


def _has_no_forbidden_word(reply: str, given: Arguments) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", reply, re.IGNORECASE) for word in given["forbidden_words"])


def _letter_frequency(reply: str, given: Arguments) -> bool:
    return _holds(reply.lower().count(given["letter"].lower()), given["let_relation"], given["let_frequency"])


def _capital_word_frequency(reply: str, given: Arguments) -> bool:
    return _holds(capital_words(reply), given["capital_relation"], given["capital_frequency"])


def _has_no_comma(reply: str, _: Arguments) -> bool:
    return "," not in reply


# ---- languages and case --------------------------------------------------------------------------------------------


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(LANGUAGES)
    return identifier


def _language(reply: str) -> str:
    """ISO 639-1 code of what a text is written in, one of LANGUAGES."""
    return _identifier().classify(reply)[0]


def _is_in_language(reply: str, given: Arguments) -> bool:
    return _language(reply) == given["language"]


def _is_english(reply: str) -> bool:
    return _language(reply.lower()) == "en"


def _is_english_capitals(reply: str, _: Arguments) -> bool:
    return reply.isupper() and _is_english(reply)


def _is_english_lower_case(reply: str, _: Arguments) -> bool:
    return reply.islower() and _is_english(reply)


# ---- lengths -------------------------------------------------------------------------------------------------------


def _number_of_sentences(reply: str, given: Arguments) -> bool:
    return _holds(len(sentences(reply)), given["relation"], given["num_sentences"])


def _number_of_words(reply: str, given: Arguments) -> bool:
    return _holds(len(re.findall(r"\w+", reply)), given["relation"], given["num_words"])


def _number_of_paragraphs(reply: str, given: Arguments) -> bool:
    """Paragraphs are divided by ***; only before the first and behind the last one may there be nothing."""
    parts = _without_blank_ends(re.split(r"\s?\*\*\*\s?", reply))
    return parts is not None and len(parts) == given["num_paragraphs"]


def _first_word_of_paragraph(reply: str, given: Arguments) -> bool:
    """Paragraphs are divided by an empty line; blank ones do not count, but have their place."""
    paragraphs = reply.split("\n\n")
    filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if given["nth_paragraph"] > filled:
        return False
    words = paragraphs[given["nth_paragraph"] - 1].split()
    if not words:
        return False
    first = _FIRST_WORD_ENDS.split(words[0].lstrip("'").lstrip('"'))[0]
    return filled == given["num_paragraphs"] and first.lower() == given["first_word"].lower()


def _without_blank_ends(parts: list[str]) -> list[str] | None:
    """The parts without a blank first and last one; None if another one is blank."""
    kept = [part for place, part in enumerate(parts) if part.strip() or place not in (0, len(parts) - 1)]
    return kept if all(part.strip() for part in kept) else None


# ---- what is to be there, and form ---------------------------------------------------------------------------------


def _number_of_placeholders(reply: str, given: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", reply)) >= given["num_placeholders"]


def _has_postscript(reply: str, given: Arguments) -> bool:
    marker = given["postscript_marker"].strip()
    return re.search(_POSTSCRIPTS.get(marker, re.escape(marker)), reply, re.IGNORECASE) is not None


def _number_of_bullets(reply: str, given: Arguments) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*]|-).*$", reply, re.MULTILINE)) == given["num_bullets"]


def _is_one_of_three_answers(reply: str, _: Arguments) -> bool:
    return any(answer in reply for answer in _ANSWERS)


def _number_of_highlights(reply: str, given: Arguments) -> bool:
    """*so* and **so**; the latter count once, as of the former only the stars around them are found."""
    single = [text for text in re.findall(r"\*[^\n*]*\*", reply) if text.strip("*").strip()]
    double = [text for text in re.findall(r"\*\*[^\n*]*\*\*", reply) if text[2:-2].strip()]
    return len(single) + len(double) >= given["num_highlights"]


def _number_of_sections(reply: str, given: Arguments) -> bool:
    found = re.findall(rf"\s?{re.escape(given['section_spliter'].strip())}\s?\d+\s?", reply)
    return len(found) >= given["num_sections"]


def _is_json(reply: str, _: Arguments) -> bool:
    text = reply.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(opening)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(reply: str, _: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", reply))


def _is_two_responses(reply: str, _: Arguments) -> bool:
    parts = _without_blank_ends(reply.split("******"))
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _repeats_the_prompt(reply: str, given: Arguments) -> bool:
    return reply.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _ends_with_phrase(reply: str, given: Arguments) -> bool:
    return reply.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _is_quoted(reply: str, _: Arguments) -> bool:
    text = reply.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# Instruction -> its check, and the arguments that it reads.
CHECKS: dict[str, tuple[Callable[[str, Arguments], bool], tuple[str, ...]]] = {
    "change_case:capital_word_frequency": (_capital_word_frequency, ("capital_relation", "capital_frequency")),
    "change_case:english_capital": (_is_english_capitals, ()),
    "change_case:english_lowercase": (_is_english_lower_case, ()),
    "combination:repeat_prompt": (_repeats_the_prompt, ("prompt_to_repeat",)),
    "combination:two_responses": (_is_two_responses, ()),
    "detectable_content:number_placeholders": (_number_of_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (_has_postscript, ("postscript_marker",)),
    "detectable_format:constrained_response": (_is_one_of_three_answers, ()),
    "detectable_format:json_format": (_is_json, ()),
    "detectable_format:multiple_sections": (_number_of_sections, ("section_spliter", "num_sections")),
    "detectable_format:number_bullet_lists": (_number_of_bullets, ("num_bullets",)),
    "detectable_format:number_highlighted_sections": (_number_of_highlights, ("num_highlights",)),
    "detectable_format:title": (_has_title, ()),
    "keywords:existence": (_has_keywords, ("keywords",)),
    "keywords:forbidden_words": (_has_no_forbidden_word, ("forbidden_words",)),
    "keywords:frequency": (_keyword_frequency, ("keyword", "relation", "frequency")),
    "keywords:letter_frequency": (_letter_frequency, ("letter", "let_relation", "let_frequency")),
    "language:response_language": (_is_in_language, ("language",)),
    "length_constraints:nth_paragraph_first_word": (
        _first_word_of_paragraph,
        ("nth_paragraph", "num_paragraphs", "first_word"),
    ),
    "length_constraints:number_paragraphs": (_number_of_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_sentences": (_number_of_sentences, ("relation", "num_sentences")),
    "length_constraints:number_words": (_number_of_words, ("relation", "num_words")),
    "punctuation:no_comma": (_has_no_comma, ()),
    "startend:end_checker": (_ends_with_phrase, ("end_phrase",)),
    "startend:quotation": (_is_quoted, ()),
}
