"""A checkpoint whose write fails half-way: the message, and what is left."""

import resource

import pytest
from policies import policy_of

from r1engine import checkpoint
from r1engine.config import RlConfig


def test_a_write_that_fails_half_way_is_named_and_leaves_the_last_whole_checkpoint(world, folders, tmp_path):
    policy = policy_of(RlConfig(model={"path": folders["qwen2"][0]}), world)

    def save(step: int) -> None:
        partial = checkpoint.begin(tmp_path, step)
        (partial / "model").mkdir()
        policy.save(partial / "model")
        checkpoint.commit(partial, {"step": step})

    save(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, hard))  # stands for a full disk: writing on is an OSError
    try:
        with pytest.raises(RuntimeError, match=r"could not be written .*File too large.*; free some space and start"):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.newest_complete(tmp_path, print).name == "step_00000001"
    save(2)
    assert checkpoint.newest_complete(tmp_path, print).name == "step_00000002"
