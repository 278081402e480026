"""Runs `r1engine COMMAND ...` for tests/runs, and stops it with a real signal at a chosen moment.

killed.py SIGNAL AT COMMAND [arguments]: raises SIGNAL in this process when optimizer update AT (from 1) has been made,
before anything is logged or saved of it. AT 0: when the stage is built; -1: in the middle of a save; -2: when the
shards of the second one are written, and nothing of it is committed; -3: twice in update 3; -11, -12, ...: before the
first, second, ... chunk of samples is written. A,B: the first start at A, torchrun's restart at B, the next one not at
all; "0.7s": 0.7 seconds after the stage is built, wherever the run is then; "+0.7s": 0.7 seconds after the start.
SIGNAL 0: never; -1: no signal, but an exception on the last rank; -2: no signal, but the disk of the run is filled.
"""

import errno
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")


def stop(number: int) -> None:
    if number > 0:
        os.kill(os.getpid(), number)
        time.sleep(0.2)  # for the thread that listens; it may end the process
    elif number == -2:
        fill(next(Path(word[8:]) for word in sys.argv if word.startswith("run_dir=")))
    elif os.environ.get("RANK") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
        raise OSError("a node is ill")


def committed() -> None:
    """Until no checkpoint is being committed beside the run, so that the moment says which one is the newest."""
    run_dir = next(Path(word[8:]) for word in sys.argv if word.startswith("run_dir="))
    deadline = time.monotonic() + 20  # one that an earlier start has left is there for longer
    while time.monotonic() < deadline:
        folders = [run_dir / "checkpoints", *run_dir.glob("*/checkpoints")]  # of a run, or of a pipeline's stages
        if all(is_settled(folder) for folder in folders if folder.is_dir()):
            return
        time.sleep(0.01)


def is_settled(checkpoints: Path) -> bool:
    steps = sorted(path.name for path in checkpoints.glob("step_*"))
    latest = checkpoints / "latest"
    named = latest.read_text().strip() if latest.exists() else None
    return not any(checkpoints.glob(".step_*.partial")) and named == (steps[-1] if steps else None)


def fill(folder: Path) -> None:
    """Write a file there until no space is left on its disk."""
    with open(folder / "filling", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def in_seconds(number: int, seconds: float) -> None:
    """The signal comes then, whatever this process does."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def after_seconds(number: int, at: str) -> None:
    """The moment is a time, not a place."""
    from r1engine.run import Run

    if at.startswith("+"):
        return in_seconds(number, float(at[1:-1]))
    build = Run.build

    def build_and_count(self: Run) -> object:
        built = build(self)
        in_seconds(number, float(at[:-1]))
        return built

    Run.build = build_and_count


def arrange(number: int, at: int) -> None:
    """The chosen moment of the run."""
    from r1engine.model.policy import Policy
    from r1engine.run import Run

    if at == 0:
        build = Run.build
        Run.build = lambda self: (build(self), stop(number))[0]
    elif at == -1:
        save = Policy.save
        Policy.save = lambda *arguments: (stop(number), save(*arguments))[1]
    elif at == -2:
        from r1engine import checkpoint

        commit, commits = checkpoint.commit, []
        checkpoint.commit = lambda *arguments: (
            commits.append(1) or (len(commits) == 2 and stop(number)) or commit(*arguments)
        )
    elif at <= -11:
        from r1engine.sampling.chunks import Chunks

        write, written = Chunks.write, []
        Chunks.write = lambda *arguments: (
            written.append(1) or (len(written) == -at - 10 and stop(number)) or write(*arguments)
        )
    update, calls = Policy.update, [0]

    def update_and_stop(self: Policy, *arguments: object) -> object:
        done = update(self, *arguments)
        calls[0] += 1
        if calls[0] == abs(at) and at not in (-1, -2, *range(-40, -10)):
            committed()
            stop(number)
            if at == -3:
                stop(number)
                threading.Event().wait(60)  # as if in a collective that never ends
        return done

    Policy.update = update_and_stop


def main() -> None:
    number = int(sys.argv[1])
    moments = sys.argv[2].split(",")
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # A parent in the background has SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number and start < len(moments):
        at = moments[start]
        after_seconds(number, at) if at.endswith("s") else arrange(number, int(at))
    sys.argv = ["r1engine", *sys.argv[3:]]
    from r1engine.cli import main as run

    run()


if __name__ == "__main__":
    main()
