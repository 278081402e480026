"""Hostile programs score nothing, leave nothing and disturb nobody; as root and as an ordinary user."""

import os
import queue
import socket
import subprocess
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hostile_programs import ANSWER, PRINTING, RETURNING
from ordinary_user import ROOT, as_ordinary_user

from r1engine.rewards.code.grade import grade_code
from r1engine.rewards.code.problems import CallTest, CodeProblem, PrintTest
from r1engine.rewards.sandbox import Limits, ProgramRun, Sandbox, probe

PRINT = CodeProblem((PrintTest("4\n", ANSWER),))
CALL = CodeProblem((CallTest([4], [int(ANSWER)]),), function="answer")
LIMITS = Limits(cpu_seconds=1, wall_seconds=1.0, memory_bytes=2**28, output_bytes=2**20, processes=32)
SECRET = "canary-bytes-that-must-not-leak"
HOSTILE = [(name, source, PRINT) for name, source in PRINTING.items()]
HOSTILE += [(name, source, CALL) for name, source in RETURNING.items()]
ESCAPES = (
    "fork bomb", "fork bomb of a few that sleep", "double-fork daemon", "reads the environment", "reads /proc",
    "reads the machine's files", "fills the disk", "leaves a tree that is hard to remove", "kills everyone",
    "traces its parent", "ignores signals and computes", "stops itself", "becomes a shell",
    "poisons the interpreter for the next",
)  # fmt: skip
# Each takes the whole second of processor time that it may have. As an ordinary user the escapes among such programs
# stand for these: the same limit, as root and not, ends all of them.
COMPUTING = (
    "memory bomb that catches the error", "computes in C and hears no signal", "deep recursion", "deep recursion in C",
    "swallows everything",
)  # fmt: skip
ALL_LAYERS = probe()
NAMESPACES = replace(ALL_LAYERS, has_seccomp=False, landlock=0)
LANDLOCK = replace(ALL_LAYERS, bwrap=None, bwrap_problem="switched off")
HONEST = ["n = int(input()); print(sum(range(n)))", "print(sum(range(int(input()))) + 1)"]  # right, wrong


class Recording(Sandbox):
    """Keeps all that programs wrote."""

    written = b""

    def run_script(self, *arguments, **options) -> ProgramRun:
        run = super().run_script(*arguments, **options)
        self.written += run.stdout + run.stderr.encode()
        return run


class Traces:
    """What hostile programs could leave behind: processes, files, connections."""

    def __init__(self, folder: Path) -> None:
        self.secret = folder / "canary-file"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o644)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.setblocking(False)
        self.before = self.found()

    def prepare(self, source: str) -> str:
        source = source.replace("CANARY_NAME", "canary-name-").replace("CANARY", str(self.secret))
        return source.replace("PORT", str(self.server.getsockname()[1]))

    def found(self) -> set[str]:
        """Processes below this one or of a sandbox's user, and files of theirs."""
        processes = {f"process {pid}: {name}" for pid, name in _processes().items()}
        files = set()
        for folder in (tempfile.gettempdir(), "/dev/shm", "/var/tmp", "/"):
            for path in Path(folder).iterdir():
                if path.name.startswith(("canary-name-", "r1engine-sandbox-")) or path.lstat().st_uid >= 2**30:
                    files.add(f"file {path}")
        return processes | files

    def check(self, written: bytes) -> None:
        assert SECRET.encode() not in written
        assert self.found() <= self.before
        with pytest.raises(BlockingIOError):
            self.server.accept()
        self.server.close()


def _processes() -> dict[int, str]:
    """pid -> name, zombies aside."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            uid = folder.stat().st_uid
        except OSError:
            continue  # it has ended
        state, parent = rest.split()[:2]
        if state != "Z":
            parents[int(folder.name)], names[int(folder.name)] = int(parent), (name, uid)

    def is_ours(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return {p: name for p, (name, uid) in names.items() if p != os.getpid() and (uid >= 2**30 or is_ours(p))}


def grade_all(items, protection, num_sandboxes):
    """(results by name, bytes written): verdict and reason of each item, from sandboxes that work side by side."""
    waiting, results, written = queue.SimpleQueue(), {}, []
    for item in items:
        waiting.put(item)

    def work():
        with Recording(protection=protection, unsafe=True) as sandbox:
            while True:
                try:
                    name, source, problem = waiting.get_nowait()
                except queue.Empty:
                    break
                results[name] = grade_code(source, problem, sandbox, LIMITS)
            results[f"honest, after all in {threading.get_ident()}"] = honest(0, sandbox)
            written.append(sandbox.written)

    workers = [threading.Thread(target=work) for _ in range(num_sandboxes)]
    for worker in workers:
        worker.start()
    return results, written, workers


def honest(number, sandbox):
    test = PrintTest(f"{number}\n", f"{number * (number - 1) // 2}\n")
    return grade_code(HONEST[number % 2], CodeProblem((test,)), sandbox, replace(LIMITS, wall_seconds=10.0))


def run_hostile(items, protection, tmp_path, monkeypatch, beside=lambda: None):
    monkeypatch.setenv("R1ENGINE_CANARY", SECRET)
    traces = Traces(tmp_path)
    items = [(name, traces.prepare(source), problem) for name, source, problem in items]
    results, written, workers = grade_all(items, protection, 4)
    beside()
    for worker in workers:
        worker.join()
    traces.check(b"".join(written))
    assert len(results) == len(items) + 4
    unexpected = {
        name: result for name, result in results.items() if (result[0] == "right") != name.startswith("honest")
    }
    assert unexpected == {}


def test_there_are_at_least_25_of_them():
    assert len(HOSTILE) >= 25


@pytest.mark.slow
@pytest.mark.turn(0)
def test_hostile_programs_score_nothing_and_a_thousand_honest_ones_keep_their_verdicts(tmp_path, monkeypatch):
    verdicts = []

    def grade_honest():
        with Sandbox() as sandbox:
            verdicts.extend(honest(number, sandbox)[0] for number in range(1000))

    items = [item for item in HOSTILE if os.geteuid() == 0 or item[0] not in COMPUTING]
    assert len(items) == len(HOSTILE) - (0 if os.geteuid() == 0 else len(COMPUTING))
    run_hostile(items, ALL_LAYERS, tmp_path, monkeypatch, grade_honest)
    assert verdicts == ["right", "wrong"] * 500


@pytest.mark.slow
@pytest.mark.turn(1)
def test_namespaces_alone_hold_programs_that_try_to_escape(tmp_path, monkeypatch):
    items = [(name, source, problem) for name, source, problem in HOSTILE if name in ESCAPES]
    assert len(items) == len(ESCAPES)
    run_hostile(items, NAMESPACES, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() == 0, reason="runs in test_all_of_this_as_an_ordinary_user")
def test_landlock_and_seccomp_alone_hold_programs_that_try_to_escape(tmp_path, monkeypatch):
    items = [(name, source, problem) for name, source, problem in HOSTILE if name in ESCAPES]
    run_hostile(items, LANDLOCK, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.turn(2)
@pytest.mark.skipif(os.geteuid() != 0, reason="it does run as an ordinary user")
def test_all_of_this_as_an_ordinary_user():
    arguments = ["-q", "-p", "no:cacheprovider", str(Path(__file__).relative_to(ROOT))]
    env = os.environ | {"R1_TURN": "all"}
    done = subprocess.run(as_ordinary_user("pytest", *arguments), env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "4 passed, 1 skipped" in done.stdout
