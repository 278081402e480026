"""Checkpoint folders: written so that a kill at any instant leaves the previous one usable.

    run_dir/checkpoints/step_00000100/{model/..., state.json, manifest.json}
    run_dir/checkpoints/latest          the name of the folder to resume from
    run_dir/checkpoints/best            the name of the one that checkpoint.best keeps, if it is set

A folder is written under a temporary name, and its manifest (size and SHA-256 of every file) last; only then
is it renamed to its step, and only then does `latest` name it. File logic only: no torch, no Megatron.

With many ranks, only rank 0 calls `begin`, `commit` and `prune`; the others write their shards into the
temporary folder between two barriers (after `begin`, before `commit`), on a file system all ranks share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FORMAT = 2
_STEP_NAME = re.compile(r"step_(\d{8,})")
_PARTIAL_NAME = re.compile(r"\.step_(\d{8,})\.partial")
_REPLACED_NAME = re.compile(r"\.step_(\d{8,})\.replaced")
_HASH_THREADS = 8  # hashing releases the GIL; one thread reads about 1 to 2 GB/s


class CorruptCheckpoint(RuntimeError):
    """A checkpoint folder is not what its manifest says; the message names the file and what is wrong."""


def begin(run_dir: Path, step: int) -> Path:
    """Makes the empty temporary folder that the checkpoint of `step` is written into.

    Args:
        run_dir: folder of the run.
        step:    optimizer steps done, >= 0.

    Returns:
        run_dir/checkpoints/.step_XXXXXXXX.partial; one left by a killed run is removed first.

    Raises:
        ValueError: `step` is negative.
    """
    if step < 0:
        raise ValueError(f"checkpoint: step must be >= 0, got {step}")
    partial = run_dir / "checkpoints" / f".step_{step:08d}.partial"
    if partial.is_symlink():
        partial.unlink()
    elif partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def free_space_check(path: Path, needed_bytes: int) -> None:
    """Checks, before anything is written, that the disk of `path` has room.

    Args:
        path:         a folder that exists.
        needed_bytes: size of what is about to be written.

    Raises:
        RuntimeError: less is free; the message has both numbers.
    """
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise RuntimeError(
            f"checkpoint: {path} has {_size(free)} free, but the checkpoint needs {_size(needed_bytes)}; "
            "free some space, or lower checkpoint.keep"
        )


def commit(partial: Path, state: dict) -> Path:
    """Turns a fully written temporary folder into the checkpoint that `latest` names.

    Args:
        partial: what `begin` returned, filled.
        state:   what resume needs besides the model; JSON values only. Written as state.json.

    Returns:
        The final folder, run_dir/checkpoints/step_XXXXXXXX. An earlier folder of the same step is replaced.

    Raises:
        ValueError: `partial` is not a folder of `begin`, or `state` holds NaN or infinity.
        TypeError:  `state` holds something JSON cannot.
    """
    match = _PARTIAL_NAME.fullmatch(partial.name)
    if match is None:
        raise ValueError(f"checkpoint: commit takes a folder made by begin(), got {partial}")
    _write_json(partial / "state.json", state)
    files = _files(partial)
    digests = _hash_all([partial / name for name in files])
    entries = {
        name: {"size": (partial / name).stat().st_size, "sha256": digest}
        for name, digest in zip(files, digests, strict=True)
    }
    for name in files:
        _fsync(partial / name)
    # Last: a folder with a manifest has every byte of every file on disk.
    _write_json(partial / "manifest.json", {"format": FORMAT, "step": int(match[1]), "files": entries})
    for folder, _, _ in os.walk(partial, topdown=False):
        _fsync(Path(folder))

    return _in_place(partial)


def adopt(partial: Path) -> Path:
    """The same of a folder of `begin` that was filled with files and manifest of a checkpoint; raises as `verify`."""
    verify(partial)
    for path in partial.rglob("*"):
        _fsync(path)
    _fsync(partial)
    return _in_place(partial)


def _in_place(partial: Path) -> Path:
    """Renames a whole temporary folder to its step, and names it in `latest`."""
    root, final = partial.parent, partial.with_name(f"step_{_step(partial):08d}")
    replaced = partial.with_name(f".{final.name}.replaced")
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(final, replaced)  # a kill here is safe: newest_complete() also looks at .replaced
    os.rename(partial, final)
    _fsync(root)
    _fsync(root.parent)  # the first commit also made `checkpoints` itself
    _write_name(root, "latest", final.name)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def complete(run_dir: Path) -> list[Path]:
    """The checkpoints that have a manifest, newest first; their files are not looked at."""
    return [folder for folder in _committed(run_dir / "checkpoints") if (folder / "manifest.json").is_file()]


def note_best(run_dir: Path, metric: str, *, highest: bool) -> None:
    """Names in checkpoints/best the checkpoint whose state has the best value of a metric (`state["scores"]`).

    Of equals the newest; a state without it does not take part.
    """
    root, scored = run_dir / "checkpoints", []
    for folder in complete(run_dir):
        value = read_state(folder).get("scores", {}).get(metric)
        if value is not None:
            scored.append((value if highest else -value, folder.name))
    if scored:
        _write_name(root, "best", max(scored, key=lambda entry: entry[0])[1])


def latest(run_dir: Path) -> str | None:
    """The name that stands in `latest`; None: there is none."""
    return _read_name(run_dir / "checkpoints", "latest")


def await_step(run_dir: Path, step: int | None, *, seconds: float) -> None:
    """Wait until `latest` names a step that another process commits, at most so long. None: not at all."""
    deadline = time.monotonic() + seconds
    while step is not None and latest(run_dir) != f"step_{step:08d}" and time.monotonic() < deadline:
        time.sleep(0.05)


def best(run_dir: Path) -> Path | None:
    """The checkpoint that `note_best` named; None if there is none."""
    root = run_dir / "checkpoints"
    name = _read_name(root, "best")
    return root / name if name is not None and (root / name / "manifest.json").is_file() else None


def prune(run_dir: Path, keep: int, on_skip: Callable[[str], None]) -> None:
    """Removes all but the `keep` newest checkpoints, and what killed runs left.

    The ones that `latest` and `best` name are never removed. A folder without a manifest was damaged from outside: it
    does not count as one of the `keep`, and is left for a person to look at. So is what cannot be removed.

    Args:
        run_dir: folder of the run.
        keep:    number of checkpoints.
        on_skip: called with the name and the reason of what stays.

    Raises:
        ValueError: `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"checkpoint: keep must be >= 1, got {keep}")
    root = run_dir / "checkpoints"
    listed, latest, noted = complete(run_dir), _read_name(root, "latest"), _read_name(root, "best")
    _remove_partials(root, on_skip)  # first: one of a step that was saved before would be in the way of the rename
    for folder in listed[keep:]:
        if folder.name not in (latest, noted):
            # Under its temporary name first, so that a kill half-way leaves no broken checkpoint.
            os.rename(folder, folder.with_name(f".{folder.name}.partial"))
    _remove_partials(root, on_skip)
    if latest in [folder.name for folder in listed]:
        # Otherwise commit() was killed between its two renames, and this may be the only copy of its step.
        for folder in _folders(root, _REPLACED_NAME):
            _remove(folder, on_skip)


def verify(folder: Path) -> None:
    """Checks every file of a checkpoint against its manifest (reads all bytes).

    Files that the manifest does not list are ignored: nothing reads them.

    Raises:
        CorruptCheckpoint: the manifest is missing or unreadable or of another step or format, or a file is
            missing or has another size or hash; the message names the file.
    """
    manifest = _read_manifest(folder)
    files: dict[str, dict] = manifest["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpoint(f"{path} is missing, the manifest lists it")
        size = path.stat().st_size
        if size != entry["size"]:
            raise CorruptCheckpoint(f"{path} has {size} bytes, the manifest says {entry['size']}")
    digests = _hash_all([folder / name for name in files])
    for (name, entry), digest in zip(files.items(), digests, strict=True):
        if digest != entry["sha256"]:
            raise CorruptCheckpoint(f"{folder / name} has SHA-256 {digest}, the manifest says {entry['sha256']}")


def newest_complete(run_dir: Path, on_skip: Callable[[str], None]) -> Path | None:
    """Finds the checkpoint to resume from: the one `latest` names, else the newest other that is whole.

    Args:
        run_dir: folder of the run.
        on_skip: called with the name and the reason of each one passed over.

    Returns:
        A folder that passed `verify`, or None if the run has made no checkpoint yet.

    Raises:
        RuntimeError: there are checkpoints, but none is whole. Starting over would be a decision of the user.
    """
    root = run_dir / "checkpoints"
    for partial in _folders(root, _PARTIAL_NAME):
        on_skip(f"{partial.name}: was never completed")
    candidates = _committed(root) + _folders(root, _REPLACED_NAME)
    has_latest = (root / "latest").exists()
    latest = _read_name(root, "latest")
    if has_latest and latest not in [folder.name for folder in candidates]:
        on_skip(f"latest: names {latest!r}, which does not exist")
    candidates.sort(key=lambda folder: (folder.name == latest, _step(folder)), reverse=True)
    reasons = []
    for folder in candidates:
        try:
            verify(folder)
        except CorruptCheckpoint as error:
            reasons.append(str(error))
            on_skip(f"{folder.name}: {error}")
        else:
            return folder
    if candidates or has_latest:
        raise RuntimeError(
            f"checkpoint: {root} has {len(candidates)} checkpoint(s), none is whole ({'; '.join(reasons[:1])}); "
            "restore one, or start over: with another run_dir, or after moving this folder away"
        )
    return None


def read_files(folder: Path) -> dict[str, dict]:
    """What the manifest of a folder lists: name -> size (bytes) and sha256.

    Raises:
        CorruptCheckpoint: it has none, or it is not one.
    """
    return _read_manifest(folder)["files"]


def step_of(name: str) -> int | None:
    """Of a folder's name; None: it is not that of a checkpoint."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match is not None else None


def read_state(folder: Path) -> dict:
    """Reads state.json of a checkpoint that `newest_complete` returned."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def _folders(root: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Folders of `root` whose name matches, highest step first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _remove_partials(root: Path, on_skip: Callable[[str], None]) -> None:
    for folder in _folders(root, _PARTIAL_NAME):
        _remove(folder, on_skip)


def _remove(folder: Path, on_skip: Callable[[str], None]) -> None:
    """Of a link only the link is removed: what it leads to was put there by a person."""
    try:
        if folder.is_symlink():
            on_skip(f"{folder.name}: is a link to {folder.readlink()}; the link is removed, the folder is kept")
            folder.unlink()
        else:
            shutil.rmtree(folder)
    except OSError as error:
        on_skip(f"{folder.name}: cannot be removed: {error}")


def _committed(root: Path) -> list[Path]:
    return _folders(root, _STEP_NAME)


def _step(folder: Path) -> int:
    return int(folder.name.split("_")[1].split(".")[0])


def _read_name(root: Path, kind: str) -> str | None:
    path = root / kind
    # A flipped bit need not be UTF-8; the name is then reported as one that does not exist.
    return path.read_bytes().decode("utf-8", "replace").strip() if path.is_file() else None


def _write_name(root: Path, kind: str, name: str) -> None:
    temporary = root / f".{kind}.partial"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / kind)
    _fsync(root)


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing")
    try:
        manifest = json.loads(path.read_bytes())
        form, step, files = manifest["format"], manifest["step"], manifest["files"]
        entries = [(entry["size"], entry["sha256"]) for entry in files.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path} is not a manifest: {type(error).__name__}: {error}") from error
    if form != FORMAT:
        raise CorruptCheckpoint(f"{path} has format {form!r}, this version reads {FORMAT}")
    if not entries or "state.json" not in files:
        raise CorruptCheckpoint(f"{path} does not list state.json")
    if _step(folder) != step:
        raise CorruptCheckpoint(f"{path} is of step {step!r}, but its folder is {folder.name}")
    return manifest


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _hash_all(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
