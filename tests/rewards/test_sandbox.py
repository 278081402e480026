"""The sandbox: what programs get, what they do not get, and how failures are named."""

import os
import threading
from dataclasses import replace

import pytest

from r1engine.rewards.sandbox import Limits, ProgramError, Sandbox, SandboxError, probe, protection

QUICK = Limits(cpu_seconds=1, wall_seconds=1.0)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as place:
        yield place


def test_script_reads_stdin_and_prints_as_python_does(sandbox):
    source = (
        "import atexit, sys\natexit.register(print, 'at exit')\nprint(input()[::-1])\nprint('oops', file=sys.stderr)"
    )
    run = sandbox.run_script(source, "abc\n")
    assert (run.problem, run.stdout, run.stderr) == ("", b"cba\nat exit\n", "oops\n")


@pytest.mark.parametrize(
    ("source", "problem", "printed"),
    [
        ("print(1)\nexit()\nprint(2)", "", b"1\n"),
        ("print(1)\nquit(0)\nprint(2)", "", b"1\n"),
        ("print(1)\nexit(4)", "exit status 4: no message", b"1\n"),
        ("exit('bad input')", "exit status 1: bad input", b""),
        ("def f():\n    exit()\ntry:\n    f()\nexcept SystemExit:\n    print(2)", "", b"2\n"),
        ("print(callable(help), all(map(callable, (copyright, credits, license))))", "", b"True True\n"),
    ],
)
def test_programs_have_what_the_module_site_defines(sandbox, source, problem, printed):
    run = sandbox.run_script(source)
    assert (run.problem, run.stdout) == (problem, printed)


def test_thread_that_nobody_joins_prints_before_the_end(sandbox):
    source = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()"
    assert sandbox.run_script(source).stdout == b"late\n"


def test_program_may_start_with_a_future_import_after_a_prelude(sandbox):
    run = sandbox.run_script("from __future__ import annotations\nprint(known)", prelude="known = 1")
    assert (run.problem, run.stdout) == ("", b"1\n")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("1 / 0", "exit status 1: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "exit status 3: no message"),
        ("import sys; sys.exit('bad input')", "exit status 1: bad input"),
        ("this is no Python", "exit status 1: SyntaxError: invalid syntax"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("print('x' * 10**8)", "output limit: 8388608 bytes"),
        ("x = bytearray(2**31)", "exit status 1: MemoryError"),
        ("import time; time.sleep(100)", "time limit: still running after 1 s"),
        ("while True: pass", "time limit: "),
        ("open('/tmp/x', 'wb').write(b'x' * 10**8)", "exit status 1: OSError: [Errno 27] File too large"),
    ],
)
def test_problem_of_a_program_is_named_in_one_line(sandbox, source, problem):
    limits = QUICK if problem.startswith("time limit") else Limits(wall_seconds=60.0)  # a busy machine is slow
    assert sandbox.run_script(source, limits=limits).problem.startswith(problem)


def test_every_program_starts_afresh(sandbox):
    sandbox.run_script("import math, builtins\nmath.pi = 3\nbuiltins.len = None\nopen('/tmp/left', 'w')")
    run = sandbox.run_script("import math, os\nprint(math.pi > 3, len('ab'), os.listdir('/tmp'))")
    assert run.stdout == b"True 2 []\n"


def test_nothing_of_the_environment_or_the_machine_shows(sandbox, monkeypatch):
    monkeypatch.setenv("R1ENGINE_CANARY", "secret")
    sandbox.close()  # so that it starts with the variable set
    run = sandbox.run_script(
        "import os\nprint(sorted(os.environ), os.path.exists('/proc'), os.path.exists('/etc/passwd'))"
    )
    assert run.stdout == b"['LC_CTYPE', 'PWD'] False False\n"


def test_sandboxes_of_root_have_users_of_their_own():
    if os.geteuid() != 0:
        pytest.skip("only root can give each sandbox a user of its own")
    with Sandbox() as first, Sandbox() as second:
        users = {int(place.run_script("import os; print(os.getuid())").stdout) for place in (first, second)}
    assert len(users) == 2 and min(users) > 1000


def test_functions_take_and_return_plain_values(sandbox):
    values = [None, True, 2**80, -1.5, "\udcff", [1, [2]], {"dict": [["a", 1], [{"tuple": [1, 2]}, {"set": [3]}]]}]
    expected = [None, True, {"int": f"{2**80:x}"}, *values[3:]]
    with sandbox.functions("def same(x): return x") as module:
        sent = [value if value != 2**80 else expected[2] for value in values]
        assert [module.call("same", [value]) for value in sent] == expected


def test_method_of_a_solution_class_is_found(sandbox):
    with sandbox.functions("class Solution:\n    def twice(self, x): return 2 * x") as module:
        assert module.call("twice", [4]) == 8


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(x): return x / 0", "ZeroDivisionError: division by zero"),
        ("def f(x): return lambda: x", "ValueError: found function, required a plain value"),
        ("def g(x): return x", "NameError: the program defines no f"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import os\ndef f(x): os._exit(7)", "exit status 7"),
        ("import time\ndef f(x): time.sleep(100)", "time limit: still running"),
    ],
)
def test_function_that_fails_says_how(sandbox, source, message):
    with pytest.raises(ProgramError, match=message), sandbox.functions(source, QUICK) as module:
        module.call("f", [1])


def test_sandbox_that_breaks_is_replaced(sandbox):
    sandbox.run_script("print(1)")
    sandbox._slot._process.kill()
    os.kill(_first_process(sandbox), 9)
    assert sandbox.run_script("print(2)").stdout == b"2\n"


def _first_process(sandbox):
    return int(next(line for line in open(f"/proc/self/fdinfo/{sandbox._slot._init}") if line.startswith("Pid:"))[4:])


def test_threads_share_a_sandbox_in_turns(sandbox):
    printed = []
    threads = [
        threading.Thread(target=lambda n=n: printed.append(sandbox.run_script(f"print({n})").stdout)) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(printed) == [f"{n}\n".encode() for n in range(8)]


@pytest.mark.skipif(protection.compiler() is None, reason="no C++ compiler")
@pytest.mark.slow
def test_cpp_compiles_once_and_runs_afresh(sandbox):
    source = '#include <cstdio>\nint main() { int n; scanf("%d", &n); printf("%d\\n", 2 * n); return n > 9; }'
    with sandbox.compile_cpp(source) as program:
        runs = [sandbox.run_binary(program, text) for text in ("4", "21")]
        with pytest.raises(OSError, match="not permitted"):
            os.write(program, b"x")  # a run cannot change it for the next
    assert [(run.stdout, run.problem) for run in runs] == [(b"8\n", ""), (b"42\n", "exit status 1: no message")]
    with (
        pytest.raises(ProgramError, match=r"it does not compile: .*error: 'x' was not declared"),
        sandbox.compile_cpp("int main() { return x; }"),
    ):
        pass
    with pytest.raises(ProgramError, match="does not compile"), sandbox.compile_cpp('#include "/etc/passwd"'):
        pass


def test_missing_compiler_is_named(sandbox, monkeypatch):
    monkeypatch.setattr("r1engine.rewards.sandbox.runner.compiler", lambda: None)  # a machine without one
    with pytest.raises(SandboxError, match=r"no C\+\+ compiler; required g\+\+ or clang\+\+"), sandbox.compile_cpp(""):
        pass


def test_untrusted_code_is_refused_without_protection():
    bare = replace(probe(), bwrap=None, bwrap_problem="bubblewrap is not installed", landlock=0)
    with pytest.raises(RuntimeError, match=r"neither namespaces \(bubblewrap is not installed\) nor Landlock.*unsafe"):
        Sandbox(protection=bare)
    with pytest.raises(RuntimeError, match="the kernel offers no seccomp filters; required"):
        Sandbox(protection=replace(probe(), has_seccomp=False))


def test_bubblewrap_that_fails_is_named():
    assert protection._try("/bin/false") == "/bin/false: exit status 1"
    assert "No such file" in protection._try("/no/bwrap")
    with pytest.raises(SandboxError, match="cannot be started"):
        Sandbox(protection=replace(probe(), bwrap="/no/bwrap")).run_script("")


def test_what_protects_is_told():
    lines = probe().describe()
    assert [line.partition(":")[0].partition(" (")[0] for line in lines] == [
        "namespaces",
        "Landlock",
        "seccomp",
        "user",
        "resource limits, empty environment, wall-clock kill",
    ]
    assert "no: not here" in replace(probe(), bwrap=None, bwrap_problem="not here").describe()[0]


def test_missing_module_is_named():
    with pytest.raises(SandboxError, match="the module no_such_module is not installed"):
        Sandbox(modules=("no_such_module",)).run_script("")
