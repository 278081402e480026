"""How the ranks meet, and what is said when they cannot."""

import os
import socket
import subprocess
import sys


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from r1engine.config import Parallel; from r1engine.model.parallel import join; join(Parallel())",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | rank,
        )
    assert done.returncode == 1
    assert f"parallel: the 2 ranks cannot meet at 127.0.0.1:{port}" in done.stderr
    assert "choose another one with torchrun --master-port or MASTER_PORT" in done.stderr
