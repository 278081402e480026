"""What must stay the same when a run goes on from a checkpoint, under the user's keys."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from r1engine.model.policy import Policy

# Key of the configuration -> (what is compared, how a message names it). JSON values.
Identity = dict[str, tuple[Any, str]]


def setting(value: Any) -> tuple[Any, str]:
    """A value that names itself."""
    return value, str(value)


def model_identity(policy: Policy) -> Identity:
    """The model's folder, by config.json and the sizes of its weights, and how it is trained."""
    folder = policy.folder
    sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    digest = hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(sizes).encode()).hexdigest()
    return {
        "model.path": (digest, str(folder)),
        "model.dtype": setting(str(policy.dtype).removeprefix("torch.")),
        "model.mtp_loss_weight": (policy.trains_mtp, "one above 0" if policy.trains_mtp else "0"),
    }
