"""What a finished stage was made from: run_dir/<stage>/stage.json, written last. A stage that has one is done.

The layout on the ranks, the servers and what is logged may differ between the two runs that a manifest is compared
for; inputs are compared by content, so that a path may move.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1engine.config import ConfigError, KindConfig
from r1engine.config.data_files import missing
from r1engine.config.pipeline import PlannedStage
from r1engine.config.read import flat, plain
from r1engine.data.stream import file_digest
from r1engine.observe.put import put_json

FORMAT = 2
NAME = "stage.json"
HASHES = "SHA256SUMS"  # of an exported folder
# Keys that do not change what comes out: whole sections, and the last parts of those that name a server.
FREE = ("run_dir", "threads", "parallel", "checkpoint", "log", "rollout.sglang", "rewards.workers")
OF_SERVERS = ("urls", "timeout_seconds", "tries", "parallel", "key_variable")


def settings(cfg: KindConfig) -> dict[str, Any]:
    """The settings that decide what comes out of a stage, without its inputs: dotted key -> JSON value."""
    values = json.loads(json.dumps(flat(plain(cfg.model_dump()))))
    free = {*FREE, *cfg.MAY_CHANGE}
    given = {
        ".".join(parts[:end]) for key in cfg.inputs() if (parts := key.split(".")) for end in (len(parts) - 1, None)
    }
    return {
        key: value
        for key, value in values.items()
        if not any(key == part or key.startswith(f"{part}.") for part in free)
        and key not in given
        and not (key.rpartition(".")[2] in OF_SERVERS and "." in key)
    }


def inputs(stage: PlannedStage) -> dict[str, dict[str, str]]:
    """Key -> where it is taken from, a stage or a path, and the digest, of everything that a stage reads.

    Raises:
        ConfigError: it is not there.
    """
    paths = stage.cfg.inputs()
    if problems := missing(paths):
        raise ConfigError([f"stage {stage.name}: {problem}" for problem in problems])
    origins = {key: str(path) for key, path in paths.items()} | stage.fetched | stage.needs
    return {key: {"from": origins[key], "sha256": digest(path)} for key, path in paths.items()}


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a pattern's files, or of a folder, of their digests.

    Of weights the digest in SHA256SUMS counts, where the folder has one; else that of the header (names, shapes, types)
    with the size: the bytes of a large model take minutes to read.
    """
    if not path.is_dir():
        return file_digest(path)
    known = {}
    if (path / HASHES).is_file():
        known = dict(line.split("  ", 1)[::-1] for line in (path / HASHES).read_text().splitlines())
    parts = []
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.name == HASHES or file.name.startswith("."):
            continue
        is_weights = file.suffix == ".safetensors"
        of_file = (known.get(file.name) or _header_digest(file)) if is_weights else file_digest(file)
        parts.append(f"{of_file}  {file.stat().st_size}  {file.name}\n")
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _header_digest(file: Path) -> str:
    with open(file, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return hashlib.sha256(stream.read(min(size, 2**27))).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The content of a stage.json."""

    stage: str  # its name when it was made
    kind: str
    inputs: dict[str, dict[str, str]]
    settings: dict[str, Any]
    outputs: dict[str, dict[str, str]]  # name -> path in the folder, SHA-256
    counts: dict[str, Any]
    seconds: float


def read(folder: Path) -> Manifest | None:
    """The manifest of a stage's folder; None: the stage is not done.

    Raises:
        ConfigError: it is of another version, or broken.
    """
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else found
        raise ConfigError(f"{path}: found format {version!r}, required {FORMAT}: made by another version of r1engine")
    return Manifest(**{key: found[key] for key in Manifest.__dataclass_fields__})


def differences(stage: PlannedStage, done: Manifest) -> list[str]:
    """How a finished stage differs from what is asked for, one line a difference.

    Raises:
        ConfigError: an input is not there.
    """
    wanted_inputs, wanted = inputs(stage), settings(stage.cfg)
    changed = [
        f"{key}: made from {_named(done.inputs.get(key))}, found {_named(wanted_inputs.get(key))}"
        for key in sorted(wanted_inputs.keys() | done.inputs.keys())
        if wanted_inputs.get(key, {}).get("sha256") != done.inputs.get(key, {}).get("sha256")
    ]
    return changed + [
        f"{key}: made with {json.dumps(done.settings.get(key))}, found {json.dumps(wanted.get(key))}"
        for key in sorted(wanted.keys() | done.settings.keys())
        if wanted.get(key) != done.settings.get(key)
    ]


def _named(given: dict[str, str] | None) -> str:
    return f"sha256 {given['sha256'][:12]} ({given['from']})" if given else "nothing"


def write(stage: PlannedStage, made_from: dict[str, dict[str, str]], counts: dict[str, Any], seconds: float) -> None:
    """Mark a stage as done.

    Args:
        stage:     that has come to its end.
        made_from: its `inputs` when it began.
        counts:    what it has to tell, as JSON values.
        seconds:   that it took, in this process.
    """
    folder = stage.cfg.run_dir
    made = {name: folder / path for name, path in stage.cfg.MAKES.items() if (folder / path).exists()}
    content = {
        "format": FORMAT,
        "stage": stage.name,
        "kind": stage.cfg.stage,
        "inputs": made_from,
        "settings": settings(stage.cfg),
        "outputs": {name: {"path": path.name, "sha256": digest(path)} for name, path in made.items()},
        "counts": counts,
        "seconds": round(seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "r1engine": importlib.metadata.version("r1engine"),
    }
    put_json(folder / NAME, content)
