"""Starts a script as several ranks."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(ranks: int, script: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run the script under torchrun with one thread a rank; its output is captured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
