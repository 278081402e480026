"""Rules for answers of several parts: chains of equations, named values, sets, tuples, vectors, intervals and lists."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from r1engine.rewards.math.decision import Comparer, Decision, all_of
from r1engine.rewards.math.normalize import Answer, is_name, normalize
from r1engine.rewards.math.structure import chain, items, kind, split
from r1engine.rewards.math.words import is_truth_value

MAX_UNORDERED = 50  # matching the items of two sets is quadratic

_COORDINATES = (["x", "y"], ["x", "y", "z"], ["a", "b"], ["a", "b", "c"], ["r", "\\theta"])
_WORD = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_TUPLE_OF_NAMES = re.compile(r"\(([^()=]+)\)\s*=\s*(\(.*\))")


def chains(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """a = b = c. The last member of a reference counts, but every member of an answer must be right."""
    if "=" not in answer.text + answer.equation + reference.text:
        return None
    required, members = chain(reference.text), chain(answer.text)
    if len(required) > 1 and (reference.equation or len(required) > 2 or _is_numeric(required)):
        return judge.compare(answer, normalize(required[-1])) if _is_numeric(required[-1:]) else None
    states_values = len(members) > 2 or answer.equation or _is_numeric(members)
    if len(members) < 2 or len(required) > 1 or not states_values:
        return None
    members = [member for member in members if member and not is_name(member)]
    return all_of([judge.compare(normalize(member), reference) for member in members])


def named_values(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """x = 1, y = 2: values of different unknowns agree by name, in any order.

    Against a tuple, (x, y) and their like have their usual order. x_1 and x_2, or a list without names, may be meant
    in either order: what fits only in another one is undecided.
    """
    if answer.equation and reference.equation and _name_different_unknowns(answer, reference):
        verdict, reason = judge.compare(replace(answer, equation=""), replace(reference, equation=""))
        return (verdict, reason) if verdict == "wrong" else ("undecided", "the values agree, but not their names")
    found, required = (_named(side) for side in (answer, reference))
    if found is not None and required is not None:
        return _by_name(judge, found, required)
    names = found or required
    if names is None:
        return None
    other = reference if found else answer
    if kind(other.text) not in ("pair", "list", "vector", "set"):
        return None
    values = _items(other)
    if any(item.equation for item in values):
        return None
    if len(values) != len(names):
        return "wrong", f"{len(_items(answer))} items, required {len(_items(reference))}"
    in_order = [names[name] for name in sorted(names)]
    decided = _in_order(judge, in_order, values, found is not None)
    if decided[0] != "wrong":
        return decided
    if kind(other.text) == "pair" and sorted(names) in _COORDINATES:
        return decided
    given = _in_order(judge, list(names.values()), values, found is not None)
    if given[0] == "right" and kind(other.text) != "pair":
        return given
    verdict, reason = (
        _matched(judge, list(names.values()), values) if found else _matched(judge, values, list(names.values()))
    )
    if verdict == "wrong":
        return verdict, reason
    if _is_one_unknown(names) and kind(other.text) != "pair":
        return verdict, reason
    return "undecided", "the values agree, but only one side names them"


def _name_different_unknowns(answer: Answer, reference: Answer) -> bool:
    """x = 5 and y = 5; not y = 2x and f(x) = 2x, which name one function."""
    if answer.number is None or reference.number is None or answer.name == reference.name:
        return False
    return all(re.fullmatch(r"[A-Za-z]|\\[a-z]+", side.name) for side in (answer, reference))


def _named(side: Answer) -> dict[str, Answer] | None:
    """The values by name, if there are several names and all parts have one; also of (x, y) = (1, 2)."""
    whole = _TUPLE_OF_NAMES.fullmatch(side.equation) if side.equation.startswith("(") else None
    if whole and kind(whole[2]) == "pair":
        names, values = whole[1].split(","), _items(side)
        return {n.strip(): v for n, v in zip(names, values, strict=True)} if len(names) == len(values) else None
    if "=" not in side.text and "=" not in side.equation:
        return None
    if kind(side.text) not in ("list", "set"):
        return None
    parts = _items(side)
    names = [part.name for part in parts if part.equation]
    if len(names) != len(parts) or len(set(names)) < 2:
        return None
    repeated = {name: count for name, count in Counter(names).items() if count > 1}
    # Of several solutions each name has several values; they are compared as a list.
    return None if len(repeated) == len(set(names)) else dict(zip(_numbered(names), parts, strict=True))


def _numbered(names: list[str]) -> list[str]:
    """The names, a repeated one with primes: in x = 1, y = 2, x = 3 two values of x contradict each other."""
    return [name + "'" * names[:place].count(name) for place, name in enumerate(names)]


def _by_name(judge: Comparer, found: dict[str, Answer], required: dict[str, Answer]) -> Decision:
    if found.keys() == required.keys():
        decided = all_of([judge.compare(found[name], required[name]) for name in required])
        in_any_order = decided[0] == "wrong" and _is_one_unknown(required)
        if in_any_order and _matched(judge, list(found.values()), list(required.values()))[0] != "wrong":
            return "undecided", "the values agree, but not by their numbers"
        return decided
    if len(found) != len(required) or found.keys() & required.keys():
        return "wrong", f"found {', '.join(found)}, required {', '.join(required)}"[:120]
    verdict, reason = _matched(judge, list(found.values()), list(required.values()))
    if verdict == "wrong":
        return verdict, reason
    if _is_one_unknown(found) and _is_one_unknown(required):
        return verdict, reason
    return "undecided", "the values agree, but not their names"


def _is_one_unknown(names: dict[str, Answer]) -> bool:
    """Whether x_1 and x_2 number the values of one unknown."""
    return len({re.sub(r"_?\d+$", "", name) for name in names}) == 1


def words_in_order(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """Truth values have the order of what they judge. Other words in another order may rank something: undecided."""
    if kind(answer.text) != "list" or kind(reference.text) != "list":
        return None
    found, required = ([_bare(item) for item in split(side.text)] for side in (answer, reference))
    if not all(_WORD.fullmatch(item) for item in (*found, *required)) or len(required) < 2:
        return None
    if len(found) == len(required):
        decided = all_of([judge.compare(normalize(a), normalize(b)) for a, b in zip(found, required, strict=True)])
        if decided[0] != "wrong":
            return decided
    if all(map(is_truth_value, (*found, *required))):
        return "wrong", "other truth values"
    decided = _matched(judge, [normalize(item) for item in found], [normalize(item) for item in required])
    return ("undecided", "the same words in another order") if decided[0] == "right" else decided


def _bare(item: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}", r"\1", item).strip()


def collections(judge: Comparer, answer: Answer, reference: Answer) -> Decision | None:
    """Sets, tuples, vectors, intervals and lists; None if the reference is none of them."""
    kinds = shape, required_shape = kind(answer.text), kind(reference.text)
    if kinds in (("vector", "pair"), ("pair", "vector")):
        return _ordered(judge, answer, reference)
    if "vector" in kinds:
        in_brackets = [side.text.startswith("\\langle") for side in (answer, reference)]
        return _ordered(judge, answer, reference) if kinds == ("vector", "vector") and any(in_brackets) else None
    if required_shape in ("other", "relation"):
        # +-1 stands for two values.
        is_single = shape in ("other", "relation") or "\\pm" in reference.text
        return None if is_single else ("wrong", f"found {shape}, required a single value")
    if (shape != required_shape and "list" not in kinds) or set(kinds) == {"interval", "list"}:
        found = "a single value" if shape in ("other", "relation") else shape
        return ("wrong", f"found {found}, required {required_shape}") if "\\pm" not in answer.text else None
    if "interval" in kinds and (answer.text[0], answer.text[-1]) != (reference.text[0], reference.text[-1]):
        return "wrong", "the ends of the interval differ"
    if "pair" in kinds or "interval" in kinds:
        return _ordered(judge, answer, reference)
    if "\\pm" in answer.text + reference.text:
        return None
    return _unordered(judge, answer, reference)


def _ordered(judge: Comparer, answer: Answer, reference: Answer) -> Decision:
    return _in_order(judge, _items(answer), _items(reference), True)


def _in_order(judge: Comparer, found: list[Answer], required: list[Answer], is_found_first: bool) -> Decision:
    if not is_found_first:
        found, required = required, found
    if len(found) != len(required):
        return "wrong", f"{len(found)} items, required {len(required)}"
    return all_of([judge.compare(a, b) for a, b in zip(found, required, strict=True)])


def _unordered(judge: Comparer, answer: Answer, reference: Answer) -> Decision:
    """Every item has its partner; naming one twice does no harm where the reference names none twice."""
    found, left = _items(answer), _items(reference)
    if len({_without_spaces(item) for item in left}) == len(left):
        found = list({_without_spaces(item): item for item in found}.values())
    return _matched(judge, found, left)


def _matched(judge: Comparer, found: list[Answer], required: list[Answer]) -> Decision:
    """Every item found has a partner of its own in what is required."""
    if len(found) != len(required):
        return "wrong", f"{len(found)} items, required {len(required)}"
    if len(found) > MAX_UNORDERED:
        return "undecided", f"more than {MAX_UNORDERED} items"
    left, undecided = list(required), ""
    for item in found:
        decisions = [judge.compare(item, other) for other in left]
        verdicts = [verdict for verdict, _ in decisions]
        if "right" in verdicts:
            del left[verdicts.index("right")]
        elif "undecided" in verdicts:
            undecided = decisions[verdicts.index("undecided")][1]
        else:
            return "wrong", f"the item {item.text} is not in the reference"[:120]
    return ("undecided", undecided) if undecided else ("right", "same items")


def _items(side: Answer) -> list[Answer]:
    """The parts; a unit behind the last of them is the unit of all."""
    return [normalize(item) for item in items(side.text, kind(side.text))]


def _without_spaces(item: Answer) -> str:
    return item.text.replace(" ", "") + item.unit


def with_name(side: Answer) -> Answer:
    """The answer with its "x =" again."""
    return replace(side, text=side.equation or side.text)


def _is_numeric(members: list[str]) -> bool:
    """Whether no member has a variable, so that a = b states two values."""
    return not any(re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", member)) for member in members)
