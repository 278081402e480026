"""The key that servers ask every request for. It is never on a command line and never in config.yaml.

The servers that a run starts share one, which is made at the first start, in a file of the run folder that only its
owner can read. The file is a configuration of SGLang as well: a server gets it by `--config`.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

NAME = "key.yaml"
_FIELD = "api-key: "


def run_key(run_dir: Path) -> Path:
    """The file with the key of a run's servers; made if there is none, whoever else makes it at the same time."""
    path = run_dir / "sglang" / NAME
    if not path.exists():
        own = private_file(path.with_name(f".{NAME}.{secrets.token_hex(8)}"), secrets.token_hex(32))
        try:
            with suppress(FileExistsError):  # another rank was first
                os.link(own, path)
        finally:
            own.unlink()
    return path


def key_of(path: Path) -> str:
    """What the file holds.

    Raises:
        ValueError: it cannot be read by this user, is readable by others, or holds no key.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except OSError as error:
        raise ValueError(
            f"rollout.sglang: cannot read the servers' key {path} ({error.strerror}); required is who made it"
        ) from error
    if mode & 0o077:
        raise ValueError(f"rollout.sglang: {path} has mode {mode & 0o777:o}, required 600: chmod 600 {path}")
    if not text.startswith(_FIELD):
        raise ValueError(f"rollout.sglang: {path} holds no key, required a line '{_FIELD}...'; delete it for a new one")
    return text.removeprefix(_FIELD).strip()


def key_in(variable: str) -> str:
    """The key that an environment variable holds; "" without a variable.

    Raises:
        ValueError: the variable is not set.
    """
    if not variable:
        return ""
    if not (key := os.environ.get(variable, "")):
        raise ValueError(f"sglang: the environment variable {variable} is not set, required the servers' key")
    return key


def private_file(path: Path, key: str) -> Path:
    """Writes a key, over what is there, so that its owner alone can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{_FIELD}{key}\n")
    return path


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host in ("localhost", "::1") or host.startswith("127.")
