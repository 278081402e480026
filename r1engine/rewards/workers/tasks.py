"""What runs in the worker processes: one function that finds the others by name, and the sandbox that they share."""

from __future__ import annotations

from functools import cache
from typing import Any

from r1engine.rewards.sandbox import Sandbox
from r1engine.rewards.workers.nursery import function_at


def work(item: list[Any]) -> Any:
    """What a function returns, of an item [address, arguments]."""
    where, arguments = item
    return function_at(where)(*arguments)


@cache
def own_sandbox(modules: tuple[str, ...], unsafe: bool) -> Sandbox:
    """This process's sandbox with these modules; it ends with the process."""
    return Sandbox(modules=modules, unsafe=unsafe)
