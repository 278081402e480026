"""Examples: rows on their way to the data of supervised training, from samples of a model or from conversations.

In the way there they are written to Parquet files, a batch of rows after the other, so that memory does not grow with
their number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1engine.data.chat import END_THINK, THINK, Message
from r1engine.data.contamination import units
from r1engine.data.conversations import conversation_of
from r1engine.data.question import Question
from r1engine.data.rows import Row, missing, read_rows
from r1engine.data.stream import file_digest
from r1engine.rewards.extract import answer_region, final_answer
from r1engine.rewards.language import language_of
from r1engine.rewards.thoughts import split_thoughts

if TYPE_CHECKING:
    import pyarrow

CHUNKS = "chunk_*.parquet"
COUNTS = "counts.json"  # of the stage that drew the samples: digests of its chunks
BATCH = 256  # rows in memory at once
_REQUIRED = ("question", "prompt", "completion", "num_tokens", "finish", "verdict")
_SAMPLE = (*_REQUIRED, "question_id", "sample", "reason", "language", "domain", "answer", "reward", "tests", "id")
_CONVERSATION = ("question", "completion", "messages", "domain", "language", "method", "num_tokens", "edited_by")
DOMAIN = "general"  # of rows that name none


@dataclass(frozen=True)
class Example:
    """One row, with what decides whether it stays."""

    source: str  # where it comes from, unlike any other: "cold_samples:12/3", "few_shot.parquet:7"
    messages: list[Message]  # the last one is the assistant's: `<think>thoughts</think>\nsummary`, or an answer alone
    domain: str  # math, code, stem, logic, general, ...
    language: str  # of the question (ISO 639-1); "": it has no words
    method: str  # few_shot, direct, r1_zero, human, rejection or given
    num_tokens: int | None  # as the file says; None: not known, or the text is no longer that
    edited_by: tuple[str, ...] = ()
    needs_thoughts: bool = False
    finish: str = "stop"  # of a sample: "length" if it was cut off
    verdict: str = "right"  # of a sample: right, wrong or undecided
    why: str = ""  # of the verdict
    broken: str = ""  # why refining failed
    task: Question | None = None  # what grades a sample

    @property
    def question(self) -> str:
        """What the user says."""
        return "\n\n".join(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def answers(self) -> list[str]:
        """What the assistant says."""
        return [message["content"] for message in self.messages if message["role"] == "assistant"]

    @property
    def thoughts(self) -> list[str]:
        """Of the answers that have some."""
        found = [split_thoughts(answer).thoughts for answer in self.answers]
        return [thoughts for thoughts in found if thoughts is not None]

    @property
    def question_sha(self) -> str:
        """Of the question's units: case, punctuation and white space do not count."""
        return hashlib.sha256(" ".join(units(self.question)).encode()).hexdigest()

    def with_answer(self, thoughts: str | None, summary: str, editor: str) -> Example:
        """The same with another last answer."""
        answer = {"role": "assistant", "content": written(thoughts, summary)}
        edited = (*self.edited_by, editor)
        return replace(self, messages=[*self.messages[:-1], answer], edited_by=edited, num_tokens=None)


def written(thoughts: str | None, summary: str) -> str:
    """An assistant's message."""
    return summary if thoughts is None else f"{THINK}{thoughts}{END_THINK}\n{summary.strip()}"


@dataclass(frozen=True)
class Unit:
    """What one process reads at a time: a chunk of samples, a part of a file of conversations, or of examples."""

    path: Path
    kind: str  # samples, conversations, examples
    name: str  # of the input, in `source`
    method: str | None = None
    part: int = 0  # every `parts`-th row, from this one on
    parts: int = 1


def units_of(inputs: list[Path], methods: list[str] | None, parts: int) -> list[Unit]:
    """What there is to read, in the order of the inputs.

    Args:
        inputs:  folders of samples and files of conversations.
        methods: of the rows of each; None: see `read_unit`.
        parts:   that a large file of conversations is divided into.

    Raises:
        ValueError: a folder has no chunks.
    """
    found: list[Unit] = []
    for i, (path, name) in enumerate(zip(inputs, _names(inputs), strict=True)):
        method = methods[i] if methods is not None else None
        if path.is_dir():
            folder = path / "samples" if (path / "samples").is_dir() else path
            chunks = sorted(folder.glob(CHUNKS))
            if not chunks:
                raise ValueError(f"{folder}: found no {CHUNKS}, required are samples")
            found += [Unit(chunk, "samples", name, method) for chunk in chunks]
        else:
            many = parts if path.is_file() and path.stat().st_size > 2**26 else 1
            found += [Unit(path, "conversations", name, method, part, many) for part in range(many)]
    return found


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ; a folder `samples` has its stage's name."""
    tails = [path.resolve().parts[:-1] if path.name == "samples" else path.resolve().parts for path in paths]
    for size in range(1, max((len(tail) for tail in tails), default=1) + 1):
        names = ["/".join(tail[-size:]) for tail in tails]
        if len({*names}) == len(names):
            return names
    raise ValueError(f"sources: found {names[0]} twice, required different ones")


def read_unit(unit: Unit, summaries: dict[str, str]) -> Iterator[Example]:
    """The examples of a unit, in file order.

    Args:
        unit:      what to read.
        summaries: language -> text with {answer}, which takes the place of a sample's summary.

    Raises:
        ValueError: a file is damaged, or a row is not what it should be; file and row are named.
    """
    if unit.kind == "samples":
        _check_digest(unit.path)
        return (_of_sample(row, unit, summaries) for row in read_rows(unit.path, _SAMPLE))
    if unit.kind == "examples":
        return read_examples(unit.path)
    rows = read_rows(unit.path, _CONVERSATION, one_of=("question", "messages"))
    return (_of_conversation(row, unit) for row in islice(rows, unit.part, None, unit.parts))


def _check_digest(chunk: Path) -> None:
    """Holds a chunk to the digest that stands beside it; a folder without digests has none that could differ."""
    path = chunk.parent.parent / COUNTS
    files = json.loads(path.read_text(encoding="utf-8")).get("files") if path.is_file() else None
    if files is None:
        return
    if chunk.name not in files:
        raise ValueError(f"{chunk}: {path} does not name it, required is its SHA-256; run its stage to the end")
    if file_digest(chunk) != files[chunk.name]["sha256"]:
        raise ValueError(
            f"{chunk}: SHA-256 differs from {COUNTS}; delete it and run its stage again: only this chunk is drawn again"
        )


def _of_sample(row: Row, unit: Unit, summaries: dict[str, str]) -> Example:
    fields = row.fields
    for name in _REQUIRED:
        if name not in fields:
            raise ValueError(f"{row.place}: {missing(name, row.columns)}")
    question, place = fields["question"], fields.get("id") or f"{fields.get('question_id')}/{fields.get('sample')}"
    language = fields.get("language") or language_of(question)
    is_prefilled = fields["prompt"].rstrip().endswith(THINK)
    content, editor = _answer_of(fields["completion"], is_prefilled, summaries.get(language))
    domain, tests = fields.get("domain") or DOMAIN, fields.get("tests")
    reward = fields.get("reward") or ("math" if fields.get("answer") else "")
    tests = json.loads(tests) if isinstance(tests, str) and tests else tests
    return Example(
        source=f"{unit.name}:{place}",
        messages=[{"role": "user", "content": question}, {"role": "assistant", "content": content}],
        domain=domain,
        language=language,
        method=unit.method or "rejection",
        num_tokens=None if editor else int(fields["num_tokens"]),
        edited_by=(editor,) if editor else (),
        needs_thoughts=domain != DOMAIN,
        finish=fields["finish"],
        verdict=fields["verdict"],
        why=fields.get("reason", ""),
        task=Question(question, str(fields.get("answer", "")), reward, tests, language, row.place) if reward else None,
    )


def _answer_of(completion: str, is_prefilled: bool, summary: str | None) -> tuple[str, str]:
    """(an assistant's message, who has written its summary if not the model)."""
    split = split_thoughts(completion, think_prefilled=is_prefilled)
    region, _ = answer_region(completion, think_prefilled=is_prefilled)
    raw = THINK + completion if is_prefilled else completion
    if split.thoughts is None or region is None:
        return raw, ""
    if summary is None:
        return written(split.thoughts, region.text), ""
    answer, _ = final_answer(completion, think_prefilled=is_prefilled)
    return (raw, "") if answer is None else (written(split.thoughts, summary.replace("{answer}", answer)), "summaries")


def _of_conversation(row: Row, unit: Unit) -> Example:
    conversation, fields = conversation_of(row), row.fields
    for name in ("language", "method"):
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"{row.place}: {name} is {fields[name]!r:.80}, required a text")
    example = Example(
        source=f"{unit.name}:{row.number}",
        messages=conversation.messages,
        domain=conversation.domain or DOMAIN,
        language=fields.get("language", ""),
        method=unit.method or fields.get("method") or "given",
        num_tokens=int(fields["num_tokens"]) if isinstance(fields.get("num_tokens"), int) else None,
        edited_by=tuple(fields.get("edited_by") or ()),
    )
    return example if example.language else replace(example, language=language_of(example.question))


# ---------------------------------------------------------------------- files of examples


def schema() -> pyarrow.Schema:
    """Columns of a file of examples."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    texts = ("source", "domain", "language", "method", "finish", "verdict", "why", "broken", "task", "question_sha")
    return pa.schema(
        [pa.field("messages", pa.list_(message))]
        + [pa.field(name, pa.string()) for name in texts]
        + [pa.field("num_tokens", pa.int32()), pa.field("needs_thoughts", pa.bool_())]
        + [pa.field("edited_by", pa.list_(pa.string()))]
    )


def table_of(examples: list[Example]) -> pyarrow.Table:
    """Rows of a file of examples."""
    import pyarrow as pa

    rows = []
    for example in examples:
        row: dict[str, Any] = {name: getattr(example, name) for name in schema().names if name != "task"}
        rows.append(row | {"task": json.dumps(asdict(example.task)) if example.task is not None else None})
    return pa.Table.from_pylist(rows, schema=schema())


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """A file of examples, written a batch at a time."""
    import pyarrow.parquet as pq

    rows = iter(examples)
    with pq.ParquetWriter(path, schema(), compression="zstd") as writer:
        while batch := list(islice(rows, BATCH)):
            writer.write_table(table_of(batch))


def read_examples(path: Path) -> Iterator[Example]:
    """The examples that `write_examples` wrote."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            for row in batch.to_pylist():
                row.pop("question_sha")
                task, edited = row.pop("task"), tuple(row.pop("edited_by"))
                yield Example(**row, edited_by=edited, task=None if task is None else Question(**json.loads(task)))
