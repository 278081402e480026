"""How the rows of a data file become the fields that the engine knows: which column is which, what the reference is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from r1engine.data.rows import Row

AnswerForm = Literal["auto", "value", "hashes", "boxed"]
_HASHES = re.compile(r"^####[ \t]*(\S.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Reading:
    """What is read of a row, and as what: of questions, of texts, of pairs."""

    columns: Mapping[str, str] = field(default_factory=dict)  # our field -> its column; dots lead into nested values
    answer_form: AnswerForm = "auto"  # see `reference_in`
    around: tuple[str, str] = ("", "")  # texts before and after every question, which are taken off
    name: str = "data.columns"  # what to name in a message: the setting
    keeps_columns: bool = False  # the other columns, too, for reward functions
    foreign: tuple[str, ...] = ()  # columns that have the name of one of our fields and mean something else

    def names(self, fields: tuple[str, ...]) -> tuple[str, ...]:
        """The columns that may hold any of `fields`, the first one's first."""
        plain = [self.columns.get(name, name) for name in fields]
        nested = [path.partition(".")[0] for path in plain if "." in path]
        return tuple(dict.fromkeys([*plain, *nested, *fields]))

    def row(self, row: Row) -> Row:
        """The row with our fields, the other columns as they are.

        Raises:
            ValueError: a column that the setting names is not there; those that are there are named.
        """
        if not self.columns and self.around == ("", ""):
            return row
        fields = {name: value for name, value in row.fields.items() if name not in self.foreign}
        for own, path in self.columns.items():
            is_there, value = _at(row.fields, path)
            if not is_there and path.partition(".")[0] not in row.columns:
                raise ValueError(
                    f"{row.place}: {self.name}: found no column '{path}' for {own}, only {', '.join(row.columns)}"
                )
            if not is_there:
                raise ValueError(f"{row.place}: {self.name}: found nothing at '{path}', required the {own}")
            fields[own] = _as_field(own, value, row.place, path)
        if isinstance(fields.get("question"), str):
            before, after = self.around
            fields["question"] = fields["question"].removeprefix(before).removesuffix(after)
        return Row(row.path, row.number, fields, row.columns)


AS_IS = Reading()


def reference_in(answer: str, form: AnswerForm) -> str:
    """The reference in a row's answer, which may be a whole solution.

    hashes: behind the last `#### `, as in GSM8K; boxed: in the last `\\boxed{}`, as in MATH; value: all of it. auto is
    hashes where a line begins with `####`; boxed where there is one box, and other text; else value.

    Raises:
        ValueError: there is none of this form.
    """
    from r1engine.rewards.extract import last_boxed

    hashes = _HASHES.findall(answer)
    if form == "hashes" or (form == "auto" and hashes):
        if not hashes:
            raise ValueError(f"answer is {answer!r:.60}, required a line that begins with ####")
        return hashes[-1]
    if form == "boxed" or (form == "auto" and answer.count("\\boxed") == 1 and not answer.startswith("\\boxed")):
        box = last_boxed(answer)
        if box is None and form == "boxed":
            raise ValueError(f"answer is {answer!r:.60}, required a \\boxed{{}} that is closed")
        return answer if box is None else box
    return answer


def _at(fields: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """(whether it is there, the value) of a path; a column whose name has dots comes before one that is nested."""
    if path in fields:
        return True, fields[path]
    value: Any = fields
    for part in path.split("."):
        if isinstance(value, Mapping) and value.get(part) is not None:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdecimal() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value


# Of a list of messages, whose only one is the field.
_SPEAKERS = {"question": "user"} | dict.fromkeys(("completion", "chosen", "rejected", "response"), "assistant")
_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them


def _as_field(own: str, value: Any, place: str, path: str) -> Any:
    """What a list of messages is to a field: a list with role and content, or the text of one; else the value."""
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        return value
    messages = [_message(message) for message in value]
    if (speaker := _SPEAKERS.get(own)) is None:
        return messages if own in ("messages", "prompt") else value
    texts = [message.get("content") for message in messages if message.get("role") == speaker]
    if len(texts) != 1:
        raise ValueError(f"{place}: {path} holds {len(texts)} messages of the {speaker}, required one: the {own}")
    return texts[0]


def _message(found: Mapping[str, Any]) -> dict[str, Any]:
    """ShareGPT's `from` and `value` are role and content."""
    if "from" not in found or "role" in found:
        return dict(found)
    rest = {key: value for key, value in found.items() if key not in ("from", "value")}
    return {"role": _ROLES.get(found["from"], found["from"]), "content": found.get("value"), **rest}
