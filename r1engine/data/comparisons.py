"""What reward models are trained on, from JSONL or Parquet, checked row by row: pairs of responses, and labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1engine.data.chat import Message
from r1engine.data.conversations import check_text, domain_of, turns
from r1engine.data.reading import AS_IS, Reading
from r1engine.data.rows import Row, missing, read_rows

Loss = Literal["pairwise", "pointwise"]


@dataclass(frozen=True)
class Comparison:
    """One row: a prompt with two responses, the better one first, or with one that is labelled."""

    prompt: list[Message]  # ends with the user
    responses: tuple[str, ...]
    value: float  # of a pair its delta (how much better the first one is), of a label 1 (safe) or 0
    domain: str  # of which the held-out accuracy is told apart; "": not said
    place: str  # "pairs.jsonl:7", for error messages


def read_comparisons(path: Path, loss: Loss, reading: Reading = AS_IS) -> Iterator[Comparison]:
    """The pairs (`pairwise`) or labels (`pointwise`) of a data file, in file order.

    A row has `prompt`, a text or a list of messages that ends with the user; `chosen` and `rejected`, perhaps with the
    number `delta`; or `response` and `safe`, true or false. `domain` may stand beside them. Other fields are ignored.
    `reading` says which column is which.

    Raises:
        ValueError: the file is missing, empty or of another kind, or a row is not as above; the row is named.
    """
    fields = ("chosen", "rejected", "delta") if loss == "pairwise" else ("response", "safe")
    one_of = () if reading.columns else ("prompt",)
    for found in read_rows(path, reading.names(("prompt", *fields, "domain")), one_of=one_of):
        row = reading.row(found)
        for field in ("prompt", *(name for name in fields if name != "delta")):
            if field not in row.fields:
                raise ValueError(f"{row.place}: {missing(field, row.columns)}{_other_kind(row, loss)}")
        names = ("chosen", "rejected") if loss == "pairwise" else ("response",)
        responses = tuple(_text(row, name) for name in names)
        value = _delta(row) if loss == "pairwise" else _label(row)
        yield Comparison(_prompt(row), responses, value, domain_of(row), row.place)


def _other_kind(row: Row, loss: Loss) -> str:
    labels, pairs = {"response", "safe"} <= {*row.columns}, {"chosen", "rejected"} <= {*row.columns}
    if loss == "pairwise" and labels:
        return "; these are labels: reward_model.loss = pointwise"
    return "; these are pairs: reward_model.loss = pairwise" if loss == "pointwise" and pairs else ""


def _prompt(row: Row) -> list[Message]:
    found = row.fields["prompt"]
    if isinstance(found, str):
        check_text(found, "prompt", row.place)
        return [{"role": "user", "content": found}]
    return turns(found, "prompt", row.place, last="user")


def _text(row: Row, field: str) -> str:
    check_text(row.fields[field], field, row.place)
    return str(row.fields[field])


def _delta(row: Row) -> float:
    found: Any = row.fields.get("delta", 0.0)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
        raise ValueError(f"{row.place}: delta is {found!r:.80}, required a number >= 0, how much better `chosen` is")
    return float(found)


def _label(row: Row) -> float:
    found = row.fields["safe"]
    if not isinstance(found, bool):
        raise ValueError(f"{row.place}: safe is {found!r:.80}, required true or false")
    return float(found)
