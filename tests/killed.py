"""Runs `r1engine COMMAND ...` for test_run.py, and stops it with a real signal in the middle of a stride.

killed.py SIGNAL AT COMMAND [arguments]: raises SIGNAL (0: none) in this process when optimizer update AT (from 1) has
been made, before anything is logged or saved of it.
"""

import os
import signal
import sys
import warnings

warnings.filterwarnings("ignore")


def main() -> None:
    number, at = int(sys.argv[1]), int(sys.argv[2])
    # A parent in the background has SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number:
        from r1engine.model.policy import Policy

        update, calls = Policy.update, [0]

        def update_and_die(self: Policy, *arguments: object) -> object:
            done = update(self, *arguments)
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), number)
            return done

        Policy.update = update_and_die
    sys.argv = ["r1engine", *sys.argv[3:]]
    from r1engine.cli import main as run

    run()


if __name__ == "__main__":
    main()
