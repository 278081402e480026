"""IFEval: does a reply follow the instructions that a program can check? (Zhou et al., arXiv 2311.07911). No torch.

Strict judges the reply as it is. Loose forgives an opening or closing line and stars: an instruction is followed if one
of eight variants of the reply follows it. The thoughts are no part of the reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.evaluation.benchmark import Benchmark, Item, Marked, Reply, ask_alone
from r1engine.evaluation.files import FileRow, object_rows, unique
from r1engine.evaluation.ifeval.checks import CHECKS, LANGUAGES, RELATIONS
from r1engine.evaluation.reading import summary

_NUMBERS = ("num_", "nth_", "frequency", "let_frequency", "capital_frequency")


def load_ifeval(settings: BenchmarkSettings) -> list[Item]:
    """The owners' file: prompts with the names and arguments of their instructions."""
    rows = object_rows(settings.file, ("key", "prompt", "instruction_id_list", "kwargs"))
    items = []
    for row, one in zip(rows, unique(row.text("key") for row in rows), strict=True):
        names, given = row.items("instruction_id_list"), row.items("kwargs")
        if len(names) != len(given):
            raise ValueError(f"{row.place}: found {len(names)} instructions and {len(given)} kwargs, required as many")
        instructions = [[name, _arguments(row, name, kwargs)] for name, kwargs in zip(names, given, strict=True)]
        items.append(Item(one, Question(row.text("prompt"), place=row.place), data={"instructions": instructions}))
    return items


def _arguments(row: FileRow, name: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an instruction; those that are null are absent, as in copies of the file with all columns."""
    if name not in CHECKS:
        raise ValueError(f"{row.place}: found the instruction {name!r:.60}, required one of IFEval's {len(CHECKS)}")
    found = {key: value for key, value in kwargs.items() if value is not None} if isinstance(kwargs, dict) else {}
    for key in CHECKS[name][1]:
        if (wanted := _wanted(key, found.get(key))) != "":
            raise ValueError(f"{row.place}: {key} of {name} is {found.get(key)!r:.60}, required {wanted}")
    return {key: found[key] for key in CHECKS[name][1]}


def _wanted(key: str, value: Any) -> str:
    """What an argument should be, or "" if it is that."""
    if key in ("keywords", "forbidden_words"):
        is_list = isinstance(value, list) and value and all(isinstance(word, str) and word for word in value)
        return "" if is_list else "a list of words"
    if key.endswith("relation"):
        return "" if value in RELATIONS else " or ".join(RELATIONS)
    if key.startswith(_NUMBERS):
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if key == "language":
        return "" if value in LANGUAGES else f"one of {', '.join(LANGUAGES)}"
    return "" if isinstance(value, str) and value.strip() else "a text"


def followed(instructions: Sequence[Sequence[Any]], reply: str) -> tuple[list[bool], list[bool]]:
    """(strict, loose): whether each instruction is followed by a reply without its thoughts.

    Args:
        instructions: (name, arguments) of each.
        reply:        what the model answered; a blank one follows nothing.
    """
    strict = [_follows(name, arguments, reply) for name, arguments in instructions]
    variants = _variants(reply)
    loose = [
        is_followed or any(_follows(name, arguments, variant) for variant in variants)
        for is_followed, (name, arguments) in zip(strict, instructions, strict=True)
    ]
    return strict, loose


def _follows(name: str, arguments: dict[str, Any], reply: str) -> bool:
    return bool(reply.strip()) and CHECKS[name][0](reply, arguments)


def _variants(reply: str) -> list[str]:
    lines = reply.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return list(dict.fromkeys([*cut, *(text.replace("*", "") for text in (reply, *cut))]))


def grade_ifeval(item: Item, sample: int, reply: Reply) -> Marked:
    """Right if every instruction is followed strictly; the numbers of followed ones are parts."""
    text, why_none = summary(reply.text)
    instructions = item.data["instructions"]
    strict, loose = followed(instructions, text or "")
    parts = {
        "prompt_loose": float(all(loose)),
        "strict": float(sum(strict)),
        "loose": float(sum(loose)),
        "instructions": float(len(instructions)),
    }
    broken = [name for (name, _), is_followed in zip(instructions, strict, strict=True) if not is_followed]
    reason = "every instruction is followed" if not broken else why_none or f"not followed: {', '.join(broken)}"
    return Marked("wrong" if broken else "right", float(not broken), text, reason, parts)


def ifeval_totals(items: list[Item], marks: list[list[Marked]]) -> dict[str, float]:
    """The three other metrics of IFEval: prompts that are followed loosely, instructions strictly and loosely."""
    parts = [mark.parts for samples in marks for mark in samples if mark.parts]
    if not parts:
        return {}
    number = sum(one["instructions"] for one in parts)
    return {
        "prompt_loose": sum(one["prompt_loose"] for one in parts) / len(parts),
        "instruction_strict": sum(one["strict"] for one in parts) / number,
        "instruction_loose": sum(one["loose"] for one in parts) / number,
    }


IFEVAL = Benchmark(
    "ifeval",
    "IF-Eval",
    load_ifeval,
    ask_alone,
    grade_ifeval,
    grader="ifeval/1",
    metric="prompt strict",
    wanted="input_data.jsonl: key, prompt, instruction_id_list, kwargs",
    licence="Apache-2.0",
    published=541,
    totals=ifeval_totals,
)
