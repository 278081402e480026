"""r1engine: reinforcement-learning post-training as in DeepSeek-R1, from a laptop to a cluster."""

import os

__version__ = "0.1.0"

# How often a thread of OpenMP looks for work before it sleeps. Otherwise it looks for milliseconds, and where other
# programs want the cores, too, it keeps one from the thread that it waits for. Read when PyTorch is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "5000"
