"""What must stay the same when a run goes on from a checkpoint, under the user's keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1engine.model.policy import Policy

# Key of the configuration -> (what is compared, how a message names it). JSON values.
Identity = dict[str, tuple[Any, str]]


def setting(value: Any) -> tuple[Any, str]:
    """A value that names itself."""
    return value, str(value)


def model_identity(policy: Policy, path: Path | None) -> Identity:
    """The model's folder, by config.json and the sizes of its weights, and how it is trained.

    Args:
        policy: the model.
        path:   model.path, as the user gave it: the policy's own folder may be `run_dir/start`.
    """
    folder = policy.folder
    sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    digest = hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(sizes).encode()).hexdigest()
    return {
        "model.path": (digest, str(path)),
        "model.dtype": setting(str(policy.dtype).removeprefix("torch.")),
        "model.mtp_loss_weight": (policy.trains_mtp, "one above 0" if policy.trains_mtp else "0"),
    }


def check_same(begun_with: Mapping[str, Sequence[Any]], here: Identity) -> None:
    """Checks that a checkpoint was made by the run that wants to go on from it.

    Args:
        begun_with: the identity in state.json.
        here:       that of this run.

    Raises:
        ValueError: a value differs or is missing; the message names each key, both values, and what to do.
    """
    problems = []
    for key, (value, name) in here.items():
        if key not in begun_with:
            problems.append(f"{key}: found {name}, but the checkpoint does not say what the run began with")
            continue
        before, named = begun_with[key]
        if before != json.loads(json.dumps(value)):  # a tuple is a list in state.json
            other = "max_positions or rope_theta" if key == "model.path" else "template or tokenizer"
            same = f", with another content, {other}" if named == name else ""
            problems.append(f"{key}: found {name}, but the run began with {named}{same}")
    if problems:
        raise ValueError("; ".join(problems) + "; set back what has changed, or start over with another run_dir")
