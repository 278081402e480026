"""Language consistency (paper, section 2.3.2): "the proportion of target language words in the CoT".

Scripts are decided exactly, character by character; languages that share the Latin script are told apart sentence
by sentence, never word by word, which no identifier can do. What has no language (code, formulas, digits, names of
variables) does not count.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from r1engine.rewards.identify import classify_all
from r1engine.rewards.record import Record, Verdict
from r1engine.rewards.rule import Rule, Task, find_all
from r1engine.rewards.thoughts import split_thoughts

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings

Detector = Literal["py3langid", "lingua"]

# First code point of each block, and its script; "" has none of interest. Sorted.
_BLOCKS = [
    (0x0000, ""), (0x0041, "Latin"), (0x005B, ""), (0x0061, "Latin"), (0x007B, ""), (0x00C0, "Latin"), (0x00D7, ""),
    (0x00D8, "Latin"), (0x00F7, ""), (0x00F8, "Latin"), (0x0250, ""), (0x0370, "Greek"), (0x0400, "Cyrillic"),
    (0x0530, "Armenian"), (0x0590, "Hebrew"), (0x0600, "Arabic"), (0x0700, ""), (0x0750, "Arabic"), (0x0780, ""),
    (0x0900, "Devanagari"), (0x0980, "Bengali"), (0x0A00, ""), (0x0B80, "Tamil"), (0x0C00, "Telugu"), (0x0C80, ""),
    (0x0E00, "Thai"), (0x0E80, ""), (0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, ""), (0x1E00, "Latin"),
    (0x1F00, "Greek"), (0x2000, ""), (0x3041, "Kana"), (0x30FB, ""), (0x30FC, "Kana"), (0x3100, ""),
    (0x3130, "Hangul"), (0x3190, ""), (0x3400, "Han"), (0x4DC0, ""), (0x4E00, "Han"), (0xA000, ""),
    (0xAC00, "Hangul"), (0xD7B0, ""), (0xF900, "Han"), (0xFB00, ""), (0xFB50, "Arabic"), (0xFE00, ""),
    (0xFE70, "Arabic"), (0xFF00, ""), (0x20000, "Han"), (0x32000, ""),
]  # fmt: skip
_STARTS = [start for start, _ in _BLOCKS]
# Languages of one of these scripts are not told apart: Russian and Ukrainian are both right where either is asked for.
SCRIPT_LANGUAGES = {
    "Han": ("zh",), "Kana": ("ja",), "Hangul": ("ko",), "Cyrillic": ("ru", "uk", "bg", "sr", "mk", "be"),
    "Arabic": ("ar", "fa", "ur"), "Greek": ("el",), "Hebrew": ("he",), "Thai": ("th",),
    "Devanagari": ("hi", "mr", "ne"), "Bengali": ("bn",), "Tamil": ("ta",), "Telugu": ("te",), "Armenian": ("hy",),
    "Georgian": ("ka",),
}  # fmt: skip
LATIN_LANGUAGES = (
    "en", "fr", "de", "es", "it", "pt", "nl", "pl", "sv", "da", "fi", "cs", "hu", "ro", "tr", "vi", "id", "ca", "hr",
)  # fmt: skip
_LATIN_CANDIDATES = ("en", "fr", "de", "es", "it", "pt", "nl")  # and the target: the fewer, the surer
_LANGUAGE_SCRIPT = {code: script for script, codes in SCRIPT_LANGUAGES.items() for code in codes}
_PER_CHARACTER = ("Han", "Kana", "Thai")  # written without spaces: a character counts as a word
# The same characters inside of a regular expression's [ ].
PER_CHARACTER_CLASS = "".join(
    f"{chr(start)}-{chr(after - 1)}" for (start, script), (after, _) in pairwise(_BLOCKS) if script in _PER_CHARACTER
)
_JAPANESE_WITHOUT_KANA = 8  # so many Han characters alone may be a Japanese name; a sentence has kana

CONSISTENT = 0.9  # share of target-language words from which reward "language" says right
MAX_CHARACTERS = 200_000
CHUNK_WORDS = 8  # Latin words that make a decision sure; shorter sentences are decided together
MIN_WORDS = 4  # Latin words below which there is no decision

_NO_LANGUAGE = re.compile(
    r"```.{0,5000}?```|`[^`\n]{0,500}`"  # code; an unclosed fence hides nothing
    r"|\$\$.{0,2000}?\$\$|\$[^$\n]{0,500}\$|\\\(.{0,2000}?\\\)|\\\[.{0,2000}?\\\]"  # formulas
    r"|\\begin\{(\w{1,20}\*?)\}.{0,2000}?\\end\{\1\}"
    r"|\\[A-Za-z]+|</?\w{1,20}>|https?://\S+",  # each begins with its own letter, which keeps the search quick
    re.DOTALL | re.ASCII,
)
_NAME = re.compile(r"(?<!\w)[A-Za-z]*+[\d_]\w*", re.ASCII)  # numbers and names of variables
_SENTENCE = re.compile(r"[.!?;:\n\u3002\uff01\uff1f\uff1b\uff1a\u0964\u061f]+")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_ASCII_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")  # the same on ASCII, quicker
_MATH_NAMES = frozenset(("sin", "cos", "tan", "cot", "log", "ln", "exp", "mod", "max", "min", "gcd", "lcm", "det"))


def language_share(
    text: str, target: str, *, detector: Detector = "py3langid"
) -> tuple[float | None, int, dict[str, int]]:
    """Proportion of words of `text` that are in the target language.

    Repeated sentences count once, so that padding with a phrase in the target language gains nothing.

    Args:
        text: the chain of thought; what is past MAX_CHARACTERS does not count.
        target: ISO 639-1 code, see `check_language`.
        detector: what tells Latin-script languages apart; "lingua" needs the package lingua-language-detector.

    Returns:
        (proportion from 0 to 1, or None if there are no words; number of words; words by language). Characters of
        Chinese, Japanese and Thai count as words.
    """
    found = Counter[str]()
    latin: list[str] = []
    in_latin = _LANGUAGE_SCRIPT.get(target) is None
    for sentence in dict.fromkeys(_sentences(text[:MAX_CHARACTERS])):
        scripts, words = _count(sentence)
        for script, number in scripts.items():
            found[_language_of_script(script, scripts, target)] += number
        if words and in_latin:
            latin.append(" ".join(words))
        elif words:
            found["Latin script"] += len(words)
    chunks = _chunks(latin)
    for chunk, language in zip(chunks, _identify(chunks, target, detector), strict=True):
        found[language] += len(chunk.split())
    found += Counter()  # drops zeros
    total = sum(found.values())
    return (found[target] / total if total else None), total, dict(found)


def language_of(text: str, *, detector: Detector = "py3langid") -> str:
    """ISO 639-1 code of the language that most of a text is in; "" if it has no words."""
    scripts, words = Counter[str](), []
    for sentence in _sentences(text[:MAX_CHARACTERS]):
        counts, latin = _count(sentence)
        scripts += counts
        words += latin
    if scripts["Kana"]:
        scripts["Kana"] += scripts.pop("Han", 0)
    if words and len(words) >= max(scripts.values(), default=0):
        return _identify([" ".join(words[:200])], "en", detector)[0]
    return SCRIPT_LANGUAGES[scripts.most_common(1)[0][0]][0] if scripts else ""


def check_language(code: str, where: str) -> None:
    """Refuses what is no known language.

    Raises:
        ValueError: `code` is none of the ISO 639-1 codes of SCRIPT_LANGUAGES and LATIN_LANGUAGES.
    """
    known = sorted([*_LANGUAGE_SCRIPT, *LATIN_LANGUAGES])
    if code not in known:
        raise ValueError(f"{where}: found language '{code}', required one of {', '.join(known)}")


def _sentences(text: str) -> list[str]:
    parts = _SENTENCE.split(_NAME.sub(" ", _NO_LANGUAGE.sub(" ", text)))
    return [part.strip() for part in parts if part.strip()]


def _count(sentence: str) -> tuple[Mapping[str, int], list[str]]:
    """(words, or characters, by script; the words in Latin script)."""
    if sentence.isascii():
        return {}, list(filter(_has_language, _ASCII_WORD.findall(sentence)))
    scripts, latin = Counter[str](), []
    for word in _WORD.findall(sentence):
        if word.isascii():  # the same as below, quicker
            if _has_language(word):
                latin.append(word)
            continue
        here = Counter(_BLOCKS[bisect_right(_STARTS, ord(character)) - 1][1] for character in word)
        for script in here:
            if script == "Latin":
                # A mixed "word" is Latin letters inside a script without spaces.
                piece = word if len(here) == 1 else "".join(c for c in word if c.isascii())
                if _has_language(piece):
                    latin.append(piece)
            elif script:
                scripts[script] += here[script] if script in _PER_CHARACTER else 1
    return scripts, latin


@lru_cache(2**16)
def _has_language(word: str) -> bool:
    """Whether a word in Latin script is of a language: it is no name of a variable, of a function or of an agency."""
    return not (len(word) < 2 or (word.isupper() and len(word) <= 4) or word.lower() in _MATH_NAMES)


def _language_of_script(script: str, scripts: Mapping[str, int], target: str) -> str:
    """The language of the words in one script of a sentence."""
    if script == "Han":  # Japanese if there is kana, or where a short sentence leaves it open
        short = target == "ja" and scripts["Han"] <= _JAPANESE_WITHOUT_KANA
        return "ja" if scripts["Kana"] or short else "zh"
    languages = SCRIPT_LANGUAGES[script]
    return target if target in languages else languages[0]


def _chunks(sentences: list[str]) -> list[str]:
    """Sentences joined until each chunk has CHUNK_WORDS words."""
    chunks: list[str] = []
    waiting = ""
    for sentence in sentences:
        waiting = f"{waiting} {sentence}".strip()
        if len(waiting.split()) >= CHUNK_WORDS:
            chunks.append(waiting)
            waiting = ""
    if waiting and chunks:
        chunks[-1] += " " + waiting
    elif len(waiting.split()) >= MIN_WORDS:
        chunks.append(waiting)
    return chunks


def _identify(chunks: list[str], target: str, detector: Detector) -> list[str]:
    candidates = tuple(sorted({*_LATIN_CANDIDATES, target}))
    if detector == "lingua":
        return [_lingua(candidates)(chunk) for chunk in chunks]
    return classify_all([chunk.lower() for chunk in chunks], candidates)


@cache
def _lingua(candidates: tuple[str, ...]) -> Callable[[str], str]:
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    codes = [getattr(IsoCode639_1, code.upper()) for code in candidates]
    lingua = LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()

    def identify_with_lingua(text: str) -> str:
        language = lingua.detect_language_of(text)
        return language.iso_code_639_1.name.lower() if language else "unknown"

    return identify_with_lingua


def _grade(completion: str, record: Record, settings: ScorerSettings) -> Task:
    """A completion without think tags is thoughts as a whole."""
    thoughts = split_thoughts(completion, think_prefilled=record.think_prefilled).thoughts
    text = completion if thoughts is None else thoughts
    return Task(compute, (text, record.question.language, record.asked, settings.detector))


def compute(text: str, target: str, asked: str, detector: Detector) -> tuple[Verdict, str, dict[str, float]]:
    """(verdict, reason, {"language": share}) of thoughts; the target "" is the language of what is asked."""
    target = target or language_of(asked, detector=detector)
    share, num_words, by_language = language_share(text, target, detector=detector) if target else (None, 0, {})
    if share is None:
        return "undecided", "there are no words outside code and formulas" if target else "no target language", {}
    others = ", ".join(f"{n} {name}" for name, n in by_language.items() if name != target)
    reason = f"{share:.0%} of {num_words} words are {target}" + (f"; also {others}" if others else "")
    return "right" if share >= CONSISTENT else "wrong", reason, {"language": share}


def warm_up() -> None:
    """Loads the identifier."""
    language_of("what language is this sentence written in")


LANGUAGE = Rule("language", _grade, find=find_all, component="language", warm_up=warm_up)
