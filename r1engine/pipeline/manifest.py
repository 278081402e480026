"""What a finished stage was made from: run_dir/<stage>/stage.json, written last. A stage that has one is done.

The layout on the ranks and what is logged may differ between the two runs that a manifest is compared for; inputs are
compared by content, so that a path may move.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1engine.config import ConfigError, RlConfig, SftConfig, StageConfig, TinyConfig
from r1engine.config.pipeline import PlannedStage
from r1engine.config.read import flat, plain
from r1engine.data.stream import file_digest

FORMAT = 1
NAME = "stage.json"
HASHES = "SHA256SUMS"  # of an exported folder
# Keys that do not change what comes out, and those whose content is compared.
FREE = {"run_dir", "threads", "parallel", "checkpoint", "log"}
BY_CONTENT = {("model", "path"), ("data", "train"), ("data", "heldout")}
FREE_INSIDE = BY_CONTENT | {("rollout", "sglang"), ("rewards", "workers")}


def settings(cfg: RlConfig | SftConfig | TinyConfig) -> dict[str, Any]:
    """The settings that decide what comes out of a stage, without its inputs. JSON values."""
    kept = {key: value for key, value in plain(cfg.model_dump()).items() if key not in FREE}
    for section, key in FREE_INSIDE:
        if isinstance(kept.get(section), dict):
            kept[section].pop(key, None)
    return json.loads(json.dumps(kept))


def inputs(cfg: RlConfig | SftConfig | TinyConfig) -> dict[str, str]:
    """Key -> digest of everything that a stage reads.

    Raises:
        ConfigError: it is not there.
    """
    if not isinstance(cfg, StageConfig):
        return {}
    paths = {"model.path": cfg.model.folder, **cfg.input_files()}
    if missing := [f"{key}: found no {path}, required an input" for key, path in paths.items() if not path.exists()]:
        raise ConfigError(missing)
    return {key: digest(path) for key, path in paths.items()}


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a model folder, of the digests of its files.

    Of weights the digest in SHA256SUMS counts, where the folder has one and the size is right; else that of the header
    (names, shapes, types) with the size: the bytes of a large model take minutes to read.
    """
    if path.is_file():
        return file_digest(path)
    known = {}
    if (path / HASHES).is_file():
        known = dict(line.split("  ", 1)[::-1] for line in (path / HASHES).read_text().splitlines())
    parts = []
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.name == HASHES:
            continue
        is_weights = file.suffix == ".safetensors"
        of_file = (known.get(file.name) or _header_digest(file)) if is_weights else file_digest(file)
        parts.append(f"{of_file}  {file.stat().st_size}  {file.name}\n")
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _header_digest(file: Path) -> str:
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return hashlib.sha256(stream.read(min(size, 2**27))).hexdigest()


def differences(stage: PlannedStage) -> list[str] | None:
    """How a finished stage differs from what is asked for, one line a difference; None: it is not finished.

    Raises:
        ConfigError: an input is not there, or the manifest is of another version.
    """
    path = stage.cfg.run_dir / NAME
    if not path.is_file():
        return None
    done = json.loads(path.read_text())
    if done.get("format") != FORMAT:
        raise ConfigError(f"{path}: found format {done.get('format')!r}, required {FORMAT}")
    wanted_inputs, wanted = inputs(stage.cfg), flat(settings(stage.cfg))
    found_inputs, found = done["inputs"], flat(done["settings"])
    changed = [
        f"{key}: made from sha256 {found_inputs.get(key, 'none')[:12]}, found {wanted_inputs.get(key, 'none')[:12]}"
        for key in sorted(wanted_inputs.keys() | found_inputs.keys())
        if wanted_inputs.get(key) != found_inputs.get(key)
    ]
    return changed + [
        f"{key}: made with {json.dumps(found.get(key))}, found {json.dumps(wanted.get(key))}"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key) != found.get(key)
    ]


def write(stage: PlannedStage, made_from: dict[str, str], *, seconds: float) -> None:
    """Mark a stage as done.

    Args:
        stage:     that has come to its end.
        made_from: its `inputs` when it began.
        seconds:   that it took, in this process.
    """
    folder = stage.cfg.run_dir
    model = folder / "model"
    content = {
        "format": FORMAT,
        "stage": stage.name,
        "kind": stage.cfg.stage,
        "needs": stage.needs,
        "inputs": made_from,
        "settings": settings(stage.cfg),
        "outputs": {"model": digest(model)} if model.is_dir() else {},
        "seconds": round(seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "r1engine": importlib.metadata.version("r1engine"),
    }
    temporary = folder / (NAME + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / NAME)
