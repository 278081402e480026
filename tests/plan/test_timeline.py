"""A run on paper: samples in slots, strides, failures, lengths, and what the command says of them."""

from __future__ import annotations

import json
import math
import random
from itertools import islice
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.config import ConfigError
from r1engine.plan.timeline.command import replayed
from r1engine.plan.timeline.costs import Guessed, read_measured
from r1engine.plan.timeline.failures import daly, live
from r1engine.plan.timeline.lengths import drawn_from, log_normal
from r1engine.plan.timeline.pool import Pool
from r1engine.plan.timeline.strides import Costs, Demand, strides

ROOT = Path(__file__).resolve().parents[2]
COSTS = Costs(
    step=lambda samples: 2.0, train_token=0.5, train=3.0, refresh=7.0, checkpoint=60.0, restart=600.0, generators=1,
    slots=2, has_own_gpus=True, gpus=8,
)  # fmt: skip


def test_slots_by_hand():
    """Two slots: of 4, 10 and 3 tokens the third waits for the first, and ends before the second."""
    pool, ends = Pool(1, 2, lambda samples: float(samples)), []
    pool.add([(4, 0), (10, 1), (3, 2)])
    now = pool.run(100.0, math.inf, lambda question: bool(ends.append(question)))
    assert ends == [0, 2, 1]
    assert now == 100 + 7 * 2 + 3 * 1 and pool.tokens == pytest.approx(17)  # seven steps of two, three of one alone


def test_drawing_that_is_stopped_goes_on_where_it_was():
    pool, ends = Pool(2, 8, lambda samples: 1.0), []
    pool.add([(10, 0), (20, 1)])
    assert pool.run(0.0, 5.0, lambda question: bool(ends.append(question))) == 5.0 and pool.tokens == 10 and not ends
    assert pool.run(50.0, math.inf, lambda question: question == 0) == 55.0
    assert pool.run(60.0, math.inf, lambda question: bool(ends.append(question))) == 70.0 and ends == [1]


def test_many_slots_agree_with_a_token_by_token_count():
    generator = random.Random(0)
    lengths = [generator.randint(1, 60) for _ in range(200)]
    pool = Pool(1, 16, lambda samples: 1.0 + 0.1 * samples)
    pool.add([(length, 0) for length in lengths])
    now = pool.run(0.0, math.inf, lambda question: False)
    waiting, running, expected = lengths[:], [], 0.0
    while waiting or running:
        while waiting and len(running) < 16:
            running.append(waiting.pop(0))
        expected += 1.0 + 0.1 * len(running)
        running = [left - 1 for left in running if left > 1]
    assert now == pytest.approx(expected) and pool.tokens == pytest.approx(sum(lengths))


def test_a_stride_on_policy_by_hand():
    work = Demand(questions=2, group_size=2, prompt_tokens=1.0)
    first, second = islice(strides(COSTS, work, iter([5, 1, 2, 2] * 9)), 2)
    # 5 beside 1, 2 and 2, a token in two seconds; then 10 tokens and 4 prompts are trained on.
    assert first.generate == 2 * 5 and first.train == 3 + 0.5 * 14 and first.refresh == 7
    assert first.seconds == 27 and second == first  # all ends before the next begins


def test_a_step_ahead_hides_the_shorter_of_the_two():
    ahead = Demand(questions=2, group_size=2, prompt_tokens=1.0, max_staleness=1)
    drawn = list(islice(strides(COSTS, ahead, iter([5, 1, 2, 2] * 99)), 5))
    assert [stride.generate for stride in drawn] == [10, 0, 0, 0, 0]  # the trainer works for 10 seconds, too
    shared = Costs(**{**vars(COSTS), "has_own_gpus": False})
    assert all(stride.generate == 10 for stride in islice(strides(shared, ahead, iter([5, 1, 2, 2] * 99)), 5))


def test_stragglers_are_carried_over_once_and_then_waited_for():
    """Of three questions on their way two are taken; the long one comes with the next stride, which waits for it."""
    work = Demand(questions=2, group_size=1, prompt_tokens=0.0, max_staleness=2, oversample=1.5)
    costs = Costs(**{**vars(COSTS), "slots": 9, "train_token": 0.0, "train": 1.0, "step": lambda samples: 1.0})
    drawn = list(islice(strides(costs, work, iter([100.0, 5.0, 5.0] + [5.0] * 99)), 3))
    assert drawn[0].generate == 5 and drawn[0].tokens == 10
    assert drawn[1].generate == 100 - 5 - 1 and drawn[1].tokens == 105
    assert drawn[2].generate == 5 - 1  # the third of them was issued last, a second before the trainer was done


def test_a_run_with_failures_by_hand():
    quiet = live([10.0] * 8, every=3, checkpoint=2.0, restart=5.0, between_failures=math.inf)
    assert (quiet.hours * 3600, quiet.saving * 3600, quiet.lost, quiet.failures) == (pytest.approx(86), 6, 0, 0)
    life = live([10.0] * 400, every=4, checkpoint=2.0, restart=5.0, between_failures=500.0, replays=50)
    work = life.hours - life.lost - life.saving
    assert work * 3600 == pytest.approx(4000) and life.saving * 3600 == 200
    assert life.failures == pytest.approx(life.hours * 3600 / 500, rel=0.1)
    assert life.lost * 3600 / life.failures == pytest.approx(5 + 42 / 2, rel=0.2)  # half an interval, and the restart


def test_dalys_optimum_is_where_replays_lose_least():
    seconds, mean = [60.0] * 2000, 20_000.0
    best = daly(100.0, mean)
    assert best == pytest.approx(math.sqrt(2 * 100 * mean), rel=0.05) and daly(90.0, 30.0) == 30.0
    near = round(best / 60)
    lost = {
        every: live(seconds, every=every, checkpoint=100.0, restart=50.0, between_failures=mean).overhead
        for every in (near // 4, near, 4 * near)
    }
    assert min(lost, key=lambda every: lost[every]) == near


def test_lengths_have_their_mean_in_spite_of_the_limit():
    for mean, sigma, limit in ((8192, 0.8, 32_768), (3000, 1.5, 4096)):
        drawn = list(islice(log_normal(mean, sigma, limit, 1), 20_000))
        assert sum(drawn) / len(drawn) == pytest.approx(mean, rel=0.02) and max(drawn) == limit
    assert set(islice(drawn_from([3.0, 4.0], 0), 99)) == {3.0, 4.0}


# ---------------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def simulate(*arguments: str):
    return CliRunner().invoke(app, ["simulate", "configs/zero_qwen_32b.yaml", *arguments])


def test_the_command_answers_three_questions_and_draws_them(tmp_path):
    page = tmp_path / "simulation.html"
    sizes = ["--gpus", "64", "grpo.questions=32", "grpo.minibatches=4", "--assume", "strides=2"]
    done = simulate(*sizes, "--json", "--html", str(page))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    on_policy, ahead, oversampled = found["staleness"]
    assert on_policy["is_configured"] and on_policy["hours"] == pytest.approx(found["hours"])
    assert ahead["hours"] < on_policy["hours"] and oversampled["hours"] < ahead["hours"]
    by_count = [choice["hours"] for choice in found["generators_on_own_gpus"]]
    assert by_count == sorted(by_count, reverse=True) and len(by_count) == 5
    assert [choice["gpus"] for choice in found["generators_on_own_gpus"]] == [80, 96, 128, 192, 320]
    points = found["checkpoints"]
    assert points["best_strides"] / 2.5 < points["daly_strides"] < 2.5 * points["best_strides"]
    assert found["hours_with_checkpoints_and_failures"] > found["hours"]
    assert all(title in page.read_text() for title in ("How far ahead", "How many generators", "How often to save"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "nowhere"], "found nothing, required the folder of a run, or a file of lengths"),
        (["--like", "README.md"], "README.md:1: found no length, required a line with one"),
        (["--like", "configs"], "found no config.yaml, metrics.jsonl, samples.jsonl, provenance.json"),
        (["--assume", "strides=0"], "found --assume strides=0, required a number from 1 on"),
        (["--assume", "gpu_mtbf_hours=nan"], "found --assume gpu_mtbf_hours=nan, required a number"),
        (["--assume", "speed=1"], "found --assume speed=1, required one of"),
        (["--assume", "gpu_mtbf_hours=5"], "found 25 strides of"),
        (["--gpu", "rtx4090"], "the plan does not fit: GPU memory in update"),
        (["rollout.sglang.mode=colocated"], "found colocated with 64 GPUs, required a single node"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    done = simulate("--gpus", "64", "grpo.questions=32", "grpo.minibatches=4", *arguments)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output


def test_lengths_of_a_file_are_drawn(tmp_path):
    file = tmp_path / "lengths.jsonl"
    rows = [{"length": 100}, {"length": 5, "heldout": True}, {"length": 300.0}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = simulate("--gpus", "64", "--json", "--like", str(file), "--assume", "strides=1", "grpo.questions=64")
    assert done.exit_code == 0, done.output
    (stride,) = json.loads(done.stdout)["stride_seconds"]
    assert stride["tokens"] == pytest.approx(64 * 16 * 200, rel=0.05)


def test_a_run_that_was_measured_predicts_its_other_strides(tmp_path):
    """A run of made-up costs: 0.02 s a step and 0.001 s a sample in it, 0.0005 s a trained token, 0.3 s besides."""
    cfg = {"model": {"path": "x"}, "data": {"train": "x"}, "steps": 8, "max_row_tokens": 40_000}
    cfg["grpo"] = {"questions": 4, "group_size": 4, "minibatches": 1}
    cfg["rollout"] = {"slots": 4}
    cfg["optimizer"] = {"warmup_steps": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    starts = [{"ranks": 1, "started": "2026-01-01T00:00:00+00:00"}]
    (tmp_path / "provenance.json").write_text(json.dumps({"starts": starts}))
    costs = Costs(
        step=lambda samples: 0.02 + 0.001 * samples, train_token=0.0005, train=0.3, refresh=0.1, checkpoint=0.0,
        restart=0.0, generators=1, slots=4, has_own_gpus=False, gpus=1,
    )  # fmt: skip
    lengths = list(islice(log_normal(200, 1.0, 1000, 3), 8 * 16))
    lengths = [float(round(length)) for length in lengths]
    drawn = islice(strides(costs, Demand(questions=4, group_size=4, prompt_tokens=0.0), iter(lengths)), 8)
    rows, samples = [], []
    for step, stride in enumerate(drawn, 1):
        own = lengths[16 * (step - 1) : 16 * step]
        trained = 0.0005 * sum(own)
        rows.append(
            {
                "step": step, "tokens_generated": sum(own), "seconds/generate": stride.generate, "seconds/refresh": 0.1,
                "seconds/update": trained, "seconds/total": stride.seconds,
            }
        )  # fmt: skip
        samples += [{"step": step, "length": length} for length in own]
    for name, found in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    check = replayed(read_measured(tmp_path), Guessed())
    assert check.measured == pytest.approx(sum(row["seconds/total"] for row in rows[1::2]))
    assert check.error == pytest.approx(0, abs=1e-6)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "seconds/gen')
    with pytest.raises(ConfigError, match="found a file that no run writes"):
        read_measured(tmp_path)
