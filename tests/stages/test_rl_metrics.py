"""The metrics of an iteration: how far trainer and generator are apart."""

import math
from dataclasses import replace

import pytest
import torch

from r1engine.batch import Completion, PackedBatch, Prompt, RowShape, Sample, pack, to_sequences
from r1engine.data.question import Question
from r1engine.stages.rl_metrics import mismatch, update_metrics

LOGP = [-1.0, -2.0, -3.0]


def row_of(differences: list[float], versions: tuple[tuple[int, int], ...] = ()) -> PackedBatch:
    """A row whose sampled tokens the trainer finds likelier by `differences` than the generator."""
    completion = Completion(Prompt(0, [5, 6], "", Question("")), 0, [7, 8, 9], LOGP, "", False, versions=versions)
    ((row,),) = pack(to_sequences([Sample(completion, 1.0)], version=4), RowShape(max_tokens=8))
    return replace(row, old_logp=row.rollout_logp + torch.tensor([9.0, 9.0, *differences]))  # prompts do not count


def test_mismatch_by_hand(world):
    found = mismatch([row_of([0.0, math.log(1.5), math.log(0.6)])], world)
    assert found["logp_diff/mean"] == pytest.approx((math.log(1.5) - math.log(0.6)) / 3)
    assert found["logp_diff/max"] == pytest.approx(-math.log(0.6))
    assert found["logp_diff/kl"] == pytest.approx(((0.5 - math.log(1.5)) + (-0.4 - math.log(0.6))) / 3)
    bins = {name: value for name, value in found.items() if name.startswith("logp_ratio/") and value}
    assert bins == pytest.approx({f"logp_ratio/{name}": 1 / 3 for name in ("0.99-1.01", "1.25-2", "0.5-0.8")})
    assert sum(value for name, value in found.items() if name.startswith("logp_ratio/")) == pytest.approx(1.0)


def test_mismatch_leaves_out_what_older_weights_drew(world):
    found = mismatch([row_of([5.0, 5.0, 0.25], versions=((3, 2), (4, 1)))], world)
    assert found["logp_diff/mean"] == found["logp_diff/max"] == pytest.approx(0.25)
    assert mismatch([row_of([5.0, 5.0, 5.0], versions=((3, 3),))], world) == {}  # unknown is not zero


@pytest.mark.parametrize("has_mtp", [False, True])
def test_update_metrics_by_hand(has_mtp):
    # Of two steps; what is summed with weights is divided by theirs: advantages of 0 leave less than 1.
    names = ("loss", "grad_norm", "lr", "weight", "kl", "clip_fraction", "ratio", "entropy", "mtp_loss")
    rows = [(1.0, 2.0, 0.1, 0.5, 0.5, 0.1, 0.5, 1.0, 2.5), (3.0, 4.0, 0.3, 1.0, 2.0, 0.4, 2.0, 1.0, 5.0)]
    steps = [dict(zip(names, row, strict=True)) for row in rows]
    wanted = {"loss": 2.0, "grad_norm": 3.0, "lr": 0.2, "kl": 1.5, "clip_fraction": 0.3, "ratio": 1.5, "entropy": 1.5}
    if has_mtp:
        wanted["mtp_loss"] = 5.0
    else:
        steps = [{name: value for name, value in step.items() if name != "mtp_loss"} for step in steps]
    assert update_metrics(steps) == pytest.approx(wanted)
