"""A policy that goes on from a checkpoint with the distributed optimizer equals one that never stopped, bit for bit."""

from pathlib import Path

from ranks import forked


def test_resume_with_the_distributed_optimizer_is_exact(folders, tmp_path):
    worker = Path(__file__).with_name("resume_worker.py")
    done = forked(2, worker, folders["qwen2"][0], tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr[-3000:]
