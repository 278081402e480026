"""Tasks of reasoning-gym: questions from its generators, answers scored by its scorers inside the sandbox.

Nine of its scorers execute the answer, so no answer reaches one that would execute more than arithmetic. A score of
exactly 1.0 is right, everything below is wrong: the scorers give part of it to answers that only look alike.
Facts of reasoning-gym 0.1.25; the tests find them again in the installed version.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from r1engine.rewards.record import Record, Verdict
from r1engine.rewards.rule import Rule, Task
from r1engine.rewards.sandbox import Limits, ProgramError, Sandbox, SandboxError
from r1engine.rewards.sandbox.inside.plain import encode
from r1engine.rewards.workers.tasks import own_sandbox

if TYPE_CHECKING:
    from r1engine.rewards.settings import ScorerSettings

MODULES = ("reasoning_gym",)  # for Sandbox(modules=...): imported once, before the forks
BROKEN = {
    "boxnet": "it has no reference answers, and its scorer raises on answers that are no object",
    "coin_flip": "its scorer gives 1.0 for a prefix: 0 for 0.3125",
    "composite": "it is a mixture; use its parts",
    "game_of_life_halting": "its scorer gives 1.0 to any text where the answer is False",
    "propositional_logic": "its scorer gives 1.0 to a premise that is repeated",
    "puzzle24": "its scorer does not look which numbers are used",
}
# Their scorers call eval(answer), which can only lead to a score below 1; equality is all that counts.
EVALUATING = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
# Their scorers call sympy.parse_expr(answer), which is eval, too.
COMPUTING = frozenset({"countdown", "intermediate_integration", "polynomial_multiplication", "simple_integration"})

MAX_ANSWER_CHARACTERS = 10_000
_LIMITS = Limits(cpu_seconds=20, wall_seconds=30.0)  # some scorers read their data first
_FUNCTIONS = frozenset(
    ("sqrt", "exp", "log", "ln", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh")
)
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Name, ast.Load, ast.Call, ast.Constant, ast.Add, ast.Sub, ast.Mult,
    ast.Div, ast.Pow, ast.USub, ast.UAdd,
)  # fmt: skip
_SCORE = """
def score(task, answer, entry):
    return float(reasoning_gym.get_score_answer_fn(task)(answer, entry))
"""


def gym_records(task: str, *, seed: int, size: int, config: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Questions of a task: {"question", "answer", "reward": "gym", "tests": {"task", "entry"}}, ready for JSON.

    Args:
        task: one of reasoning-gym's; it has about a hundred.
        seed: the same seed gives the same questions.
        size: how many.
        config: settings of the task's generator.

    Raises:
        ValueError: there is no such task, or its scorer is known to be wrong.
        RuntimeError: reasoning-gym is not installed.
    """
    check_task(task)
    try:
        import reasoning_gym
    except ImportError:
        raise RuntimeError("gym: reasoning-gym is not installed: pip install 'r1engine[gym]'") from None
    if task not in reasoning_gym.factory.DATASETS:
        raise ValueError(
            f"gym: found task {task!r}, required one of {', '.join(sorted(reasoning_gym.factory.DATASETS))}"
        )
    for item in reasoning_gym.create_dataset(task, seed=seed, size=size, **(config or {})):
        yield {
            "question": item["question"],
            "answer": "" if item["answer"] is None else str(item["answer"]),
            "reward": "gym",
            "tests": {"task": task, "entry": encode(item)},
        }


def check_task(task: str) -> None:
    """Refuses a task whose scorer is known to be wrong.

    Raises:
        ValueError: it is; says how.
    """
    if task in BROKEN:
        raise ValueError(f"gym: task {task!r} cannot be scored: {BROKEN[task]}")


def grade_gym(answer: str, tests: dict[str, Any], sandbox: Sandbox) -> tuple[Verdict, str]:
    """(verdict, reason in one line) of an extracted answer.

    A scorer that raises says wrong: some do so on text that is no answer. One that runs out of time is undecided.

    Args:
        answer: the final answer of a completion.
        tests: {"task", "entry"} of a record of `gym_records`.
        sandbox: one that was made with `modules=MODULES`.
    """
    try:
        task, entry = tests["task"], tests["entry"]
        check_task(task)
        fields = {key: value for key, value in entry["dict"] if isinstance(key, str)}
    except (KeyError, TypeError, ValueError) as error:
        return "undecided", f"gym: the record's tests cannot be used: {error}"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "wrong", f"longer than {MAX_ANSWER_CHARACTERS} characters"
    if task in EVALUATING:
        return _equal(answer, fields)
    if task in COMPUTING and (problem := arithmetic_problem(answer)):
        return "wrong", problem
    try:
        with sandbox.functions(_SCORE, _LIMITS, prelude="import reasoning_gym") as module:
            found = module.ask({"name": "score", "arguments": [task, encode(answer), entry]})
    except (ProgramError, SandboxError) as error:
        return "undecided", f"gym: {error}"
    if "value" not in found:
        return "wrong", f"the scorer of {task} raised {str(found.get('message'))[:100]}"
    return ("right", f"{task}: 1.0") if found["value"] in (1, 1.0) else ("wrong", f"{task}: {found['value']}")


def arithmetic_problem(text: str) -> str:
    """Why a text is more than arithmetic on numbers, single letters and known functions, or ""."""
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "the answer is no expression"
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        is_function = id(node) in called
        if (
            not isinstance(node, _ARITHMETIC)
            or (isinstance(node, ast.Constant) and type(node.value) not in (int, float))
            or (isinstance(node, ast.Call) and (node.keywords or not isinstance(node.func, ast.Name)))
            or (isinstance(node, ast.Name) and (node.id not in _FUNCTIONS if is_function else not _is_symbol(node.id)))
        ):
            return f"the answer holds more than arithmetic: {type(node).__name__}"
    return ""


def _is_symbol(name: str) -> bool:
    return (len(name) == 1 and name.isascii()) or name == "pi"


def _equal(answer: str, fields: dict[str, Any]) -> tuple[Verdict, str]:
    metadata = dict(fields["metadata"]["dict"]) if isinstance(fields.get("metadata"), dict) else {}
    accepted = [fields.get("answer"), *(metadata.get("valid_answers") or [])]
    is_equal = answer.strip() in [text.strip() for text in accepted if isinstance(text, str)]
    return ("right", "equal text") if is_equal else ("wrong", "other text")


def _grade(answer: str, record: Record, settings: ScorerSettings) -> Task:
    return Task(compute, (answer, record.question.tests, settings.unsafe))


def compute(answer: str, tests: dict[str, Any], unsafe: bool) -> tuple[Verdict, str]:
    """(verdict, reason) of an answer, in this process's sandbox."""
    return grade_gym(answer, tests, own_sandbox(MODULES, unsafe))


GYM = Rule("gym", _grade, needs="tests", runs_code=True)
