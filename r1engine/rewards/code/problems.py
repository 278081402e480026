"""Problems whose answer is a program: our own records and those of LiveCodeBench, HumanEval and APPS.

Test data is JSON. LiveCodeBench hides its private tests in a pickle: it is never loaded, only the text in it is read.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import re
import zlib
from dataclasses import dataclass
from typing import Any, Literal

MAX_TEST_BYTES = 2**30  # of one problem, unpacked

# What LiveCodeBench's and LeetCode's solutions may use without importing it.
# The builtins come last: `math` has another pow.
PRELUDE = """\
import bisect, collections, copy, datetime, functools, heapq, itertools, json, math, operator, random, re, string, sys
from bisect import *
from collections import *
from copy import *
from datetime import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from random import *
from re import *
from string import *
from typing import *
import datetime
from builtins import *
"""
# HumanEval/33 compares the candidate with the function of that name, which is the candidate itself.
_BIND = """\
def check(candidate, check=check):
    globals()["{name}"] = candidate
    check(candidate)
"""
_FORMATS = {
    "public_test_cases": ("public_test_cases", "private_test_cases", "metadata"),
    "entry_point": ("prompt", "entry_point", "test"),
    "input_output": ("input_output",),
}
_PICKLED_TEXT = {"PROTO", "FRAME", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "MEMOIZE", "BINPUT",
                 "LONG_BINPUT", "PUT", "STOP"}  # fmt: skip


@dataclass(frozen=True)
class PrintTest:
    """What a program must print for an input."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallTest:
    """What a function must return; any of the accepted values."""

    arguments: list[Any]
    accepted: list[Any]


@dataclass(frozen=True)
class CodeProblem:
    """A problem with the tests that its solution must pass, all of one kind."""

    tests: tuple[PrintTest, ...] | tuple[CallTest, ...] = ()
    function: str = ""  # that the solution defines; "" for a program
    language: Literal["python", "cpp"] = "python"
    prelude: str = ""  # what comes before the solution
    check: str = ""  # instead of tests: code that defines check(candidate), which asserts


def test_fields(row: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a line that is itself a record of LiveCodeBench, HumanEval or APPS; None if it is none."""
    for marker, names in _FORMATS.items():
        if marker in row:
            return {name: row[name] for name in names if name in row}
    return None


def tests_problem(record: dict[str, Any] | list[Any]) -> str:
    """Why `parse_problem` refuses a record, or ""."""
    try:
        parse_problem(record)
    except ValueError as error:
        return str(error)
    return ""


def parse_problem(record: dict[str, Any] | list[Any]) -> CodeProblem:
    """The problem of a record, in whichever of the formats it is.

    - LiveCodeBench: `public_test_cases`, `private_test_cases`, `metadata`
    - HumanEval: `prompt`, `entry_point`, `test`
    - APPS: `input_output`
    - ours: `tests`, a list of {"stdin", "stdout"} or of {"arguments", "result"}, the latter with `function` in the
      record; `language` "python" or "cpp"; or only the list

    Raises:
        ValueError: it is in none of them, or has no tests; says what is wrong.
    """
    if isinstance(record, list):
        record = {"tests": record}
    try:
        if "public_test_cases" in record:
            return _live_code_bench(record)
        if "entry_point" in record:
            return _human_eval(record)
        if "input_output" in record:
            return _apps(record)
        if "tests" in record:
            return _own(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"code problem: found {type(error).__name__}: {error} while reading its tests") from None
    raise ValueError(
        f"code problem: found the fields {sorted(record)[:12]}, required tests, input_output, entry_point with test, "
        "or public_test_cases"
    )


def _own(record: dict[str, Any]) -> CodeProblem:
    language = record.get("language", "python")
    if language not in ("python", "cpp"):
        raise ValueError(f"code problem: found language {language!r}, required 'python' or 'cpp'")
    items = _filled(record["tests"])
    if all("stdout" in item for item in items):
        return CodeProblem(tuple(PrintTest(item.get("stdin", ""), item["stdout"]) for item in items), language=language)
    if not record.get("function"):
        raise ValueError("code problem: found no stdout, required `stdout` in each test or `function` in the record")
    if language != "python":
        raise ValueError("code problem: functions are called in Python only; a cpp program reads stdin")
    tests = tuple(CallTest(list(item["arguments"]), [item["result"]]) for item in items)
    return CodeProblem(tests, record["function"], prelude=PRELUDE)


def _human_eval(record: dict[str, Any]) -> CodeProblem:
    """The solution continues the prompt or defines the function again; the check gets the prompt's other functions."""
    if not re.search(r"^def check\(", record["test"], re.MULTILINE):
        raise ValueError("code problem: `test` defines no check(candidate)")
    prompt, name = record["prompt"], record["entry_point"]
    check = f"{prompt}\n\n{record['test']}\n\n{_BIND.format(name=name)}"
    return CodeProblem(function=name, prelude=prompt, check=check)


def _apps(record: dict[str, Any]) -> CodeProblem:
    found = record["input_output"]
    found = _json(found, "input_output") if isinstance(found, str) else found
    inputs, outputs, name = _filled(found["inputs"]), found["outputs"], found.get("fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"code problem: found {len(inputs)} inputs and {len(outputs)} outputs")
    if name is None:
        return CodeProblem(tuple(map(PrintTest, map(_joined, inputs), map(_joined, outputs))))
    # Whether [5] is the list or stands for 5 differs from record to record.
    accepted = [[value, *(value[:1] if isinstance(value, list) and len(value) == 1 else [])] for value in outputs]
    return CodeProblem(tuple(map(CallTest, map(list, inputs), accepted)), name, prelude=PRELUDE)


def _live_code_bench(record: dict[str, Any]) -> CodeProblem:
    cases = [*_lcb_cases(record["public_test_cases"]), *_lcb_cases(record.get("private_test_cases") or "[]")]
    kinds = {case["testtype"] for case in _filled(cases)}
    if kinds == {"stdin"}:
        return CodeProblem(tuple(PrintTest(case["input"], case["output"]) for case in cases), prelude=PRELUDE)
    if kinds != {"functional"}:
        raise ValueError(f"code problem: found tests of the types {sorted(kinds)}, required one of stdin, functional")
    metadata = record["metadata"]
    name = (_json(metadata, "metadata") if isinstance(metadata, str) else metadata)["func_name"]
    tests = [
        CallTest(
            [_json(line, "input") for line in case["input"].split("\n")],
            [_json(case["output"], "output")],
        )
        for case in cases
    ]
    return CodeProblem(tuple(tests), name, prelude=PRELUDE)


def _lcb_cases(field: Any) -> list[dict[str, Any]]:
    if isinstance(field, list):
        return field
    try:
        return json.loads(field)
    except ValueError:
        return _json(_pickled_text(field), "private_test_cases")


def _pickled_text(field: str) -> str:
    """The one text in a zlib-compressed pickle, without loading it: loading runs what the pickle says."""
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(field, validate=True), MAX_TEST_BYTES)
        if unpacker.unconsumed_tail:
            raise ValueError(f"code problem: its tests have more than {MAX_TEST_BYTES} bytes")
        steps = [(step.name, argument) for step, argument, _ in pickletools.genops(data)]
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"code problem: private_test_cases is neither JSON nor compressed: {error}") from None
    texts = [str(argument) for name, argument in steps if "UNICODE" in name]
    if len(texts) != 1 or not {name for name, _ in steps} <= _PICKLED_TEXT:
        raise ValueError("code problem: the pickle in private_test_cases holds more than one text; it is not loaded")
    return texts[0]


def _filled(items: Any) -> list[Any]:
    if not isinstance(items, list) or not items:
        raise ValueError("code problem: it has no tests; required at least one, or every program would pass")
    return items


def _joined(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(map(str, text))


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"code problem: {name} is no JSON: {error}") from None
