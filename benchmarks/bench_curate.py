"""Curating: CPU time of each filter for a row, and of the whole stage; 800 thousand rows are extrapolated from these.

python benchmarks/bench_curate.py [--rows 20000] [--smoke]    rows of 5,355 tokens (v2, Table 5); evaluation sets of
                                                              20 thousand questions; one process, CPU seconds
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timing
import torch
from rich.console import Console

from r1engine.config import CurateConfig
from r1engine.data import filters
from r1engine.data.contamination import EvaluationIndex, EvaluationText
from r1engine.data.duplicates import clusters, shingles
from r1engine.data.examples import Example, read_unit, units_of
from r1engine.pipeline.curate import Key, curate

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from samples import sample, write_samples

PAPER_ROWS, PAPER_TOKENS, CORES = 804_745, 5355, 2  # v2, Table 5; the goal is set for two cores
CHARACTERS = 4  # of a token of English
TEXT = Path(__file__).resolve().parents[1] / "docs"  # words of real sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="for run_all.py")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    num_rows, num_questions = (64, 50) if args.smoke else (args.rows, 20_000)
    folder = Path(tempfile.mkdtemp(prefix="r1engine-bench-"))
    try:
        measure(folder, num_rows, num_questions)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, num_rows: int, num_questions: int) -> None:
    """Emit one row a filter, and those of the stage."""
    pieces = sentences()
    words = [word for piece in pieces for word in piece.split()]
    rng = random.Random(0)
    made = write_samples(folder / "zero", [row(rng, pieces, i) for i in range(num_rows)], chunk_rows=256)
    heldout = folder / "heldout.jsonl"
    texts = [
        f"{i} " + " ".join(rng.choices(words, k=96)).replace('"', "").replace("\\", "") for i in range(num_questions)
    ]
    heldout.write_text("".join(f'{{"question": "{text}"}}\n' for text in texts))
    cfg = CurateConfig(
        sources=[made], run_dir=folder / "data", decontaminate=[heldout], processes=1, keep_per_question=4,
        language_min=0.5, repetition_max=1.0,
    )  # fmt: skip
    examples = [example for unit in units_of([made], None, 1)[:1] for example in read_unit(unit, {})][:64]
    for name, seconds in each(cfg, examples, texts):
        emit(name, {"ms_per_row": 1e3 * seconds})
    began = time.process_time()
    counts = curate(cfg, Console(quiet=True))
    seconds = (time.process_time() - began) / num_rows
    hours = seconds * PAPER_ROWS / CORES / 3600
    emit(f"stage, {num_rows} rows", {
        "kept": counts["kept"],
        "ms_per_row": 1e3 * seconds,
        "paper_minutes_on_2_cores": 60 * hours,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "paper_keys_gb": key_bytes() * PAPER_ROWS / 2**30,
    })  # fmt: skip


def each(cfg: CurateConfig, examples: list[Example], texts: list[str]) -> Iterator[tuple[str, float]]:
    """(name, CPU seconds a row) of every filter that reads the text."""
    for name, find in filters.FILTERS[4:]:
        yield name, per_row(lambda example, find=find: find(example, cfg), examples)
    index = EvaluationIndex(EvaluationText(text, str(i)) for i, text in enumerate(texts))
    yield "contaminated", per_row(lambda example: index.find([example.question], example.answers), examples)
    questions = {str(i): shingles(text) for i, text in enumerate(texts)}
    began = time.process_time()
    clusters(questions, 0.8)
    yield "near duplicates of questions", (time.process_time() - began) / len(questions)


def per_row(function: Callable[[Example], object], examples: list[Example]) -> float:
    """CPU seconds, after a first call that loads what is needed."""
    function(examples[0])
    began = time.process_time()
    for example in examples:
        function(example)
    return (time.process_time() - began) / len(examples)


def key_bytes() -> float:
    """Of one row that the first process compares with the others, by what a hundred thousand take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = [
        Key(2**60 + i, bytes([1]) * 15 + b"%d" % (i % 9), b"%016d" % i, 5355 + i, "math", "") for i in range(100_000)
    ]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return max(grown * 1024 / len(keys), 400.0)  # what was free before counts as at least the objects themselves


def sentences() -> list[str]:
    """Pieces of the documentation, a few words each."""
    words = " ".join(path.read_text() for path in sorted(TEXT.glob("*.md"))).split()
    plain = [word for word in words if word.isascii() and "`" not in word and "<" not in word and "|" not in word]
    return [" ".join(plain[i : i + 8]) for i in range(0, len(plain) - 8, 8)]


def row(rng: random.Random, pieces: list[str], number: int) -> dict[str, object]:
    """A sample of the paper's mean length, in lines of some 40 words."""
    lines, size = [], 0
    while size < PAPER_TOKENS * CHARACTERS:
        lines.append(" ".join(rng.choices(pieces, k=5)))
        size += len(lines[-1]) + 1
    text = "\n".join(lines)
    return sample(number // 4, number % 4, completion=f"<think>{text}</think>\nSo it is.", num_tokens=PAPER_TOKENS)


def emit(name: str, values: dict[str, object]) -> None:
    """One JSON line."""
    timing.emit("curate", name, torch.device("cpu"), values)


if __name__ == "__main__":
    main()
