"""Reward functions of the user (`rewards.functions`): each is a component of its own, called in killable workers.

The file of a function is imported in child processes alone. Each function has its own, so that none changes the state
of another, or of a rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from r1engine.rewards.extract import final_answer
from r1engine.rewards.functions import inside
from r1engine.rewards.record import Record
from r1engine.rewards.thoughts import split_thoughts
from r1engine.rewards.workers.nursery import address
from r1engine.rewards.workers.pool import Outcome, WorkerPool


@dataclass(frozen=True)
class FunctionSettings:
    """How the functions are called."""

    paths: Mapping[str, str]  # component -> "file.py:function"
    deadline_seconds: float = 60.0  # of a call
    memory_gb: float = 16.0  # address space of a worker (GiB)
    variables: tuple[str, ...] = ()  # of the environment, that a function sees beside PATH and the language


@dataclass(frozen=True)
class Call:
    """The value of a record, to come."""

    future: Future[Outcome]
    index: int  # among the records of the call

    def value(self) -> tuple[float | None, str]:
        """(value, "") or (None, why there is none). The future is done."""
        outcome = self.future.result()
        if outcome.problem:
            return None, outcome.problem
        value, why_none = outcome.value[self.index]
        return value, why_none


class RewardFunctions:
    """The functions of a scorer; any thread may use them. The workers start with the first record."""

    def __init__(self, settings: FunctionSettings, workers: int) -> None:
        """`workers`: processes of each function.

        Raises:
            ValueError: a file is not there.
        """
        self._functions = {name: _Function(name, where, settings, workers) for name, where in settings.paths.items()}

    @property
    def names(self) -> list[str]:
        """The components, in the order of the configuration."""
        return list(self._functions)

    @property
    def any_takes_groups(self) -> bool:
        """Whether a function wants all completions of a question at once."""
        return any(function.takes_groups for function in self._functions.values())

    def check(self) -> None:
        """Imports every file, in child processes.

        Raises:
            ValueError: one cannot be imported, or lacks its function, or the function has unknown parameters.
        """
        for name, function in self._functions.items():
            try:
                function.takes_groups  # noqa: B018  # it is asked for
            except RuntimeError as error:
                raise ValueError(f"rewards.functions.{name}: {error}") from error

    def begin(self, records: Sequence[Record]) -> list[dict[str, Call]]:
        """Calls every function for completions of one question; blocks while many are under way.

        Returns:
            Of each record: component -> its value, to come.
        """
        if not self._functions:
            return [{} for _ in records]
        fields = [fields_of(record) for record in records]
        calls: list[dict[str, Call]] = [{} for _ in records]
        for name, function in self._functions.items():
            if function.takes_groups:
                future = function.submit(fields)
                for index, own in enumerate(calls):
                    own[name] = Call(future, index)
            else:
                for own, record in zip(calls, fields, strict=True):
                    own[name] = Call(function.submit([record]), 0)
        return calls

    def close(self) -> None:
        """Ends the workers."""
        for function in self._functions.values():
            function.close()


class _Function:
    """One function with its workers."""

    def __init__(self, name: str, where: str, settings: FunctionSettings, workers: int) -> None:
        path, _, function = where.rpartition(":")
        file = Path(path).expanduser().absolute()
        if not file.is_file():
            raise ValueError(f"rewards.functions.{name}: found no file {file}, required PATH.py:FUNCTION")
        self._item: dict[str, Any] = {"path": str(file), "name": function}
        self._pool = WorkerPool(
            address(inside.work),
            workers=workers,
            deadline_seconds=settings.deadline_seconds,
            memory_gb=settings.memory_gb,
            warm_up=[(address(inside.load), (str(file), function))],
            variables=settings.variables,
        )

    @cached_property
    def takes_groups(self) -> bool:
        """Raises RuntimeError if the file cannot be imported or has no such function."""
        outcome = self._pool.submit(self._item | {"records": []}).result()
        if outcome.problem:
            raise RuntimeError(outcome.problem)
        return bool(outcome.value)

    def submit(self, records: list[dict[str, Any]]) -> Future[Outcome]:
        return self._pool.submit(self._item | {"records": records})

    def close(self) -> None:
        self._pool.close()


def fields_of(record: Record) -> dict[str, Any]:
    """What a function is told of a record; its keys are `inside.FIELDS`."""
    question = record.question
    return {
        "question": record.asked,
        "answer": question.answer,
        "completion": record.completion,
        "thoughts": split_thoughts(record.completion, think_prefilled=record.think_prefilled).thoughts,
        "final_answer": final_answer(record.completion, think_prefilled=record.think_prefilled)[0],
        "prompt": record.prompt,
        "num_tokens": record.num_tokens,
        "truncated": record.truncated,
        "language": question.language,
        "tests": question.tests,
        "columns": question.columns or {},
    }
