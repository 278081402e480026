"""Metrics are valid JSON lines, and a resumed run leaves no step twice."""

import json
import math
import sys

import pytest

from r1engine.observe import metrics
from r1engine.observe.metrics import MetricsLog, Phases, device_telemetry, peak_rss_gb


def open_log(run_dir, *, resume_step=None, tensorboard=False):
    return MetricsLog(run_dir, tensorboard=tensorboard, resume_step=resume_step)


def read(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(run_dir, steps, **options):
    log = open_log(run_dir, **options)
    for step in steps:
        log.log(step, {"loss": step / 2})
        log.log_samples(step, [{"completion": f"of {step}"}])
    log.close()


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = open_log(tmp_path)
    log.log(1, {"loss": 0.5, "tokens_generated": 12})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5, "tokens_generated": 12}\n'
    log.log_samples(1, [{"completion": "a\nb"}])
    assert read(tmp_path / "samples.jsonl") == [{"step": 1, "completion": "a\nb"}]
    log.log_undecided(1, [{"completion": "\udcff", "reason": "no result within 5 s"}])
    assert read(tmp_path / "undecided.jsonl") == [{"step": 1, "completion": "\udcff", "reason": "no result within 5 s"}]
    log.close()


def test_nan_and_infinity_become_null_and_are_listed(tmp_path):
    log = open_log(tmp_path)
    log.log(1, {"loss": math.nan, "kl": math.inf, "lr": 1e-6})
    log.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": None, "kl": None, "lr": 1e-6, "nonfinite": ["loss", "kl"]}
    ]


def test_resume_cuts_the_rows_after_the_checkpoint(tmp_path):
    write_steps(tmp_path, [0, 1, 2, 3, 4])
    write_steps(tmp_path, [3, 4, 5], resume_step=2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [row["step"] for row in read(tmp_path / name)] == [0, 1, 2, 3, 4, 5]


def test_resume_drops_a_line_that_a_kill_cut_short(tmp_path):
    write_steps(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    write_steps(tmp_path, [3], resume_step=2)
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_resume_names_a_broken_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is not a row with a step"):
        open_log(tmp_path, resume_step=1)


def test_a_kill_while_cutting_loses_no_row(tmp_path, monkeypatch):
    write_steps(tmp_path, [1, 2, 3])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        open_log(tmp_path, resume_step=1)
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_fresh_run_keeps_the_old_logs_beside_its_own(tmp_path):
    for _ in range(3):
        write_steps(tmp_path, [1])
    assert len(read(tmp_path / "metrics.jsonl")) == 1
    assert len(read(tmp_path / "metrics.1.jsonl")) == 1
    assert len(read(tmp_path / "metrics.2.jsonl")) == 1


def test_tensorboard_shows_each_step_once_after_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, [1, 2, 3], tensorboard=True)
    write_steps(tmp_path, [3, 4], tensorboard=True, resume_step=2)
    events = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


def test_tensorboard_shows_the_configuration_and_a_completion_as_code(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, tensorboard=True)
    log.log_config(0, "seed: 7\nsteps: 2\n")
    log.log(1, {"reward/mean": 0.5, "lr": 1e-6})
    log.log_samples(1, [{"prompt": "1+1?", "completion": "<b>2</b>\nso", "answer": "2", "verdict": "right"}])
    log.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert events.Tags()["scalars"] == ["reward/mean", "train/lr"]
    config, sample = (
        events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("config", "samples/training")
    )
    assert config == "    seed: 7\n    steps: 2"
    assert sample.startswith("    1+1?\n    <b>2</b>\n    so\n    \n    answer: 2\n    verdict: right")


def test_tensorboard_that_is_not_installed_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"tensorboard is asked for but not installed; `pip install tensorboard` or"):
        open_log(tmp_path, tensorboard=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_phases_add_up_and_reset(monkeypatch):
    # 0: made; 1-3 and 4-5: generate; 6-10: update; 12: take; 15: take
    times = iter([0.0, 1.0, 3.0, 4.0, 5.0, 6.0, 10.0, 12.0, 15.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    phases = Phases()
    for name in ("generate", "generate", "update"):
        with phases(name):
            pass
    assert phases.take() == {"seconds/generate": 3.0, "seconds/update": 4.0, "seconds/total": 12.0}
    assert phases.take() == {"seconds/total": 3.0}


def test_phases_wait_for_the_device_at_both_ends():
    calls = []
    phases = Phases(lambda: calls.append("wait"))
    with phases("update"):
        calls.append("work")
    assert calls == ["wait", "work", "wait"]


def test_a_phase_that_fails_is_counted_and_does_not_wait_for_the_device():
    calls = []
    phases = Phases(lambda: calls.append("wait"))
    with pytest.raises(ZeroDivisionError), phases("update"):
        raise ZeroDivisionError
    assert calls == ["wait"]
    assert "seconds/update" in phases.take()


def test_peak_memory_sees_a_large_allocation():
    before = peak_rss_gb()
    block = bytearray(int((before + 0.3) * 1e9))  # more than any test before may have left as the peak
    block[::4096] = b"x" * len(block[::4096])
    assert 0.01 < before < before + 0.3 <= peak_rss_gb()


def test_a_machine_without_gpu_has_no_telemetry():
    metrics.nvml_device.cache_clear()
    if sys.modules.get("torch") is None or not sys.modules["torch"].cuda.is_available():
        assert device_telemetry() == {}
