"""A question: what is asked, and what the grading of its answers needs. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

DOMAINS = {"math": "math", "code": "code", "choice": "stem", "gym": "logic", "exact": "logic"}


@dataclass(frozen=True)
class Question:
    """One question of a data file. Prompts and records hold it whole: a field stands here and in `read_question`."""

    text: str  # without a template; field `question` of a file
    answer: str = ""  # reference answer; "" if there is none
    reward: str = "math"  # the rule that grades it, see r1engine.rewards.rules
    tests: Any = None  # JSON value: of "code" see `code.problems.parse_problem`, of "gym" `gym.gym_records`
    language: str = ""  # that the thoughts are to be in (ISO 639-1); "": that of the question
    rated_by: str = ""  # of "preference": helpfulness or harmlessness, whose reward model alone counts; "": all
    domain: str = ""  # what is counted together: math, code, stem, logic, general, ...; "": by the reward
    place: str = field(default="", compare=False)  # "train.jsonl:7", for error messages
    columns: Any = None  # JSON object of the row's other columns, where reward functions may ask for them

    @property
    def counted_as(self) -> str:
        """Its domain: what the file says, else what its reward is mostly of (Table 5 of the paper's later version)."""
        return self.domain or DOMAINS.get(self.reward, "general")

    def as_row(self) -> dict[str, Any]:
        """The fields of a line of a data file; `read_question` of it gives this question (but for the columns)."""
        row = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "place"}
        if self.columns is None:
            del row["columns"]
        if not self.rated_by:
            del row["rated_by"]
        return {"question": row.pop("text"), **row}
