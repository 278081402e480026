"""Where a run lives and when it is stopped: folders that it cannot use, a full disk, a clock that jumps, any moment."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cases import Case, logged
from ranks import on_ranks


@pytest.fixture(scope="module", params=["rl", "sft"])
def case(request, tiny_base, tmp_path_factory) -> Case:
    return Case(request.param, tiny_base, tmp_path_factory.mktemp(request.param))


supervised = pytest.mark.parametrize("case", ["sft"], indirect=True)  # the same code serves both kinds, this one faster


@contextmanager
def mounted(folder: Path, *how: str) -> Iterator[Path]:
    """A file system of its own, which needs the rights of root."""
    folder.mkdir()
    done = subprocess.run(["mount", *how, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


# ---------------------------------------------------------------- places


@supervised
@pytest.mark.parametrize("is_live", [False, True])
def test_a_folder_that_the_user_may_not_write_is_named_by_a_dry_run_and_a_start(case, tmp_path, is_live):
    tmp_path.chmod(0o555)
    # What permissions say does not count for root, unless it gives this right away.
    weak = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.getuid() == 0 else []
    command = [
        *weak,
        sys.executable,
        "-m",
        "r1engine",
        "train",
        case.config,
        *case.settings,
        f"run_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run([*command, *([] if is_live else ["--dry-run"])], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"run_dir: {tmp_path} cannot be written to, required a folder of the user's own" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@supervised
def test_a_read_only_file_system_is_named(case, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "none") as disk:
        done = case.run(disk / "run")
    assert done.returncode == 2
    assert f"run_dir: {disk} cannot be written to" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.rotating
@supervised
def test_a_disk_too_small_for_a_checkpoint_is_named_before_anything_of_it_is_written(case, tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=300k", "none") as disk:
        done = case.run(disk / "run")
        left = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    assert done.returncode == 1
    assert f"{disk}" in done.stderr and "free, but the checkpoint needs" in done.stderr
    assert "the run failed on rank 0 of 1" in done.stderr and "free some space" in done.stderr
    assert left == [".step_00000004.partial"]


@pytest.mark.rotating
@supervised
def test_a_disk_that_fills_during_a_save_costs_that_save_alone(case, tmp_path):
    reference = case.undisturbed_on(1)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64m", "none") as disk:
        full = case.run(disk / "run", kill=-2, at=-1)
        assert full.returncode == 1
        assert full.stderr.count("the run failed on rank 0 of 1") == 1 and "could not be written (" in full.stderr
        assert "Traceback" not in full.stderr
        assert "its disk has 0.0 MB free" in full.stderr and "free some space" in full.stderr
        assert "last good checkpoint: none" in full.stderr
        (told,) = re.findall("traceback: (.*)", full.stderr)
        assert "could not be written" in json.loads(Path(told).read_text())["error"]
        (disk / "run" / "filling").unlink()
        resumed = case.run(disk / "run")
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert logged(disk / "run") == logged(reference)


def _hold(folder: Path) -> str:
    """What a rank with a folder of its own under the same name is told."""
    from r1engine import run_lock
    from r1engine.config import ConfigError, Parallel
    from r1engine.model.parallel import join

    run_lock.SEEN_SECONDS = 0.3
    world = join(Parallel())
    try:
        with run_lock.held(folder / str(world.rank), world):
            return "held"
    except ConfigError as error:
        return str(error)


def test_a_folder_that_is_another_one_on_another_rank_is_refused_on_all(tmp_path):
    told = on_ranks(2, _hold, tmp_path)
    assert len(set(told)) == 2
    for rank, text in enumerate(told):
        assert text.startswith(f"run_dir: {tmp_path / str(rank)} on ")
        assert text.endswith("is not what the first rank has; required a file system that all ranks share")


# ---------------------------------------------------------------- times


@pytest.mark.rotating
@supervised
def test_a_clock_that_goes_back_between_two_starts_changes_nothing(case, tmp_path):
    reference = case.undisturbed_on(1)
    shutil.copytree(reference, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000008")
    (checkpoints / "latest").write_text("step_00000004\n")
    provenance = tmp_path / "run" / "provenance.json"
    provenance.write_text(provenance.read_text().replace('"started": "20', '"started": "21'))  # a hundred years ahead
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (4e9, 4e9), follow_symlinks=False)
    done = case.run(tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from step_00000004" in done.stdout
    assert logged(tmp_path / "run") == logged(reference)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] > 0


TRIALS = int(os.environ.get("R1_FAULT_TRIALS", "2"))  # of each kind; more of them take longer


def any_times() -> list[tuple[int, int, float]]:
    """(signal, ranks, seconds after the stage is built), seeded. Where the run is then, the machine decides."""
    drawn = random.Random("times to stop at")
    kinds = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    return [(kinds[i % 3], drawn.randint(1, 2), round(drawn.uniform(0, 3), 2)) for i in range(TRIALS)]


@pytest.mark.rotating
@pytest.mark.parametrize(("number", "ranks", "seconds"), any_times())
def test_a_run_that_is_stopped_at_any_time_goes_on_exactly(case, tmp_path, number, ranks, seconds):
    reference = case.undisturbed_on(ranks)
    stopped = case.run(tmp_path, ranks=ranks, kill=number, at=f"{seconds}s")
    allowed = {signal.SIGKILL: {-9, 0}, signal.SIGTERM: {143, 0}, signal.SIGINT: {130, 0}}[number]
    assert stopped.returncode in allowed, stopped.stderr[-3000:]
    assert "Traceback" not in stopped.stderr
    resumed = case.run(tmp_path, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert logged(tmp_path) == logged(reference)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (reference, tmp_path)]
    assert weights[0] == weights[1]
