"""What runs in the worker processes of the rewards that run code; each process has a sandbox of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

from r1engine.rewards.code.grade import grade_code
from r1engine.rewards.code.problems import parse_problem
from r1engine.rewards.gym import MODULES, grade_gym
from r1engine.rewards.sandbox import Sandbox
from r1engine.rewards.workers import tasks as without_code


def work(item: dict[str, Any]) -> dict[str, Any]:
    """Results of the tasks in `item`, under the same names; those of `work.work` and

    code: [program, tests, unsafe] -> [verdict, reason]; `tests` as `code_problems.parse_problem` takes them
    gym:  [answer, tests, unsafe] -> [verdict, reason]
    """
    results = without_code.work(item)
    if "code" in item:
        program, tests, unsafe = item["code"]
        try:
            problem = parse_problem(tests)
        except ValueError as error:
            results["code"] = "undecided", str(error)
        else:
            results["code"] = grade_code(program, problem, _sandbox((), unsafe))
    if "gym" in item:
        answer, tests, unsafe = item["gym"]
        results["gym"] = grade_gym(answer, tests, _sandbox(MODULES, unsafe))
    return results


@cache
def _sandbox(modules: tuple[str, ...], unsafe: bool) -> Sandbox:
    return Sandbox(modules=modules, unsafe=unsafe)  # ends with the process
