"""The code reward: which program counts, how output and values compare, which records are read."""

import base64
import json
import pickle
import zlib

import pytest

from r1engine.rewards.code.compare import is_same_value, output_problem
from r1engine.rewards.code.grade import MAX_PROGRAM_CHARACTERS, final_code, grade_code
from r1engine.rewards.code.problems import CallTest, CodeProblem, PrintTest, parse_problem
from r1engine.rewards.sandbox import Limits, Sandbox
from r1engine.rewards.sandbox.inside import plain

QUICK = Limits(cpu_seconds=1, wall_seconds=1.0)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as place:
        yield place


@pytest.mark.parametrize(
    ("found", "expected", "problem"),
    [
        ("1 2\n", "1 2", ""),
        ("1   2  \n\n\n", "1 2\n", ""),
        ("1\n2", "1 2", "line 1: found '1', required '1 2'"),
        ("1\n", "1\n2\n", "line 2: found the end, required '2'"),  # cut output never passes
        ("1\n2\n3", "1\n2", "line 3: found '3', required the end"),
        ("", "1", "line 1: found '', required '1'"),
        ("yes", "YES", "line 1: found 'yes', required 'YES'"),
        ("NO YES YES", "YES NO YES", "line 1: found 'NO YES YES', required 'YES NO YES'"),
        ("0.50000001", "0.5", ""),
        ("0.5001", "0.5", "line 1: found '0.5001', required '0.5'"),
        ("5", "5.0", ""),
        ("5.0", "5", "line 1: found '5.0', required '5'"),
        ("1000000000000000001", "1000000000000000000", "line 1: found '1000000000000000001', required '10000"),
        ("1e3", "1000.0", ""),
        ("nan", "0.5", "line 1: found 'nan', required '0.5'"),
        ("0.5abc", "0.5", "line 1: found '0.5abc', required '0.5'"),
        ("\u0661.5", "1.5", "line 1: found "),  # an Arabic digit is none here
    ],
)
def test_output_is_compared_by_lines_then_tokens(found, expected, problem):
    result = output_problem(found.encode(), expected)
    assert result == problem if not problem else result.startswith(problem)


def test_output_that_is_no_utf8_is_named():
    assert output_problem(b"ab\xff", "ab") == "the output is not UTF-8: invalid start byte at byte 2"


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ([1, 2], [1, 2], True),
        ((1, 2), [1, 2], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 2], False),
        (1, True, False),
        (True, 1, False),
        (True, 1.0, False),
        (5.0, 5, False),
        (5, 5.0, True),
        (0.1 + 0.2, 0.3, True),
        (float("nan"), 0.5, False),
        ("1", 1, False),
        (None, None, True),
        (0, None, False),
        (2**70, 2**70, True),
        (2**70 + 1, 2**70, False),
        ({1: [2]}, {"1": [2]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1}, {}, False),
        ({1, 2}, {2, 1}, True),
        ({1, 2}, [1, 2], False),
        (b"a", "a", False),
    ],
)
def test_values_are_compared_by_type_and_value(found, expected, same):
    assert is_same_value(plain.encode(found), plain.encode(expected)) == same


ENCODABLE = [None, True, -3, 2**200, -(2**200), 0.1, float("inf"), "\udc80x", b"\x00", 1 + 2j]
ENCODABLE += [[], (), {}, set(), frozenset({1}), {"int": "ff"}, {(1, "a"): [{2}, (3.5, [None])]}]


@pytest.mark.parametrize("value", ENCODABLE)
def test_plain_values_survive_the_way_out_and_back(value):
    back = plain.loads(plain.dumps(value))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("text", ['{"int": "xyz"}', '{"a": 1, "b": 2}', '{"list": []}', '{"set": [[1]]}', "[" * 10**5])
def test_what_is_no_value_is_refused(text):
    with pytest.raises(ValueError):
        plain.loads(text)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("<think>```python\nno\n```</think>So:\n```python\nprint(1)\n```\nDone.", "print(1)"),
        ("```python\nold\n```\nbetter:\n```py\nnew\n```", "new"),
        ("```python\nprint(1)\n```\n```text\noutput\n```", "print(1)"),
        ("```\nprint(1)\n```", "print(1)"),
        ("<think>x</think><answer>print(1)\n</answer>", "print(1)"),
        ("<think>x</think>```python\nno\n```<answer>```python\nprint(1)\n```</answer>", "print(1)"),
        ("```python\n    return 1\n```", "    return 1"),
        ("````python\nprint('''\n```\n''')\n````", "print('''\n```\n''')"),
        ("```cpp\nint main() {}\n```", None),
        ("no code at all", None),
        ("```python\nprint(1)", None),
        ("<think>```python\nprint(1)\n```", None),
        ("<think></think><answer>", None),
        ("```python\n" + "x" * (MAX_PROGRAM_CHARACTERS + 1) + "\n```", None),
    ],
)
def test_last_closed_block_after_the_thoughts_is_the_program(text, program):
    found, why_none = final_code(text, "python")
    assert found == program
    assert bool(why_none) == (program is None)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python title='a.py' {1,3}\nprint(1)\n```", "print(1)"),  # the language is the first word
        ("```Python3.11\nprint(1)\n```", "print(1)"),
        ("```{.python .numberLines}\nprint(1)\n```", "print(1)"),
        ("```python:main.py\nprint(1)\n```", "print(1)"),
        ("```language-python\nprint(1)\n```", "print(1)"),
        ("~~~py\nprint(1)\n~~~", "print(1)"),
        ("~~~py\nprint('```')\n```\n~~~", "print('```')\n```"),  # another sign does not close it
        ("```python\nprint(1)\n```\nIt prints\n```\n1\n```", "print(1)"),  # named before nameless
        ("```\nold\n```\n```\nprint(1)\n```", "print(1)"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),  # the indent is the list's
        ("- ```python\n  if x:\n      y\n  ```", "if x:\n    y"),
        ("10. * ```python\n      if x:\n          y\n      ```", "if x:\n    y"),
        ("> ```python\n> if x:\n>     y\n> ```", "if x:\n    y"),
        ("  ```python\nprint(1)\n  ```", "print(1)"),  # a line with less indent loses what it has
        ("```python\nx = (\n        ```\n)\n```", "x = (\n        ```\n)"),  # too deep to close it
        ("`````python\n```\n`````", "```"),
        ("``` not a fence``` \n```python\nprint(1)\n```", "print(1)"),
        ("```pycon\n>>> 1\n```", None),
        ("```text\nprint(1)\n```", None),
    ],
)
def test_fences_are_read_as_commonmark_has_them(text, program):
    assert final_code(text, "python")[0] == program


@pytest.mark.parametrize("name", ["cpp", "C++", "c++17", "cpp20", "cc", "g++", "c++ linenums"])
def test_every_name_of_cpp_counts(name):
    assert final_code(f"```{name}\nint main() {{}}\n```\n```\n5\n```", "cpp") == ("int main() {}", "")
    assert final_code(f"```{name}\nint main() {{}}\n```", "python")[0] is None


def test_completion_of_ten_megabytes_is_read_at_once():
    text = "<think>" + "`" * 5_000_000 + "```python\nx\n" * 400_000 + "</think>\n```python\nprint(1)\n```"
    assert final_code(text, "python") == ("print(1)", "")


def test_reason_says_which_test_failed_and_how(sandbox):
    problem = CodeProblem((PrintTest("1", "1"), PrintTest("2", "4"), PrintTest("3", "9")))
    assert grade_code("print(int(input()) ** 2)", problem, sandbox) == ("right", "passed 3 tests")
    assert grade_code("print(input())", problem, sandbox) == ("wrong", "test 2 of 3: line 1: found '2', required '4'")
    verdict, reason = grade_code("print(1 // (2 - int(input())))", problem, sandbox)
    assert (verdict, reason) == (
        "wrong",
        "test 2 of 3: exit status 1: ZeroDivisionError: integer division or modulo by zero",
    )


def test_half_a_surrogate_pair_is_wrong_and_breaks_nothing(sandbox):
    problem = CodeProblem((PrintTest("", "x"),))
    verdict, reason = grade_code("print('\ud800')", problem, sandbox)
    assert verdict == "wrong" and "SyntaxError" in reason


def test_broken_sandbox_and_missing_compiler_are_undecided(sandbox, monkeypatch):
    monkeypatch.setattr("r1engine.rewards.sandbox.runner.compiler", lambda: None)  # a machine without one
    problem = CodeProblem((PrintTest("", ""),), language="cpp")
    assert grade_code("int main() {}", problem, sandbox) == (
        "undecided",
        "sandbox: no C++ compiler; required g++ or clang++ in /usr/bin",
    )


LCB_PRINT = {"public_test_cases": json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}])}


def hidden(cases) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def test_live_code_bench_records_are_read():
    private = hidden([{"input": "3\n", "output": "9\n", "testtype": "stdin"}])
    problem = parse_problem({**LCB_PRINT, "private_test_cases": private, "metadata": "{}"})
    assert problem.tests == (PrintTest("2\n", "4\n"), PrintTest("3\n", "9\n"))
    cases = json.dumps([{"input": '[1, 2]\n"a"', "output": "[1]", "testtype": "functional"}])
    problem = parse_problem({"public_test_cases": cases, "metadata": '{"func_name": "f"}'})
    assert (problem.function, problem.tests) == ("f", (CallTest([[1, 2], "a"], [[1]]),))


def test_pickle_that_would_run_something_is_not_loaded(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    field = base64.b64encode(zlib.compress(pickle.dumps(Attack()))).decode()
    with pytest.raises(ValueError, match="holds more than one text; it is not loaded"):
        parse_problem({**LCB_PRINT, "private_test_cases": field})
    assert not (tmp_path / "ran").exists()


def test_apps_records_are_read():
    record = {"input_output": json.dumps({"inputs": ["1\n", ["2", "3"]], "outputs": ["1\n", ["4"]]})}
    assert parse_problem(record).tests == (PrintTest("1\n", "1\n"), PrintTest("2\n3", "4"))
    record = {"input_output": {"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]}}
    problem = parse_problem(record)
    assert (problem.function, problem.tests) == ("f", (CallTest([1, [2]], [[3], 3]),))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"found the fields \[\], required tests, input_output"),
        ({"tests": []}, "it has no tests; required at least one, or every program would pass"),
        ({"tests": [{"stdin": "1"}]}, "found no stdout, required `stdout` in each test or `function` in the record"),
        ({"tests": [{"stdout": "1"}], "language": "java"}, "found language 'java', required 'python' or 'cpp'"),
        ({"tests": [{"result": 1}], "function": "f"}, "found KeyError: 'arguments' while reading its tests"),
        ({"input_output": "{"}, "input_output is no JSON"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "found 1 inputs and 0 outputs"),
        ({"entry_point": "f", "prompt": "", "test": "assert 1"}, r"`test` defines no check\(candidate\)"),
        ({"public_test_cases": "[]"}, "it has no tests"),
        ({**LCB_PRINT, "private_test_cases": "!!"}, "private_test_cases is neither JSON nor compressed"),
    ],
)
def test_record_that_cannot_be_read_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        parse_problem(record)


def test_records_of_every_format_are_graded(sandbox):
    square = "n = int(input())\nprint(n * n)"
    own = {"tests": [{"arguments": [[1, 2]], "result": [2, 4]}], "function": "double"}
    apps = {"input_output": {"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]}}
    lcb = {
        "public_test_cases": json.dumps([{"input": "[3]", "output": "9", "testtype": "functional"}]),
        "metadata": '{"func_name": "f"}',
    }
    for record, right, wrong in [
        (LCB_PRINT, square, "print(5)"),
        (own, "def double(x): return tuple(2 * i for i in x)", "def double(x): return x"),
        (apps, "class Solution:\n    def f(self, a, b): return a + b[0]", "def f(a, b): return a"),
        (
            lcb,
            "def f(x: List[int]): return pow(x[0], 2, 10)",
            "def f(x): return 81",
        ),  # typing and builtin pow are there
    ]:
        problem = parse_problem(record)
        assert grade_code(right, problem, sandbox)[0] == "right"
        assert grade_code(wrong, problem, sandbox)[0] == "wrong"
