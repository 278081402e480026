"""Words in and around an answer: what they mean, one table row a word. The Chinese ones are in `chinese`."""

from __future__ import annotations

import re

from r1engine.rewards.math import chinese

CJK = "\u3400-\u4dbf\u4e00-\u9fff"


def any_of(words: tuple[str, ...]) -> str:
    """A pattern of one of the words, the longest first."""
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


# ---- what stands before an answer and says nothing ------------------------------------------------------------

_IS = r"(?:is|are|equals|equal to|must be|should be|will be|would be|comes to)"
_SO = r"(?:so|thus|hence|therefore)"
_ADJECTIVES = r"(?:(?:the|our|my|final|correct|exact|required|resulting|total|numerical|desired|only|overall)\s+)*"
_NOUNS = r"(?:results?|solutions?|values?|total|sum|number|choice)"
_CHINESE_ADJECTIVES = f"\\[?(?:{any_of(chinese.ADJECTIVES)}\u7684?)?"  # with or without a particle
# Each may stand there once, in this order.
_LABELS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?:{_SO}\s*,?\s+)?(?:{_ADJECTIVES}answers?(?:\s+{_IS}(?:\s*:\s*|\s+)|\s*[:=]\s*|\s+)"
        rf"|{_ADJECTIVES}{_NOUNS}(?:\s+of\s+[A-Za-z]{{1,12}})?(?:\s+{_IS}(?:\s*:\s*|\s+)|\s*[:=]\s*))",
        rf"(?:{_SO}|we (?:get|have|obtain)|(?:it|this|that)\s+{_IS})\s*[,:]?\s+",
        r"the\s[a-z' ]{1,60}\s(?:is|are|was|were|equals)\s+(?=[\d$\\+-])",
        rf"{any_of(chinese.CONCLUSIONS)}?[,:\s]*{_CHINESE_ADJECTIVES}{any_of(chinese.NOUNS)}\]?{any_of(chinese.COPULAS)}?[,:\s]*",
        rf"{any_of(chinese.CONCLUSIONS)}[,:\s]*(?=[^{CJK}])",
        rf"{any_of(chinese.TOTALS)}[,:\s]*",
        r"(?:exactly|precisely|just|only|about|approximately|approx\.?|roughly|around|nearly)\s*(?=[\d\\$.+-])",
        rf"{any_of(chinese.APPROXIMATELY)}\s*(?=[\d\\$.+-])",
    )
)
_LABEL_STARTS = re.compile(
    rf"(?:{_SO}|the|our|my|final|correct|exact|required|resulting|total|numerical|desired|only|overall|answer|{_NOUNS}"
    rf"|we|it|this|that|precisely|just|about|approx|roughly|around|nearly)|[{CJK},:\s]",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(
    rf"(?:\\text\{{\s*)?(?:negative|minus|{any_of(chinese.NEGATIVES)})\s*\}}?\s*(?=[\d\\.])", re.IGNORECASE
)


def without_label(text: str) -> str:
    """`text` without "the answer is", "so", "about" and their like before it, if anything else is left."""
    if not _LABEL_STARTS.match(text):
        return text
    for pattern in _LABELS:
        match = pattern.match(text)
        if match and match.end() < len(text):
            text = text[match.end() :]
    return text


def with_minus(text: str) -> str:
    """-5 for "negative 5" and its like."""
    if text[:1] in "\\NnMm" or not text[:1].isascii():
        return _NEGATIVE.sub("-", text, count=1) if _NEGATIVE.match(text) else text
    return text


# ---- what joins the items of a list ----------------------------------------------------------------------------

_JOINED = any_of(("and", "or", "as well as", "along with", *chinese.JOINED))
_AND = re.compile(
    rf"\s*,?\s*(?:\\text\{{\s*,?\s*{_JOINED}\s*\}}|(?<![\w\\{CJK}])(?:and|or)(?!\w)"
    rf"|(?<=[\d\w)}}\s]){any_of(chinese.JOINED)}(?=[\d\w(\\\s-]))\s*,?\s*"
)
_MIGHT_JOIN = re.compile(f"and|or|\\\\text|[{''.join({word[0] for word in chinese.JOINED})}]")


def with_commas(text: str) -> str:
    """A comma for each "and", "or" and their like between items."""
    return _AND.sub(", ", text) if _MIGHT_JOIN.search(text) else text


# ---- what changes the number before it, or says how it is meant ------------------------------------------------

# phrase -> LaTeX of the value `v` that it makes
OPERATORS = {
    "squared": "({v})^{{2}}",
    "cubed": "({v})^{{3}}",
    "factorial": "({v})!",
    "below zero": "-({v})",
    "below 0": "-({v})",
    "pi": "({v})\\pi",
    **chinese.OPERATORS,
}
# A value with one of these words is no plain value: comparisons, negations, directions, arithmetic, verbs.
_QUALIFIERS = frozenset((
    "or", "more", "less", "than", "fewer", "greater", "higher", "lower", "larger", "smaller", "bigger", "most", "least",
    "minimum", "maximum", "max", "exactly", "only", "just", "almost", "nearly", "about", "approximately", "roughly",
    "around", "much", "many", "something", "as", "so",
    "not", "no", "never", "without", "except", "excluding", "including", "inclusive", "exclusive", "neither", "either",
    "but", "if", "when", "where", "unless", "otherwise", "then",
    "up", "down", "over", "under", "above", "below", "before", "after", "beyond", "within", "between", "until", "since",
    "from", "to", "ago", "earlier", "later", "late", "early", "onward", "onwards", "upward", "upwards", "downward",
    "downwards", "away", "behind", "against", "beneath", "underground", "west", "south", "bc", "bce",
    "fold", "twice", "double", "doubled", "triple", "tripled", "halved", "half", "plus", "minus", "negative", "divided",
    "multiplied", "squared", "cubed", "factorial", "root", "power", "modulo", "mod", "remainder", "base", "inverse",
    "reciprocal", "opposite", "zero", "infinity", "infinite", "decimal", "choose", "pi",
    "short", "loss", "lost", "debt", "owed", "off", "discount", "decrease", "decreased",
    "is", "are", "was", "were", "be", "have", "has", "had", "does", "do", "can", "will", "would", "should", "may",
    "might",
))  # fmt: skip
_CHINESE_QUALIFIERS = re.compile(any_of(chinese.QUALIFIERS) + f"|(?:{chinese.SQUARE}|{chinese.CUBIC})$")


def is_qualifier(phrase: str) -> bool:
    """Whether the words behind a value say more of it than what is counted: "or more", "below zero"."""
    words = re.findall(r"[a-z]+", phrase.lower())
    return not _QUALIFIERS.isdisjoint(words) or _CHINESE_QUALIFIERS.search(phrase) is not None


# ---- answers that are words ------------------------------------------------------------------------------------

# A row a meaning: words that say the same. The first is the name of the row.
_SYNONYMS = (
    ("true", "t"),
    ("false", "f"),
    ("yes", "y"),
    ("no", "n"),
    ("infinity", "\\infty", "+\\infty", "infinite", "inf", "positive infinity"),
    ("-infinity", "-\\infty", "negative infinity", "minus infinity", "-inf"),
    ("does not exist", "dne", "doesn't exist", "nonexistent"),
    ("undefined", "not defined"),
)
_MEANINGS = {word: row[0] for row in _SYNONYMS for word in row} | chinese.MEANINGS
_TRUTH_VALUES = frozenset(("true", "false", "yes", "no"))

EMPTY = re.compile(
    r"\\emptyset|\\\{\s*\\\}|(?:there (?:is|are) )?no (?:real |such |integer |valid |possible )?"
    r"(?:solutions?|roots?|values?|numbers?)(?: exists?)?|none|(?:the )?(?:empty|null) set"
    rf"|{any_of(chinese.EMPTY)}",
    re.IGNORECASE,
)


def meaning(word: str) -> str:
    """The name of what a word says: "true" for T and True; the word itself where no row has it."""
    plain = " ".join(word.lower().split())
    return _MEANINGS.get(plain, plain)


def is_truth_value(word: str) -> bool:
    return meaning(word) in _TRUTH_VALUES
