"""Benchmarks that their own harness grades: AlpacaEval 2.0, Arena-Hard, SWE-bench Verified, Aider-Polyglot. No torch.

Replies are drawn here and written as the harness reads them; its verdicts come back as lines of an import. Of a reply
only the summary is given to a judge (paper, section 3). Aider's harness draws for itself, from an endpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.evaluation.benchmark import Benchmark, Item, Marked, Reply, ask_alone
from r1engine.evaluation.files import FileRow, digest, object_rows, one_object, unique
from r1engine.evaluation.reading import summary
from r1engine.rewards.code.fences import fenced_blocks

STRONG = 3  # games that a much better answer counts as, in Arena-Hard's score
_WINS = {
    "A>B": (1.0, 1),
    "A>>B": (1.0, STRONG),
    "A=B": (0.5, 1),
    "B=A": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, STRONG),
}


class HarnessVerdict(NamedTuple):
    """A harness' verdict on a question."""

    question: str  # Item.id
    right: float | None  # in [0, 1]; None: undecided


# ---- drawing -------------------------------------------------------------------------------------------------------


def _items(rows: Sequence[FileRow], ids: Sequence[str], text: Callable[[FileRow], str]) -> list[Item]:
    pairs = zip(rows, unique(ids), strict=True)
    return [Item(one, Question(text(row), place=row.place), data={"row": row.fields}) for row, one in pairs]


def load_alpaca_eval(settings: BenchmarkSettings) -> list[Item]:
    """alpaca_eval.json: a list of instructions."""
    rows = object_rows(settings.file, ("instruction",))
    return _items(rows, [digest(row.text("instruction")) for row in rows], lambda row: row.text("instruction"))


def load_arena_hard(settings: BenchmarkSettings) -> list[Item]:
    """question.jsonl of v0.1."""
    rows = object_rows(settings.file, ("uid", "prompt"))
    return _items(rows, [row.text("uid") for row in rows], lambda row: row.text("prompt"))


def load_swe_bench(settings: BenchmarkSettings) -> list[Item]:
    """Prompts that ask for a patch in a fenced block, as SWE-bench's own with the files retrieved, one an instance."""
    rows = object_rows(settings.file, ("instance_id", "text|prompt"))
    return _items(rows, [row.text("instance_id") for row in rows], lambda row: row.any_of("text", "prompt"))


def leave_to_harness(item: Item, sample: int, reply: Reply) -> Marked:
    """Undecided here; a reply without a summary is wrong everywhere."""
    text, why_none = summary(reply.text)
    if text is None:
        return Marked("wrong", 0.0, None, why_none)
    return Marked("undecided", None, "left to its harness", "its own harness grades it: export, then import")


# ---- export --------------------------------------------------------------------------------------------------------


def exported(benchmark: str, items: Sequence[Item], replies: Mapping[str, str], model: str) -> str:
    """The text of the file that a benchmark's harness reads.

    Args:
        benchmark: "alpaca_eval_2", "arena_hard" or "swe_bench_verified".
        items:     its questions.
        replies:   of each question's id, with thoughts.
        model:     name that the harness shows.

    Raises:
        ValueError: the benchmark has no such file, or a question has no reply: the harness would give another score, or
            none at all.
    """
    if benchmark not in _EXPORTS:
        raise ValueError(f"export: found benchmark {benchmark}, required one of {', '.join(_EXPORTS)}")
    if missing := [item for item in items if item.id not in replies]:
        raise ValueError(
            f"export: found no reply to {len(missing)} of {len(items)} questions of {benchmark}, required all; the "
            f"first is {missing[0].id}: {missing[0].question.text[:60]!r}"
        )
    return _EXPORTS[benchmark]([(item, summary(replies[item.id])[0] or "") for item in items], model)


def _alpaca_eval(pairs: list[tuple[Item, str]], model: str) -> str:
    rows = [
        {
            "instruction": item.question.text,
            "output": text,
            "generator": model,
            "dataset": item.data["row"].get("dataset", "alpaca_eval"),
        }
        for item, text in pairs
    ]
    return json.dumps(rows, indent=1) + "\n"


def _arena_hard(pairs: list[tuple[Item, str]], model: str) -> str:
    rows = []
    for item, text in pairs:
        messages = [{"role": "user", "content": item.question.text}, {"role": "assistant", "content": {"answer": text}}]
        rows.append({"uid": item.id, "ans_id": digest(model, item.id, text), "model": model, "messages": messages})
    return "".join(json.dumps(row) + "\n" for row in rows)


def _swe_bench(pairs: list[tuple[Item, str]], model: str) -> str:
    rows = [
        {"instance_id": item.id, "model_name_or_path": model, "model_patch": patch_of(text)} for item, text in pairs
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def patch_of(text: str) -> str:
    """The last fenced block that is a patch, or ""; an empty patch counts as not resolved."""
    blocks, _ = fenced_blocks(text)
    patches = [block.code for block in blocks if block.name in ("diff", "patch") or block.code.startswith("diff --git")]
    return patches[-1].rstrip("\n") + "\n" if patches else ""


_EXPORTS: dict[str, Callable[[list[tuple[Item, str]], str], str]] = {
    "alpaca_eval_2": _alpaca_eval,
    "arena_hard": _arena_hard,
    "swe_bench_verified": _swe_bench,
}


# ---- import --------------------------------------------------------------------------------------------------------


def harness_verdicts(benchmark: str, path: Path) -> list[HarnessVerdict] | None:
    """The verdicts in a file of a benchmark's harness; None: this benchmark has none, the file is of our own lines.

    - alpaca_eval_2: annotations.json. The preference for the model; its mean is the win rate, not the one that is
      controlled for length, which only the harness can compute.
    - arena_hard: model_judgment/JUDGE/MODEL.jsonl. The mean over both games, a much better answer counted thrice.
    - swe_bench_verified: the report MODEL.RUN.json.
    - aider_polyglot: the folder of a run. Right is what passes its tests in the end.

    Raises:
        ValueError: the file is none of them, or a question is judged twice.
    """
    if benchmark not in _VERDICTS or (path.suffix == ".jsonl" and _is_own(path)):
        return None
    found = list(_VERDICTS[benchmark](path))
    if not found:
        raise ValueError(f"{path}: found no verdicts, required at least one")
    seen = set()
    for verdict in found:
        if verdict.question in seen:
            raise ValueError(f"{path}: found question {verdict.question} twice, required one verdict")
        seen.add(verdict.question)
    return found


def _is_own(path: Path) -> bool:
    return "question" in object_rows(path, ())[0].fields


def _alpaca_verdicts(path: Path) -> Iterator[HarnessVerdict]:
    """A preference is from 1, the baseline's output, to 2, the model's; null: the annotator failed."""
    for row in object_rows(path, ("instruction", "preference")):
        preference = row.fields["preference"]
        if preference is not None and not 1 <= row.number("preference") <= 2:
            raise ValueError(f"{row.place}: preference is {preference!r:.40}, required a number from 1 to 2")
        right = None if preference is None else row.number("preference") - 1
        yield HarnessVerdict(digest(row.text("instruction")), right)


def _arena_verdicts(path: Path) -> Iterator[HarnessVerdict]:
    """In the first game A is the baseline, in the second the model."""
    for row in object_rows(path, ("uid", "games")):
        games = row.items("games")
        if len(games) != 2:
            raise ValueError(f"{row.place}: found {len(games)} games, required 2")
        labels = [str(game.get("score")) if isinstance(game, dict) else "None" for game in games]
        if "None" in labels:
            yield HarnessVerdict(row.text("uid"), None)
            continue
        if unknown := [label for label in labels if label not in _WINS]:
            raise ValueError(f"{row.place}: score is {unknown[0]!r:.40}, required one of {', '.join(_WINS)}")
        (first, times), (second, more) = (_WINS[label] for label in labels)
        yield HarnessVerdict(row.text("uid"), ((1 - first) * times + second * more) / (times + more))


def _swe_verdicts(path: Path) -> Iterator[HarnessVerdict]:
    """An instance whose tests broke down is undecided; one without a patch is wrong."""
    report = one_object(path)
    if not isinstance(report.get("resolved_ids"), list):
        raise ValueError(f"{path}: found no resolved_ids, required the report of a run of SWE-bench's harness")
    kinds = {"resolved_ids": 1.0, "unresolved_ids": 0.0, "empty_patch_ids": 0.0, "error_ids": None}
    for kind, right in kinds.items():
        for instance in report.get(kind) or []:
            yield HarnessVerdict(str(instance), right)


def _aider_verdicts(folder: Path) -> Iterator[HarnessVerdict]:
    for path in sorted(folder.rglob(".aider.results.json")):
        row = FileRow(str(path), one_object(path))
        language = path.relative_to(folder).parts[0] if len(path.relative_to(folder).parts) > 2 else ""
        name = "/".join(part for part in (language, row.text("testcase")) if part)
        outcomes = row.fields.get("tests_outcomes")
        if not isinstance(outcomes, list):
            raise ValueError(f"{path}: tests_outcomes is {outcomes!r:.40}, required a list")
        yield HarnessVerdict(name, float(bool(outcomes) and outcomes[-1] is True))


_VERDICTS: dict[str, Callable[[Path], Iterator[HarnessVerdict]]] = {
    "alpaca_eval_2": _alpaca_verdicts,
    "arena_hard": _arena_verdicts,
    "swe_bench_verified": _swe_verdicts,
    "aider_polyglot": _aider_verdicts,
}


ALPACA_EVAL = Benchmark(
    "alpaca_eval_2",
    "AlpacaEval 2.0",
    load_alpaca_eval,
    ask_alone,
    leave_to_harness,
    grader="harness/1",
    metric="LC win rate",
    wanted="alpaca_eval.json: instruction, dataset; its own harness grades what `export` writes",
    licence="CC BY-NC 4.0",
    published=805,
)
HARNESS_SETS = (
    ALPACA_EVAL,
    replace(
        ALPACA_EVAL,
        name="arena_hard",
        title="ArenaHard",
        load=load_arena_hard,
        metric="win rate",
        wanted="question.jsonl of v0.1: uid, prompt; its own harness grades what `export` writes",
        licence="Apache-2.0",
        published=500,
    ),
    replace(
        ALPACA_EVAL,
        name="swe_bench_verified",
        title="SWE Verified",
        load=load_swe_bench,
        metric="resolved",
        wanted="lines of JSON: instance_id, text or prompt that asks for a patch; its own harness grades what `export`"
        " writes",
        licence="MIT",
        published=500,
    ),
)
