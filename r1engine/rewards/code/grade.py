"""The code reward (paper, section 2.2.2): runs a program against tests in the sandbox. No torch.

What a program prints or returns is compared here; it never sees what is expected. "wrong" needs a test that ran
and failed. Where the sandbox, the compiler or the record fails, the verdict is "undecided".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from r1engine.rewards.code.compare import is_same_value, output_problem
from r1engine.rewards.code.fences import fenced_blocks
from r1engine.rewards.code.problems import CallTest, CodeProblem, PrintTest
from r1engine.rewards.extract import answer_region
from r1engine.rewards.record import Verdict
from r1engine.rewards.sandbox import DEFAULT_LIMITS, Channel, Limits, ProgramError, ProgramRun, Sandbox, SandboxError
from r1engine.rewards.sandbox.inside.plain import encode

MAX_PROGRAM_CHARACTERS = 200_000


def final_code(
    text: str, language: str, *, think_prefilled: bool = False, bare_allowed: bool = False
) -> tuple[str | None, str]:
    """(the program, "") or (None, why there is none): the last fenced block of the language after the thoughts.

    A block without a name is the program only where none is named: behind a program it shows what that prints.
    With an `<answer>` tag only the last `<answer>` block counts, and if nothing in it is fenced, all of it is the
    program. A fence that is not closed holds no program.

    Args:
        text: what the model wrote after the prompt.
        language: "python" or "cpp"; a fence without a name counts where none has one.
        think_prefilled: the prompt itself ended with `<think>`.
        bare_allowed: a text without any fence or tag is the program: a base model that goes on with the prompt.
    """
    region, why_none = answer_region(text, think_prefilled=think_prefilled)
    if region is None:
        return None, why_none
    blocks, is_open = fenced_blocks(region.text)
    if is_open:
        return None, "the last code block is not closed"
    named = [block.code for block in blocks if block.is_of(language)]
    programs = named or [block.code for block in blocks if not block.name]
    is_bare = region.is_tagged or (bare_allowed and region.text == text)
    if not blocks and region.text.strip() and is_bare:
        programs = [region.text.strip("\n")]
    if not programs:
        return None, f"no {language} code block"
    if len(programs[-1]) > MAX_PROGRAM_CHARACTERS:
        return None, f"a program of more than {MAX_PROGRAM_CHARACTERS} characters"
    return programs[-1], ""


def grade_code(
    program: str, problem: CodeProblem, sandbox: Sandbox, limits: Limits = DEFAULT_LIMITS
) -> tuple[Verdict, str]:
    """(verdict, reason in one line) of a program: right if it passes every test; it stops at the first it fails.

    Args:
        program: its source.
        problem: the tests.
        sandbox: where it runs. Problems with a `check` use a second one beside it.
        limits: of each test.
    """
    try:
        if problem.check:
            return _grade_by_check(program, problem, sandbox, limits)
        if problem.language == "cpp":
            with sandbox.compile_cpp(program) as binary:
                return _grade_by_output(problem, lambda stdin: sandbox.run_binary(binary, stdin, limits))
        if problem.function:
            return _grade_by_calls(program, problem, sandbox, limits)
        return _grade_by_output(
            problem, lambda stdin: sandbox.run_script(program, stdin, limits, prelude=problem.prelude)
        )
    except ProgramError as error:
        return "wrong", str(error)
    except SandboxError as error:
        return "undecided", str(error)


def _grade_by_output(problem: CodeProblem, run: Callable[[str], ProgramRun]) -> tuple[Verdict, str]:
    for number, test in enumerate(problem.tests, 1):
        assert isinstance(test, PrintTest)  # as a problem without a function has
        done = run(test.stdin)
        if wrong := done.problem or output_problem(done.stdout, test.stdout):
            return "wrong", f"test {number} of {len(problem.tests)}: {wrong}"
    return "right", f"passed {len(problem.tests)} tests"


def _grade_by_calls(program: str, problem: CodeProblem, sandbox: Sandbox, limits: Limits) -> tuple[Verdict, str]:
    for number, test in enumerate(problem.tests, 1):
        assert isinstance(test, CallTest)  # as a problem with a function has
        where = f"test {number} of {len(problem.tests)}"
        try:
            with sandbox.functions(program, limits, prelude=problem.prelude) as module:
                found = module.call(problem.function, [encode(argument) for argument in test.arguments])
        except ProgramError as error:
            return "wrong", f"{where}: {error}"
        if not any(is_same_value(found, encode(value)) for value in test.accepted):
            return "wrong", f"{where}: found {str(found)[:60]}, required {str(test.accepted[0])[:60]}"
    return "right", f"passed {len(problem.tests)} tests"


def _grade_by_check(program: str, problem: CodeProblem, sandbox: Sandbox, limits: Limits) -> tuple[Verdict, str]:
    """The asserting code runs beside the solution: it has the expected values, and gets only plain values."""
    waits = replace(limits, wall_seconds=limits.longest_seconds + 10.0)
    calls = 0
    try:
        checker = sandbox.beside.functions(problem.check, waits, mode="check")
        with checker as asking, _solution(program, problem, sandbox, limits) as module:
            while "arguments" in (asked := asking.receive()):
                calls += 1
                answer = module.ask({"name": problem.function, "arguments": asked["arguments"]})
                asking.send({key: answer[key] for key in ("value", "raised", "message") if key in answer})
    except _SolutionError as error:
        return "wrong", f"call {calls}: {error}"
    except ProgramError as error:
        return "undecided", f"the check itself failed in call {calls}: {error}"
    if "failed" in asked:
        return "wrong", f"call {calls}: {str(asked['failed'])[:150]}"
    return ("right", f"passed {calls} calls") if calls else ("undecided", "the check never called the function")


class _SolutionError(Exception):
    """The solution failed, as opposed to what checks it."""


@contextlib.contextmanager
def _solution(program: str, problem: CodeProblem, sandbox: Sandbox, limits: Limits) -> Iterator[Channel]:
    """The solution; it defines the function, or goes on where the prompt stops."""
    defines = re.search(rf"^(?:async )?def {re.escape(problem.function)}\b", program, re.MULTILINE)
    prelude, source = (problem.prelude, program) if defines else ("", problem.prelude + program)
    try:
        with sandbox.functions(source, limits, prelude=prelude) as module:
            yield module
    except ProgramError as error:
        raise _SolutionError(str(error)) from None
