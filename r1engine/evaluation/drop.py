"""DROP: reading with arithmetic (Dua et al., arXiv 1903.00161). F1 as AllenNLP defines it, not rounded. No torch.

The questions come with three examples (Table 4: "3-shot F1"), in simple-evals' prompt.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.evaluation.benchmark import Benchmark, Item, Marked, Reply
from r1engine.evaluation.files import FileRow, digest, object_rows, one_object, unique
from r1engine.evaluation.prompts import prompt, prompt_template
from r1engine.evaluation.reading import answer_line

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_MARKS = str.maketrans("", "", string.punctuation)
_SPANS = re.compile(r"\s*(?:,|;|\band\b)\s*")
SHOTS = 3  # Table 4
_FILES = (("drop_v0_train.jsonl.gz", "drop_v0_dev.jsonl.gz"), ("drop_v0_train.jsonl", "drop_v0_dev.jsonl"))
_OWN_FILES = ("drop_dataset_train.json", "drop_dataset_dev.json")


# ---- the metric ----------------------------------------------------------------------------------------------------


def drop_scores(answer: str, references: Sequence[Sequence[str]]) -> tuple[float, float]:
    """(exact match, F1) of an answer, each the best over what the annotators wrote.

    Args:
        answer:     of the model. Held against several spans it is also divided at commas and "and".
        references: of each annotator, the spans.
    """
    best = (0.0, 0.0)
    for spans in references:
        divided = [part for part in _SPANS.split(answer) if part] if len(spans) > 1 else []
        for given in ([answer], divided):
            if given:
                exact, f1 = span_scores(given, spans)
                best = (max(best[0], exact), max(best[1], f1))
    return best


def span_scores(answer: Sequence[str], reference: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of the spans of an answer against those of a reference.

    F1 is the mean over the longer list of the best one-to-one alignment of bags of words. Two bags have F1 0 if there
    are numbers in the reference's and none of them is in the other.
    """
    given, wanted = [normal_text(span) for span in answer], [normal_text(span) for span in reference]
    exact = float(set(given) == set(wanted) and len(given) == len(wanted))
    bags = [[set(text.split()) for text in texts] for texts in (given, wanted)]
    table = [[_bag_f1(found, gold) for found in bags[0]] for gold in bags[1]]
    return exact, _best_alignment(table) / max(len(given), len(wanted))


def normal_text(text: str) -> str:
    """Lower case; without punctuation and articles; divided at blanks and hyphens; numbers as Python prints floats."""
    words = []
    for token in re.split(r"[ -]", text.lower()):
        bare = token if _number(token) is not None else token.translate(_MARKS)
        value = _number(bare)
        words += _ARTICLES.sub(" ", bare if value is None else value).split()
    return " ".join(words)


def _number(text: str) -> str | None:
    try:
        return str(float(text))
    except ValueError:
        return None


def _bag_f1(answer: set[str], reference: set[str]) -> float:
    numbers = {word for word in reference if _number(word) is not None}
    if numbers and not numbers & answer:
        return 0.0
    shared = len(answer & reference)
    precision = shared / len(answer) if answer else 1.0
    recall = shared / len(reference) if reference else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _best_alignment(table: list[list[float]]) -> float:
    """The largest sum of entries of which no two share a row or a column.

    Rows are added one after the other; each takes a column along the cheapest path of changes (the Hungarian method).
    """
    rows = table if len(table) <= len(table[0]) else [list(column) for column in zip(*table, strict=True)]
    width = len(rows[0])
    row_price, column_price = [0.0] * len(rows), [0.0] * (width + 1)
    taken_by: list[int] = [-1] * (width + 1)  # row of each column; the last column stands for the row that is added
    for new in range(len(rows)):
        taken_by[width], column = new, width
        least, before, seen = [float("inf")] * width, [width] * width, [False] * (width + 1)
        while taken_by[column] >= 0:
            seen[column], row = True, taken_by[column]
            for c in range(width):
                if not seen[c] and (cost := -rows[row][c] - row_price[row] - column_price[c]) < least[c]:
                    least[c], before[c] = cost, column
            step, nearest = min((least[c], c) for c in range(width) if not seen[c])
            for c in range(width + 1):
                if seen[c]:
                    row_price[taken_by[c]] += step
                    column_price[c] -= step
                elif c < width:
                    least[c] -= step
            column = nearest
        while column != width:
            taken_by[column], column = taken_by[before[column]], before[column]
    return sum(rows[row][c] for c, row in enumerate(taken_by[:width]) if row >= 0)


# ---- loading, asking, grading --------------------------------------------------------------------------------------


def load_drop(settings: BenchmarkSettings) -> list[Item]:
    """A folder of two files, whose first gives the examples: simple-evals' or the owners' own."""
    folder = settings.file
    if not folder.is_dir():
        raise ValueError(f"{folder}: found no folder, required one with {' and '.join(_FILES[0])}")
    for train, dev in _FILES:
        if (folder / dev).exists() and (folder / train).exists():
            shots = [f"{row.text('context')} {row.text('completion')}" for row in _lines(folder / train)]
            return _with_examples([_simple_evals_item(row) for row in _lines(folder / dev)], shots)
    train, dev = _OWN_FILES
    if (folder / dev).exists() and (folder / train).exists():
        examples = [f"{item.data['context']} {item.question.answer}" for item in _own_items(folder / train)]
        return _with_examples(_own_items(folder / dev), examples)
    raise ValueError(f"{folder}: found neither {' and '.join(_FILES[0])} nor {' and '.join(_OWN_FILES)}")


def _lines(path: Path) -> list[FileRow]:
    return object_rows(path, ("context", "completion", "ref_text"))


def _simple_evals_item(row: FileRow) -> Item:
    """Annotators are divided by |; several spans stand as one text."""
    context = row.text("context")
    references = [[text.strip()] for text in row.text("ref_text").split("|") if text.strip()]
    return _drop_item(row.place, context, references, cluster=digest(context.rpartition("Question:")[0]))


def _own_items(path: Path) -> list[Item]:
    """The owners' JSON: passages, each with its questions. A question that nobody answered is left out."""
    items, ids = [], []
    for name, passage in one_object(path).items():
        for pair in FileRow(f"{path}: {name}", passage if isinstance(passage, dict) else {}).items("qa_pairs"):
            if not isinstance(pair, dict):
                raise ValueError(f"{path}: {name}: found a question that is {pair!r:.40}, required an object")
            row = FileRow(f"{path}: {name}: {pair.get('query_id')}", {**pair, "passage": passage.get("passage")})
            answers = [row.fields.get("answer"), *(row.fields.get("validated_answers") or [])]
            references = [spans for answer in answers if (spans := _spans(answer, row.place))]
            if references:
                context = f"Passage: {row.text('passage')}\nQuestion: {row.text('question')}\nAnswer:"
                items.append(_drop_item(row.place, context, references, cluster=name))
                ids.append(row.text("query_id"))
    return [replace(item, id=one) for item, one in zip(items, unique(ids), strict=True)]


def _spans(answer: Any, place: str) -> list[str]:
    """The spans of an annotator's answer; a number or a date is one. None if all of them are blank."""
    if not isinstance(answer, dict) or not answer.keys() & {"number", "spans", "date"}:
        raise ValueError(f"{place}: an answer is {answer!r:.80}, required one with number, spans or date")
    number, date = answer.get("number"), answer.get("date") or {}
    if number is not None and str(number).strip():
        return [str(number)]
    if answer.get("spans"):
        return [str(span) for span in answer["spans"]]
    text = " ".join(str(date.get(part) or "") for part in ("day", "month", "year")).strip()
    return [text] if text else []


def _drop_item(place: str, context: str, references: list[list[str]], *, cluster: str) -> Item:
    question = Question(context, ", ".join(references[0]), place=place)
    return Item(digest(context), question, cluster, {"context": context, "references": references})


def _with_examples(items: list[Item], examples: list[str]) -> list[Item]:
    """Each question gets the three examples that its id draws: the same in every process and order."""
    if len(examples) < SHOTS:
        raise ValueError(f"drop: found {len(examples)} examples, required {SHOTS}")
    ids = unique(item.id for item in items)
    return [
        replace(item, id=one, data={**item.data, "examples": _drawn(one, examples)})
        for item, one in zip(items, ids, strict=True)
    ]


def _drawn(question: str, examples: list[str]) -> list[str]:
    found: dict[int, str] = {}
    number = 0
    while len(found) < SHOTS:
        key = hashlib.sha256(f"{question}\n{number}".encode()).digest()
        place = int.from_bytes(key[:8], "big") % len(examples)
        found.setdefault(place, examples[place])
        number += 1
    return list(found.values())


def ask_drop(item: Item, sample: int) -> str:
    """simple-evals' prompt with the question's examples."""
    shots = "".join(f"\n---\n{example}\n" for example in item.data["examples"])
    return prompt_template("drop_opening") + shots + prompt("drop_task", context=item.data["context"])


def grade_drop(item: Item, sample: int, reply: Reply) -> Marked:
    """The score is F1; only an exact match is called right."""
    answer, why_none = answer_line(reply.text)
    if answer is None:
        return Marked("wrong", 0.0, None, why_none, {"exact": 0.0})
    exact, f1 = drop_scores(answer, item.data["references"])
    reason = f"F1 {f1:.2f} against {item.question.answer!r:.80}"
    return Marked("right" if exact else "wrong", f1, answer, reason, {"exact": exact})


DROP = Benchmark(
    "drop",
    "DROP",
    load_drop,
    ask_drop,
    grade_drop,
    grader="drop/1",
    metric="3-shot F1",
    wanted="a folder with drop_v0_train.jsonl.gz and drop_v0_dev.jsonl.gz of simple-evals, or with the owners' own"
    " drop_dataset_train.json and drop_dataset_dev.json",
    licence="CC BY-SA 4.0",
    published=None,
)
