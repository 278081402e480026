"""The stage `search_data`: right completions and values of steps out of the trees of searches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1engine.config.search_data import SearchDataConfig
from r1engine.data.steps import HEADER
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer, stop_tokens
from r1engine.observe.put import put_text
from r1engine.sampling.search_rows import Row
from r1engine.sampling.whole_lines import lines_of, whole_lines

Steps = list[list[int]]  # tokens of each


def write_search_data(cfg: SearchDataConfig) -> dict[str, Any]:
    """Write texts.jsonl and steps.jsonl.

    Returns:
        Questions, those with a right completion, texts, and paths and steps with values.

    Raises:
        ValueError: a file is none of `stage: search`, or no question has a right completion.
    """
    assert cfg.model.path is not None
    tokenizer = load_tokenizer(cfg.model.path)
    stop = stop_tokens(cfg.model.path, tokenizer)
    texts: list[Row] = []
    paths: list[Row] = []
    questions = solved = 0
    for path in cfg.searches:
        for row in _rows(path):
            found = [*_texts(row, cfg.texts, tokenizer, stop)]
            texts, questions, solved = texts + found, questions + 1, solved + bool(found)
            paths += _paths(row, cfg.min_visits, tokenizer, stop)
    if not texts:
        raise ValueError(f"searches: found no right completion of {questions} questions, required one to train on")
    put_text(cfg.run_dir / "texts.jsonl", lines_of(texts))
    put_text(cfg.run_dir / "steps.jsonl", lines_of([{HEADER: 1, "labels_of": "value"}, *paths]))
    labelled = sum(label is not None for row in paths for label in row["labels"])
    return {"questions": questions, "solved": solved, "texts": len(texts), "paths": len(paths), "values": labelled}


def _rows(path: Path) -> Iterator[Row]:
    """
    Raises:
        ValueError: a line has no tree.
    """
    for number, row in enumerate(whole_lines(path), start=1):
        if not {"question", "nodes", "id", "search"} <= row.keys():
            raise ValueError(f"{path}:{number}: found {', '.join(row)[:60]}, required a line of search.jsonl")
        yield row


def _texts(row: Row, most: int, tokenizer: PromptTokenizer, stop: frozenset[int]) -> Iterator[Row]:
    """Right completions of a question, the most visited ones first."""
    nodes = {node["node"]: node for node in row["nodes"]}
    right = [node for node in row["nodes"] if node.get("verdict") == "right" and node["finish"] == "stop"]
    for node in sorted(right, key=lambda node: (-node["visits"], node["node"]))[:most]:
        tokens = [token for step in _steps(node, nodes, stop) for token in step]
        text = tokenizer.decode(tokens, skip_special_tokens=False)
        yield {"question": row["question"], "completion": text, "id": f"{row['search']}/{row['id']}/{node['node']}"}


def _paths(row: Row, min_visits: int, tokenizer: PromptTokenizer, stop: frozenset[int]) -> Iterator[Row]:
    """The paths to the last visited nodes, with the mean value of each node that was visited often enough.

    A node that paths share is labelled in the first one only, so that it counts once. What a search visited but drew
    in one piece has no values of its steps. An end that is undecided has no label: its mean is what the model said.
    """
    visited = {n["node"]: n for n in row["nodes"] if n["visits"] >= min_visits and not n.get("lookahead")}
    inner = {node["parent"] for node in visited.values()}
    told: set[int] = set()
    for number, last in visited.items():
        if number in inner:
            continue
        steps: Steps = []
        labels: list[float | None] = []
        for node in _path(last, visited):
            own = _without_stop(node["tokens"], stop)
            steps += own
            label = None if node["node"] in told or node.get("verdict") == "undecided" else node["mean"]
            labels += [None] * (len(own) - 1) + [label] if own else []
            told.add(node["node"])
        if any(label is not None for label in labels):
            yield {
                "id": f"{row['search']}/{row['id']}/{number}",
                "question": row["question"],
                "steps": tokenizer.decode_batch(steps, skip_special_tokens=False),
                "labels": labels,
                "tokens": steps,
                "source": f"values/{row['search']}",
            }


def _path(node: Row, nodes: dict[int, Row]) -> list[Row]:
    """From the first step to this one; branches, which have no step, stay empty."""
    found = [node]
    while (parent := nodes.get(found[-1]["parent"])) is not None:
        found.append(parent)
    return found[::-1]


def _steps(node: Row, nodes: dict[int, Row], stop: frozenset[int]) -> Steps:
    return [step for one in _path(node, nodes) for step in _without_stop(one["tokens"], stop)]


def _without_stop(steps: Steps, stop: frozenset[int]) -> Steps:
    """Steps without the token that ends the completion; a step of it alone is none."""
    kept = [[token for token in step if token not in stop] for step in steps]
    return [step for step in kept if step]
