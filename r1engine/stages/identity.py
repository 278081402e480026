"""Tells if a model is the one of a checkpoint: a run goes on with the same model only."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from r1engine.model.policy import Policy


def model_identity(policy: Policy) -> dict[str, Any]:
    """Digest of the model's folder, and how it is trained. JSON values."""
    folder = policy.folder
    sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    digest = hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(sizes).encode()).hexdigest()
    return {"model": digest, "dtype": str(policy.dtype).removeprefix("torch."), "mtp": policy.trains_mtp}
