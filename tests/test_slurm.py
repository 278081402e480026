"""The batch script with stand-ins for Slurm's commands: a warning reaches the ranks, an unfinished job is requeued."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "configs" / "slurm.sh"
STAND_INS = {
    "scontrol": 'echo "scontrol $*" >> calls; [[ $1 != show ]] || printf "node1\\nnode2\\n"',
    "scancel": 'echo "scancel $*" >> calls; kill -USR1 "$(cat srun.pid)"',
    # The run: warned by Slurm in the middle, it ends with the status that a signal gives it.
    "srun": 'echo "srun $* $TORCH_DISABLE_SHARE_RDZV_TCP_STORE" >> calls; echo $$ > srun.pid; trap "exit 143" USR1\n'
    '[[ $FINISHES ]] && exit "$FINISHES"; kill -USR1 $PPID; for i in {1..100}; do sleep 0.1; done',
}


@pytest.mark.parametrize(("finishes", "status", "is_requeued"), [("", 143, True), ("0", 0, False), ("7", 7, False)])
def test_a_warned_job_saves_and_is_requeued(tmp_path, finishes, status, is_requeued):
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "64"}
    env |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FINISHES": finishes}
    done = subprocess.run(["bash", SCRIPT, "run.yaml", "seed=1"], cwd=tmp_path, env=env, timeout=60, check=False)
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == status
    assert ("scontrol requeue 17\n" in calls, "scancel --signal=USR1 17.0\n" in calls) == (is_requeued, is_requeued)
    assert "--rdzv-endpoint node1:29500" in calls and "r1engine/train.py run.yaml seed=1 1\n" in calls
    assert "--max-restarts 3" in calls and "SIGUSR1 --shutdown-timeout 840" in calls
