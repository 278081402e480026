"""Checkpoint folders survive a kill at any instant, and damage is found and named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r1engine import checkpoint
from r1engine.checkpoint import CorruptCheckpoint
from r1engine.stages.identity import check_same

ROOT = Path(__file__).parents[1]
SHARD = bytes(range(256)) * 64


def save(run_dir: Path, step: int) -> Path:
    partial = checkpoint.begin(run_dir, step)
    (partial / "model").mkdir()
    (partial / "model" / "shard_0.bin").write_bytes(SHARD)
    (partial / "model" / "shard_1.bin").write_bytes(SHARD[::-1])
    return checkpoint.commit(partial, {"step": step, "seed": 7})


def newest(run_dir: Path) -> tuple[str | None, list[str]]:
    """Name of what is resumed from, and what was said about the others."""
    skipped: list[str] = []
    folder = checkpoint.newest_complete(run_dir, skipped.append)
    return (folder.name if folder else None), skipped


def test_a_committed_checkpoint_is_found_and_whole(tmp_path):
    folder = save(tmp_path, 100)
    assert folder == tmp_path / "checkpoints" / "step_00000100"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000100\n"
    assert newest(tmp_path) == ("step_00000100", [])
    assert checkpoint.read_state(folder) == {"step": 100, "seed": 7}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["model/shard_0.bin", "model/shard_1.bin", "state.json"]
    assert manifest["files"]["model/shard_0.bin"]["size"] == 256 * 64


def test_a_fresh_run_has_no_checkpoint(tmp_path):
    assert newest(tmp_path) == (None, [])


def test_a_partial_folder_is_reported_and_not_used(tmp_path):
    checkpoint.begin(tmp_path, 100)
    assert newest(tmp_path) == (None, [".step_00000100.partial: was never completed"])


def test_begin_empties_a_stale_partial_folder(tmp_path):
    stale = checkpoint.begin(tmp_path, 100)
    (stale / "rest.bin").write_bytes(b"x")
    assert list(checkpoint.begin(tmp_path, 100).iterdir()) == []


def test_latest_is_preferred_to_a_higher_step(tmp_path):
    save(tmp_path, 300)
    save(tmp_path, 200)  # a run that was sent back
    assert newest(tmp_path)[0] == "step_00000200"


def test_a_step_saved_again_replaces_the_old_folder(tmp_path):
    folder = save(tmp_path, 100)
    (folder / "model" / "shard_0.bin").write_bytes(b"damaged")
    save(tmp_path, 100)
    assert newest(tmp_path) == ("step_00000100", [])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000100"]


# ---------------------------------------------------------------- damage


def flip_bit(folder: Path) -> None:
    path = folder / "model" / "shard_1.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model" / "shard_1.bin", 100)


def lengthen(folder: Path) -> None:
    with open(folder / "model" / "shard_1.bin", "ab") as file:
        file.write(b"\0")


def delete_shard(folder: Path) -> None:
    (folder / "model" / "shard_1.bin").unlink()


def swap(folder: Path) -> None:
    one, other = folder / "model" / "shard_0.bin", folder / "model" / "shard_1.bin"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)


def break_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 50)


def delete_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def edit_state(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text().replace("7", "8"))


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text(f'{{"format": {checkpoint.FORMAT}, "step": 200, "files": {{}}}}')


def other_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(f'"format": {checkpoint.FORMAT}', '"format": 9'))


def another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_00000100"), folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_bit, "shard_1.bin has SHA-256"),
        (truncate, "shard_1.bin has 100 bytes, the manifest says 16384"),
        (lengthen, "shard_1.bin has 16385 bytes, the manifest says 16384"),
        (delete_shard, "shard_1.bin is missing"),
        (swap, "shard_0.bin has SHA-256"),
        (break_manifest, "manifest.json is not a manifest: JSONDecodeError"),
        (delete_manifest, "manifest.json is missing"),
        (edit_state, "state.json has SHA-256"),
        (empty_manifest, "manifest.json does not list state.json"),
        (other_format, "manifest.json has format 9, this version reads 2"),
        (another_step, "manifest.json is of step 100, but its folder is step_00000200"),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_is_used(tmp_path, damage, message):
    save(tmp_path, 100)
    folder = save(tmp_path, 200)
    damage(folder)
    with pytest.raises(CorruptCheckpoint, match=message):
        checkpoint.verify(folder)
    name, skipped = newest(tmp_path)
    assert name == "step_00000100"
    assert len(skipped) == 1 and skipped[0].startswith("step_00000200: ") and message in skipped[0]


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    for step in (100, 200):
        truncate(save(tmp_path, step))
    with pytest.raises(RuntimeError, match=r"has 2 checkpoint\(s\), none is whole"):
        newest(tmp_path)


def test_a_latest_that_names_nothing_is_an_error_if_there_is_no_other(tmp_path):
    shutil.rmtree(save(tmp_path, 100))
    with pytest.raises(RuntimeError, match=r"has 0 checkpoint\(s\), none is whole"):
        newest(tmp_path)


@pytest.mark.parametrize("content", [b"step_00000900\n", b"", b"\xff\xfe", b"../elsewhere"])
def test_a_damaged_latest_is_reported_and_the_newest_step_is_used(tmp_path, content):
    save(tmp_path, 100)
    save(tmp_path, 200)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    name, skipped = newest(tmp_path)
    assert name == "step_00000200"
    assert len(skipped) == 1 and "which does not exist" in skipped[0]


# ---------------------------------------------------------------- kills

# Saves step 100, then counts the system calls that change the disk and kills itself before the n-th.
CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from r1engine import checkpoint

def save(run_dir, step):
    partial = checkpoint.begin(run_dir, step)
    (partial / "model").mkdir()
    (partial / "model" / "shard_0.bin").write_bytes(b"weights")
    checkpoint.commit(partial, {"step": step, "seed": 7})

run_dir, left = Path(sys.argv[1]), int(sys.argv[2])
save(run_dir, 100)
if os.environ["AGAIN"] == "1":
    save(run_dir, 200)

def lethal(call):
    def wrapped(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*args, **kwargs)
    return wrapped

for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
    setattr(os, name, lethal(getattr(os, name)))
save(run_dir, 200)
checkpoint.prune(run_dir, 1, print)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("again", ["0", "1"], ids=["first save of the step", "step saved again"])
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(tmp_path, again):
    for calls in range(60):
        run_dir = tmp_path / str(calls)
        command = [sys.executable, "-S", "-c", CHILD, str(run_dir), str(calls), str(ROOT)]
        child = subprocess.run(command, env={**os.environ, "AGAIN": again}, capture_output=True, text=True, check=False)
        assert child.returncode in (0, -9), child.stderr
        name, _ = newest(run_dir)
        assert name is not None
        if again == "1":
            assert name in ("step_00000200", ".step_00000200.replaced")
        checkpoint.verify(run_dir / "checkpoints" / name)
        assert checkpoint.read_state(run_dir / "checkpoints" / name)["seed"] == 7
        # The next save works, whatever lies around, and pruning leaves nothing but it.
        save(run_dir, 300)
        checkpoint.prune(run_dir, 1, print)
        assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000300"]
        if child.returncode == 0:
            assert child.stdout == "done\n" and calls > 15
            return
    raise AssertionError("the child never came to its end")


# ---------------------------------------------------------------- pruning, space, identity


def test_prune_keeps_the_newest_and_what_latest_names(tmp_path):
    for step in (500, 100, 200, 300, 400):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000100\n")
    checkpoint.begin(tmp_path, 600)
    checkpoint.prune(tmp_path, 2, print)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000100",
        "step_00000400",
        "step_00000500",
    ]


def test_a_folder_without_manifest_does_not_count_as_kept(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step)
    delete_manifest(tmp_path / "checkpoints" / "step_00000200")
    checkpoint.prune(tmp_path, 2, print)
    assert newest(tmp_path)[0] == "step_00000300"
    assert (tmp_path / "checkpoints" / "step_00000100").exists()


def test_too_little_space_is_found_before_writing(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    checkpoint.free_space_check(tmp_path, free // 2)
    needed = 10 * free
    with pytest.raises(RuntimeError, match=f"GB free, but the checkpoint needs {needed / 1e9:.2f} GB"):
        checkpoint.free_space_check(tmp_path, needed)


IDENTITY = {"data.train": ("ab12", "a.jsonl"), "model.path": ("cd34", "q2"), "seed": (0, "0")}


@pytest.mark.parametrize(
    ("key", "here", "message"),
    [
        ("data.train", ("ff", "b.jsonl"), "data.train: found b.jsonl, but the run began with a.jsonl; set back"),
        (
            "data.train",
            ("ff", "a.jsonl"),
            "found a.jsonl, but the run began with a.jsonl, with another content, template or tokenizer; set back",
        ),
        (
            "model.path",
            ("ff", "q2"),
            "found q2, but the run began with q2, with another content, max_positions or rope_theta; set back",
        ),
        ("seed", (1, "1"), "seed: found 1, but the run began with 0; set back"),
    ],
)
def test_a_run_that_goes_on_with_something_else_is_refused_by_key_and_both_names(key, here, message):
    with pytest.raises(ValueError) as error:
        check_same(IDENTITY, {**IDENTITY, key: here})
    assert message in str(error.value)


def test_every_change_is_named():
    with pytest.raises(ValueError, match=r"model.path: found q3.*; seed: found 5.*another run_dir"):
        check_same(IDENTITY, {**IDENTITY, "model.path": ("ee", "q3"), "seed": (5, "5")})


def test_the_same_kind_of_run_is_accepted_also_from_another_place():
    moved = {**IDENTITY, "data.train": ("ab12", "moved/a.jsonl"), "shape": ((1, 2), "1 x 2")}
    check_same({**IDENTITY, "shape": [[1, 2], "1 x 2"], "more": [1, "1"]}, moved)


def test_a_key_that_the_checkpoint_lacks_is_refused():
    with pytest.raises(ValueError, match="seed: found 0, but the checkpoint does not say what the run began with"):
        check_same({}, {"seed": (0, "0")})


def test_what_cannot_be_removed_is_noted_and_the_run_goes_on(tmp_path):
    elsewhere, notes = tmp_path / "elsewhere", []
    for step in (100, 200, 300):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints" / "step_00000100"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    checkpoint.prune(tmp_path, 1, notes.append)
    assert notes == [f".step_00000100.partial: is a link to {elsewhere}; the link is removed, the folder is kept"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step_00000300"]
    assert (elsewhere / "manifest.json").is_file()


def test_a_checkpoint_of_another_version_is_named_and_is_no_fresh_start(tmp_path):
    manifest = save(tmp_path, 100) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": checkpoint.FORMAT - 1}))
    reason = rf"has format {checkpoint.FORMAT - 1}, this version reads {checkpoint.FORMAT}\); .* or after moving this"
    with pytest.raises(RuntimeError, match=reason):
        newest(tmp_path)


def test_commit_refuses_a_folder_that_begin_did_not_make(tmp_path):
    with pytest.raises(ValueError, match=r"commit takes a folder made by begin\(\)"):
        checkpoint.commit(tmp_path, {})
