"""Runs `r1engine train` for test_loop.py, and stops it with a real signal in the middle of an iteration.

loop_driver.py SIGNAL AT CONFIG [key=value ...]: raises SIGNAL (0: none) in this process when the refresh of iteration
AT begins, after that iteration's update.
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
        from r1engine.rollout.local.generator import LocalGenerator

        load_weights, calls = LocalGenerator.load_weights, [0]

        def load_or_die(self: LocalGenerator, weights: object) -> None:
            calls[0] += 1
            if calls[0] == at + 1:  # the first call is before iteration 1
                os.kill(os.getpid(), number)
            load_weights(self, weights)

        LocalGenerator.load_weights = load_or_die
    sys.argv = ["r1engine", "train", *sys.argv[3:]]
    from r1engine.cli import main as run

    run()


if __name__ == "__main__":
    main()
