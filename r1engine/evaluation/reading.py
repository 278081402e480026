"""Reads the answer out of what follows a model's thoughts. No torch.

What cannot be read is no answer: nothing is guessed. Every function takes the whole reply and returns (answer, "") or
(None, why there is none). The last reading counts: a model that corrects itself means the correction.
"""

from __future__ import annotations

import re

from r1engine.rewards.choice import choices
from r1engine.rewards.extract import answer_region, final_answer, last_boxed

Reading = tuple[str | None, str]

LETTERS = "ABCDEFGHIJ"
_UNREAD = "no answer could be read"
# "Answer" in the languages that models answer in: German, French, Spanish, Portuguese, Italian, Chinese.
_LABELS = (
    "(?:answer|antwort|r\u00e9ponse|respuesta|resposta|risposta|\u7b54\u6848|\u6b63\u786e\u9009\u9879"
    "|\u6700\u7ec8\u9009\u62e9)"
)
_IS = r"(?:\s*(?:\uff1a|:|=)|\s+(?:is|would be|should be|must be|ist|est|es)\b\s*:?|\s*[\u662f\u4e3a]\s*[:\uff1a]?)"
_NOUN = r"(?:(?:the\s+)?(?:option|choice|letter|answer)\s+|\u9009\u9879)?"
_ANCHOR = (
    rf"(?:{_LABELS}[\"'*_]*{_IS}"
    rf"|\b(?:correct|right|best|final)\s+(?:option|choice|letter)[*_]*{_IS}"
    r"|\b(?:pick|choose|select|go\s+with)\b|(?:\u6545|\u5e94|\u56e0\u6b64)?\u9009(?:\u62e9)?[:\uff1a]?)"
)
_MARKS = r"[\s*_`\"'$(\[{\uff08\u201c]*"
_WRAPPED = r"(?:\\(?:text|textbf|mathrm|mathbf|boxed)\{[\s(]*|\\\()?"
# No letter of a word, of a list of letters, or of "I" and "a" in a sentence.
_AFTER = r"(?![\w'\u2019])(?!\s*[)*\]}\"]*\s*(?:or|and|/|,|&)\s*\(?[A-J](?![\w'\u2019]))"
_ANCHORED = re.compile(rf"{_ANCHOR}{_MARKS}(?i:{_NOUN}){_MARKS}{_WRAPPED}(?-i:([A-Ja-j])){_AFTER}", re.IGNORECASE)
_ENDS = re.compile(r"[\s)\]}.*_`\"'$\uff09\u3002\u201d]*(?:\n|$)")  # a small letter is one only where nothing follows
_GOES_ON = re.compile(r"[ \t]+(?!because|since|as |for |but |and |is |which|with|by )[a-z]")  # "I think", "A good one"
_ALONE = re.compile(rf"{_MARKS}{_WRAPPED}([A-J])[\s)\]}}.*_`\"'$\uff09\u3002\u201d]*")
_ANSWER_LINE = re.compile(r"answer[*_]*\s*:[*_]*[ \t]*([^\n]+)", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\b(?:answer\s+is)\b\s*:?[ \t]*([^\n]+)", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_CLOSING_STARS = re.compile(r"\*+(?=[.\s]*$)")
_FBOX = re.compile(r"\\fbox\s*\{([^{}]*)\}|\\boxed\s+([^\s{}$]+)")
_FINAL_IS = re.compile(r"(?:final\s+)?answer\s+is\s*:?\s*\$([^$\n]+)\$", re.IGNORECASE)


def letter(reply: str, options: int = 4) -> Reading:
    """The letter of the option that is chosen, among the first `options`.

    It is named behind "Answer:", "the answer is", "I pick" and the like, in a box, in JSON's "answer", or it is a
    line of its own, the last. A small letter must end its line: "the answer is a safe choice" names none.
    """
    text, why_none = _rest(reply)
    if text is None:
        return None, why_none
    found: list[tuple[int, str]] = [
        (match.start(), match[1]) for match in _ANCHORED.finditer(text) if _is_named(text, match)
    ]
    if "\\boxed" in text and (box := last_boxed(text)) is not None and len(chosen := choices(box)) == 1:
        found.append((text.rfind("\\boxed"), next(iter(chosen))))
    lines = text.strip().splitlines()
    if lines and (alone := _ALONE.fullmatch(lines[-1].strip())):
        found.append((len(text), alone[1]))
    if not found:
        return None, _UNREAD
    last = max(found)[1].upper()
    return (last, "") if last in LETTERS[:options] else (None, f"found {last}, which is no option")


def answer_line(reply: str) -> Reading:
    """What stands behind the last "Answer:", up to the end of its line."""
    return _last(reply, _ANSWER_LINE)


def the_answer_is(reply: str) -> Reading:
    """What stands behind the last "the answer is", up to the end of its line."""
    found = _last(reply, _ANSWER_IS)
    return found if found[0] is not None else answer_line(reply)


def math_answer(reply: str) -> Reading:
    """The answer as the reward finds it (an `<answer>` block or the last box), else as other formats write it.

    These are: `Answer: 18` on a line, `#### 18`, "the answer is $18$", `\\fbox{18}` and a box without braces. A box
    that is begun and never closed is no answer.
    """
    found, why_none = final_answer(reply)
    if found is not None:
        return found, ""
    text, why_unread = _rest(reply)
    if text is None:
        return None, why_unread
    if "\\boxed{" in text:
        return None, why_none
    places = [
        (match.start(), next(group for group in match.groups() if group))
        for pattern in (_ANSWER_LINE, _HASHES, _FINAL_IS, _FBOX)
        for match in pattern.finditer(text)
    ]
    if not places:
        return None, why_none
    return max(places)[1].strip().strip("*").strip(), ""


def summary(reply: str) -> Reading:
    """All that follows the thoughts."""
    text, why_none = _rest(reply)
    if text is None:
        return None, why_none
    return (text.strip(), "") if text.strip() else (None, "the reply is blank")


def _rest(reply: str) -> Reading:
    region, why_none = answer_region(reply)
    return (None, why_none) if region is None else (region.text, "")


def _last(reply: str, pattern: re.Pattern[str]) -> Reading:
    text, why_none = _rest(reply)
    if text is None:
        return None, why_none
    found = pattern.findall(text)
    answer = _CLOSING_STARS.sub("", found[-1].strip().lstrip("*")).strip() if found else ""
    return (answer, "") if answer else (None, _UNREAD)


def _is_named(text: str, match: re.Match[str]) -> bool:
    """Whether the letter stands for itself, and is no word of the sentence: "a", "A" and "I" may be."""
    if match[1].islower():
        return _ENDS.match(text, match.end()) is not None
    return match[1] not in "AI" or _GOES_ON.match(text, match.end()) is None
