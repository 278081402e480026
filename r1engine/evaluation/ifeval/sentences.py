"""Sentences and capital words of English text, counted as NLTK's Punkt and word tokenizer count them.

Punkt's English model is 300 kB of counts of a newspaper; its verdicts follow from a few rules and a list of
abbreviations, which are here. docs/evaluation.md tells how often the two differ.
"""

from __future__ import annotations

import re

# Without their last period. Behind one, a sentence ends only before a word that often begins one.
_ABBREVIATION_WORDS = """
mr mrs ms messrs dr prof gen col lt maj sen rep sr jr st ft vs inc ltd corp co bros jan feb aug sept oct nov dec ave ala
ariz calif colo conn fla ga kan ky mich minn nev okla tenn va vt wis ph.d
"""
_ABBREVIATIONS = frozenset(_ABBREVIATION_WORDS.split())
_DOTTED = re.compile(r"(?!(?:e\.g|i\.e|p\.s|p\.p\.s)$)(?:[^\W\d]\.)+[^\W\d]")  # U.S and a.m; Punkt knows no "i.e."
_STARTER_WORDS = """
the this these there he she it they we you i in if when while but so yet however although since some many most both that
a an and for as at on with let let's now please
"""
_STARTERS = frozenset(_STARTER_WORDS.split())
_CANDIDATE = re.compile(r"""\S*[.!?](?=[)";}\]*:@'({\[!?]|\s)""")  # the last of a word
_CLOSING = re.compile(r"""\s*["')\]}]+?(?:\s+|(?=--)|$)""")  # belongs to the sentence that it closes
_BEFORE = re.compile(r"""[^\s()";{}\[\]*@!?]*$""")  # the word in front of a period
_NEXT = re.compile(r"""[\s)";}\]*:@'({\[!?,]*([^\s)";}\]*:@({\[!?,.]*)""")
_NUMBER = re.compile(r"-?[\d.,]*\d")
# Where the word tokenizer divides what blanks do not: punctuation, contractions and "cannot".
_DIVIDED = re.compile(
    r"[][(){}<>@#$%&;?!\"]|[:,](?!\d)|--|\.\.\.|''|``|(?=n't\b)|(?='(?:s|m|d|ll|re|ve)\b)|(?<=\bcan)(?=not\b)",
    re.IGNORECASE,
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without what is blank."""
    found, start = [], 0
    for match in _CANDIDATE.finditer(text):
        end = match.end()
        if end <= start or (text[end - 1] == "." and not _ends_at(text, start, end)):
            continue
        closing = _CLOSING.match(text, end)
        found.append(text[start : closing.end() if closing else end])
        start = closing.end() if closing else end
    return [sentence.strip() for sentence in [*found, text[start:]] if sentence.strip()]


def capital_words(text: str) -> int:
    """How many words are in capitals; the parts of a contraction count (I'M: 2)."""
    return sum(word.isupper() for word in _DIVIDED.sub(lambda match: f" {match[0]} ", text).split())


def _ends_at(text: str, start: int, end: int) -> bool:
    """Whether the period before `end` ends a sentence, and is not of an abbreviation or a number."""
    before = _BEFORE.search(text, start, end - 1)
    word = before[0].lower() if before else ""
    following = _NEXT.match(text, end)
    after = following[1] if following else ""
    is_start = after[:1].isupper() and after.lower() in _STARTERS
    if word.endswith("."):  # dots that leave something open
        return after[:1].isupper()
    if _NUMBER.fullmatch(word):  # "1. first" is one sentence, "in 1990. The" are two
        return not text[end:].lstrip()[:1].islower()
    if len(word) == 1 and word.isalpha() and word != "i":  # an initial
        return is_start
    if word in _ABBREVIATIONS or word.rpartition("-")[2] in _ABBREVIATIONS or _DOTTED.fullmatch(word):
        return is_start
    return True
