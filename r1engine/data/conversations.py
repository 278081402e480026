"""Conversations for supervised training from JSONL or Parquet, checked row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1engine.data.chat import Message
from r1engine.data.reading import AS_IS, Reading
from r1engine.data.rows import Row, missing, read_rows

FIELDS = ("question", "completion", "messages", "domain")
ROLES = ("user", "assistant", "system")


@dataclass(frozen=True)
class Conversation:
    """One row of a data file: perhaps a system message, then user and assistant in turns, the assistant last."""

    messages: list[Message]
    place: str  # "train.jsonl:7", for error messages
    domain: str = ""  # math, code, ..., of which the held-out loss is told apart; "": not said

    def until(self, *, train_on: str) -> list[list[Message]]:
        """The conversation up to each assistant turn (`all`), or up to the last one (`last`)."""
        turns = [i + 1 for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [self.messages[:end] for end in (turns if train_on == "all" else turns[-1:])]


def read_conversations(path: Path, reading: Reading = AS_IS) -> Iterator[Conversation]:
    """The conversations of a data file (or of all files of a folder or pattern), in file order.

    A row has `messages`, a list of objects with `role` (system, user or assistant) and `content`; or `question` and
    `completion`, which are a user's and an assistant's message. `domain` may stand beside them. Other fields are
    ignored. `reading` says which column is which.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a row is not as above; the row is named.
    """
    one_of = () if reading.columns else ("question", "messages")  # else `Reading.row` says what is missing
    for row in read_rows(path, reading.names(FIELDS), one_of=one_of):
        yield conversation_of(reading.row(row))


def conversation_of(row: Row) -> Conversation:
    """The conversation of a row of a data file; ValueError if it is none, with its place."""
    if "messages" in row.fields:
        messages = turns(row.fields["messages"], "messages", row.place, last="assistant")
    else:
        messages = _question_and_completion(row)
    return Conversation(messages, row.place, domain_of(row))


def domain_of(row: Row) -> str:
    """Field `domain` of a row, "" if it has none.

    Raises:
        ValueError: it is no text; the row is named.
    """
    if "domain" not in row.fields:
        return ""
    check_text(row.fields["domain"], "domain", row.place)
    return str(row.fields["domain"]).strip()


def _question_and_completion(row: Row) -> list[Message]:
    for field in ("question", "completion"):
        if field not in row.fields:
            raise ValueError(f"{row.place}: {missing(field, row.columns)}")
        check_text(row.fields[field], field, row.place)
    return [
        {"role": "user", "content": row.fields["question"]},
        {"role": "assistant", "content": row.fields["completion"]},
    ]


def turns(found: Any, name: str, place: str, *, last: str) -> list[Message]:
    """A list of messages: perhaps one of the system, then user and assistant in turns.

    Args:
        found: value of a field.
        name:  of the field.
        place: of the row, for messages.
        last:  the role of the last message.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(found, list) or not found:
        raise ValueError(f"{place}: {name} is {found!r:.80}, required a list that is not empty")
    messages = [_message(value, f"{name}[{i}]", place) for i, value in enumerate(found)]
    wanted = "user"
    for i, message in enumerate(messages):
        if message["role"] != wanted and not (i == 0 and message["role"] == "system"):
            raise ValueError(f"{place}: {name}[{i}].role is '{message['role']}', required {wanted}")
        wanted = "assistant" if message["role"] == "user" else "user"
    if messages[-1]["role"] != last:
        raise ValueError(f"{place}: the last message is {messages[-1]['role']}, required {last}")
    return messages


def _message(value: Any, name: str, place: str) -> Message:
    """One message; a field that would be lost, such as thoughts apart from the content, is refused."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {name} is {value!r:.80}, required an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise ValueError(f"{place}: {name}.role is {role!r:.80}, required user, assistant or system")
    others = {key for key, held in value.items() if held not in (None, "", [])} - {"role", "content"}
    if others:
        raise ValueError(
            f"{place}: {name} has {sorted(others)}, required role and content alone: thoughts stand in the content"
        )
    check_text(value.get("content"), f"{name}.content", place)
    return {"role": role, "content": value["content"]}


def check_text(text: Any, name: str, place: str) -> None:
    """Refuse what is no text.

    Raises:
        ValueError: it is none, blank, or not Unicode.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: {name} is {text!r:.80}, required a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {name} is {text!r:.80}, required a text that is Unicode: {error}") from error
