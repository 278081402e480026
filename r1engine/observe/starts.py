"""What a run folder says of its starts: provenance.json, and the configuration of each.

config.yaml is that of the latest start. Those that it replaced are kept as config.1.yaml, config.2.yaml, ...
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import r1engine
from r1engine import config
from r1engine.config import RlConfig, StageConfig
from r1engine.config.read import flat, plain
from r1engine.config.source import read_source
from r1engine.observe.put import put_text

NAME = "provenance.json"
PACKAGES = (
    "r1engine",
    "torch",
    "megatron-core",
    "transformers",
    "tokenizers",
    "triton",
    "transformer-engine",
    "math-verify",
)


def record_start(cfg: StageConfig, *, step: int, ranks: int) -> list[str]:
    """Write down a start that was accepted.

    Args:
        cfg:   of the run.
        step:  optimizer steps done before.
        ranks: processes.

    Returns:
        What differs from the start before, a line a key: "optimizer.lr 3e-06 -> 0.0001".
    """
    path = cfg.run_dir / "config.yaml"
    starts, sources = read_starts(cfg.run_dir), _function_sources(cfg)
    changed = _changed(path, cfg) if path.is_file() else []
    if changed:
        kept = _set_aside(path)
        starts = [start | {"config": kept} if start["config"] == path.name else start for start in starts]
    config.dump(cfg, path)
    changed += _changed_sources(starts, sources)
    starts.append(
        {
            "started": now(),
            "step": step,
            "config": path.name,
            "changed": changed if step else [],
            "command": sys.argv,
            "folder": os.getcwd(),
            "host": socket.gethostname(),
            "ranks": ranks,
            "git": _git(),
            "versions": _versions(),
        }
        | ({"functions": sources} if sources else {})
    )
    put_text(cfg.run_dir / NAME, json.dumps({"starts": starts}, indent=1) + "\n")
    return starts[-1]["changed"]


def model_card(cfg: StageConfig, steps: int) -> str:
    """README.md of the trained model. Without dates and hosts: the same training gives the same folder."""
    base = cfg.model.folder
    name = base.parent.name if base.name == "model" else base.name
    kind = {"rl": "reinforcement learning (GRPO)", "sft": "supervised fine-tuning"}.get(cfg.stage, cfg.stage)
    data = f" on `{cfg.data.train.name}`" if cfg.data.train is not None else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {cfg.run_dir.name}\n\n"
        f"`{name}` after {steps} optimizer steps of {kind}{data}, seed {cfg.seed}, "
        f"by r1engine {version('r1engine')}.\n\n"
        "The run folder holds the configuration (`config.yaml`), where it ran (`provenance.json`) and what was\n"
        "measured (`report.html`). `sha256sum --check SHA256SUMS` proves the files.\n"
    )


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, the first one first."""
    path = run_dir / NAME
    return json.loads(path.read_text())["starts"] if path.is_file() else []


def begun_and_ended(run_dir: Path) -> dict[str, Any]:
    """What summary.json says of the starts of a run that ends now."""
    starts = read_starts(run_dir)
    return {
        "starts": len(starts),
        "started": starts[0]["started"],
        "ended": now(),
        "git": starts[-1]["git"],
        "versions": starts[-1]["versions"],
    }


def now() -> str:
    """Date and time of day, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _changed(path: Path, cfg: StageConfig) -> list[str]:
    """How the configuration differs from that of a file, which another version may have written."""
    before, here = flat(read_source(path, []).data), flat(plain(cfg.model_dump()))
    return [
        f"{key} {_text(before, key)} -> {_text(here, key)}"
        for key in sorted(before.keys() | here.keys())
        if _text(before, key) != _text(here, key)
    ]


def _text(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], default=str) if key in values else "(no such key)"


def _set_aside(path: Path) -> str:
    """Renames a file to the first free name with a number."""
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    return kept.name


def _function_sources(cfg: StageConfig) -> dict[str, str]:
    """Reward function -> SHA-256 of its file; what the file imports is not in it."""
    functions = cfg.rewards.functions if isinstance(cfg, RlConfig) else {}
    files = {name: Path(where.rpartition(":")[0]).expanduser() for name, where in functions.items()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _changed_sources(starts: list[dict[str, Any]], sources: dict[str, str]) -> list[str]:
    before = starts[-1].get("functions", {}) if starts else {}
    changed = [name for name, digest in sources.items() if before.get(name, digest) != digest]
    return [f"the source of rewards.functions.{name}" for name in changed]


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | {name: there for name, there in found.items() if there}


def version(package: str) -> str | None:
    """Of an installed package; None if it is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that the engine runs from, and whether files differ from it; None if it is none."""
    folder = Path(r1engine.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        asked = [
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or another user's checkout
    return {"commit": asked[0].stdout.strip(), "is_changed": bool(asked[1].stdout.strip())}
