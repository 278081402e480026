"""A miniature for process reward models and search: chains of + and * on last digits, and a base model that slips.

"What is 7a+5b*3c*4d+2e*5, last digit only?" is answered from left to right; the letters number the operations, so that
a step can be copied: <think>7a+5=2;2b*3=6;6c*4=4;4d+2=6;6e*5=0</think><answer>0</answer>.

The texts slip: a result is wrong now and then, and products are often taken for sums, a systematic error, so that the
majority can be wrong. A wrong step can still lead to the right answer, by luck or because * forgets: whether a step is
right and what it is worth are two things. Both are known exactly, the latter by solving the chain backwards.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from r1engine.config.tiny_chain import TinyChainConfig, TinyChainTruthConfig
from r1engine.data.chat import render
from r1engine.data.steps import HEADER, read_steps
from r1engine.demo.tiny import save_tokenizer, trained_tokenizer, write_rows, write_weights

LENGTH = 5  # operations of a question
LETTERS = "abcde"
SLIP_RATE = 0.06  # of a result that is replaced by another digit
MISREAD_RATE = 0.4  # of a product that is taken for a sum
MARKS = [";", "</think>"]  # of steps


class Chain(NamedTuple):
    """A question: a digit, and operations with numbers from 2 to 5."""

    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        """The question as it stands in the data file."""
        written = "".join(f"{x}{op}{b}" for x, (op, b) in zip(LETTERS, self.operations, strict=True))
        return f"What is {self.first}{written}, last digit only?"

    @property
    def steps(self) -> list[str]:
        """The right steps."""
        return [f"{a}{x}{op}{b}={r}" for a, x, (op, b), r in self._worked()]

    @property
    def answer(self) -> int:
        """The right answer."""
        return self._worked()[-1][3]

    def _worked(self) -> list[tuple[int, str, tuple[str, int], int]]:
        value, found = self.first, []
        for letter, (op, number) in zip(LETTERS, self.operations, strict=True):
            result = applied(op, value, number)
            found.append((value, letter, (op, number), result))
            value = result
        return found


def applied(op: str, a: int, b: int) -> int:
    """The last digit of a + b or a * b."""
    return (a + b if op == "+" else a * b) % 10


def new_chain(rng: random.Random) -> Chain:
    """A question, each as likely as the others."""
    return Chain(rng.randrange(10), tuple((rng.choice("+*"), rng.randrange(2, 6)) for _ in range(LENGTH)))


def chain_of(question: str) -> Chain:
    """The chain that a question asks for.

    Raises:
        ValueError: it is none.
    """
    body = question.removeprefix("What is ").removesuffix(", last digit only?")
    parts = [body[1 + 3 * i : 4 + 3 * i] for i in range(LENGTH)]
    if len(body) != 1 + 3 * LENGTH or not body[0].isdigit() or not all(p[1] in "+*" and p[2].isdigit() for p in parts):
        raise ValueError(f"chain_of: found {question!r:.60}, required a question of tiny_chain")
    return Chain(int(body[0]), tuple((part[1], int(part[2])) for part in parts))


def right_solution(chain: Chain) -> str:
    """The worked solution without an error."""
    return f"<think>{';'.join(chain.steps)}</think><answer>{chain.answer}</answer>"


def slipped_solution(chain: Chain, rng: random.Random) -> str:
    """One as the base model's texts have it: what follows an error is consistent with it."""
    value, steps = chain.first, []
    for letter, (op, number) in zip(LETTERS, chain.operations, strict=True):
        read = "+" if op == "*" and rng.random() < MISREAD_RATE else op
        result = applied(read, value, number)
        if rng.random() < SLIP_RATE:
            result = (result + rng.randrange(1, 10)) % 10
        steps.append(f"{value}{letter}{op}{number}={result}")
        value = result
    return f"<think>{';'.join(steps)}</think><answer>{value}</answer>"


def step_truth(chain: Chain, steps: list[str]) -> list[float]:
    """1 for each step up to the first that is not the right one, 0 from there on.

    Args:
        chain: the question.
        steps: texts of a completion's steps, with their marks; the answer is one, too.
    """
    gold = [*chain.steps, str(chain.answer)]
    truth, is_right = [], True
    for index, step in enumerate(steps):
        is_right = is_right and index < len(gold) and _core(step) == gold[index]
        truth.append(float(is_right))
    return truth


def _core(step: str) -> str:
    """A step without tags and mark."""
    return re.sub(r"</?(think|answer)>", "", step).strip().removesuffix(";")


def exact_value(chain: Chain, done: int, result: int) -> float:
    """The probability that `slipped_solution` gets to the right answer after `done` steps that ended in a result."""
    value = [float(digit == chain.answer) for digit in range(10)]
    for op, number in reversed(chain.operations[done:]):
        reads = ((op, 1.0),) if op == "+" else (("+", MISREAD_RATE), ("*", 1 - MISREAD_RATE))
        before = []
        for a in range(10):
            total = 0.0
            for read, share in reads:
                right = applied(read, a, number)
                others = sum(value) - value[right]
                total += share * ((1 - SLIP_RATE) * value[right] + SLIP_RATE / 9 * others)
            before.append(total)
        value = before
    return value[result]


def chains(name: str, count: int, seed: int) -> list[Chain]:
    """Different questions; another name or seed draws others."""
    rng = random.Random(f"tiny_chain {name} {seed}")
    found: dict[Chain, None] = {}
    while len(found) < count:
        found[new_chain(rng)] = None
    return list(found)


def write_world(cfg: TinyChainConfig) -> None:
    """Write all of it into cfg.run_dir: model/ (tokenizer and random weights), clean.jsonl and then texts.jsonl to
    pre-train it on, and train.jsonl, more.jsonl, heldout.jsonl and tests.jsonl, the questions (fields `question` and
    `answer`)."""
    folder = cfg.run_dir
    kept_out = chains("heldout", cfg.heldout + cfg.tests, cfg.seed)
    asked = chains("train", cfg.train + cfg.more + len(kept_out), cfg.seed)
    train = [chain for chain in asked if chain not in kept_out][: cfg.train + cfg.more]
    files = {"train": train[: cfg.train], "more": train[cfg.train :]}
    files |= {"heldout": kept_out[: cfg.heldout], "tests": kept_out[cfg.heldout :]}
    _write_model(folder / "model", cfg)
    for name, questions in files.items():
        write_rows(folder / f"{name}.jsonl", ({"question": c.question, "answer": str(c.answer)} for c in questions))
    for name in ("clean", "texts"):
        write_rows(folder / f"{name}.jsonl", _texts(name, cfg, set(kept_out)))


def write_truth(cfg: TinyChainTruthConfig) -> None:
    """Write the solutions of cfg.steps with the labels that are asked for to cfg.run_dir/steps.jsonl."""
    assert cfg.steps is not None
    rows: list[dict[str, object]] = [{HEADER: 1, "labels_of": cfg.labels}]
    for number, row in enumerate(read_steps(cfg.steps)):
        chain, steps = chain_of(row.question), list(row.steps)
        if cfg.labels == "hard":
            labels = [None if label is None else float(label > 0) for label in row.labels]
        else:
            labels = step_labels(chain, steps) if cfg.labels == "correctness" else [*step_values(chain, steps)]
        found: dict[str, object] = {"id": str(number), "question": row.question, "steps": steps, "labels": labels}
        found["source"] = "exact" if cfg.labels == "correctness" else f"rollouts/{cfg.labels}"
        rows.append(found | ({"tokens": row.tokens} if row.tokens is not None else {}))
    write_rows(cfg.run_dir / "steps.jsonl", rows)


def step_labels(chain: Chain, steps: list[str]) -> list[float | None]:
    """`step_truth`, without what stands behind the first wrong step."""
    truth = step_truth(chain, steps)
    right = sum(map(int, truth))
    return [label if index <= right else None for index, label in enumerate(truth)]


def step_values(chain: Chain, steps: list[str]) -> list[float]:
    """`exact_value` behind each step; 0 where the form is lost, and of the answer whether it is right."""
    values = []
    for index, step in enumerate(steps):
        found = re.search(r"(\d)$", _core(step))
        if found is None or index > LENGTH:
            values.append(0.0)
        else:
            values.append(exact_value(chain, min(index + 1, LENGTH), int(found[1])))
    return values


def _texts(name: str, cfg: TinyChainConfig, kept_out: set[Chain]) -> Iterator[dict[str, str]]:
    """Texts to pre-train on, each of (seed, index) alone: first right ones, from which the tables are learned."""
    for index in range(cfg.texts):
        rng = random.Random(f"tiny_chain {name} {cfg.seed} {index}")
        while (chain := new_chain(rng)) in kept_out:
            pass
        told = right_solution(chain) if name == "clean" else slipped_solution(chain, rng)
        yield {"question": chain.question, "completion": told}


def _write_model(folder: Path, cfg: TinyChainConfig) -> None:
    rng = random.Random(f"tiny_chain tokenizer {cfg.seed}")
    asked = [new_chain(rng) for _ in range(300)]
    pieces = [piece for c in asked for piece in (render(c.question, "r1_zero"), slipped_solution(c, rng))]
    tokenizer = trained_tokenizer(pieces, cfg.vocab_size)
    save_tokenizer(folder, tokenizer)
    write_weights(folder, cfg.as_model())
