"""How a disaggregated run's trainer learns of its servers: a file of each in the run folder, which both sides see.

`r1engine serve` writes it anew every few seconds with a count that grows, and removes it when it ends. The trainer sees
from the count whether a registration lives; the clocks of two machines are never compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from r1engine.config import RlConfig
from r1engine.config.addresses import address_problem
from r1engine.observe.put import put_text

STALE_SECONDS = 60.0  # a count that stands still for so long; a network file system may show a change late


@dataclass(frozen=True)
class Registration:
    """What a server says of itself."""

    url: str
    starts: int = 1  # of the server under this URL; after each it holds other weights than before
    beats: int = 0  # of this file
    receivers: list[str] = field(default_factory=list)  # URLs of the processes beside its ranks (route: receivers)


def registry(cfg: RlConfig) -> Path:
    """Folder in which the servers of a disaggregated run announce themselves."""
    return cfg.run_dir / "sglang" / "servers"


def announce(file: Path, registration: Registration) -> None:
    """Write a registration; who reads it sees the old one or the new one, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    put_text(file, json.dumps(asdict(registration)), is_lasting=False)


def read(file: Path) -> Registration:
    """What a file says.

    Raises:
        OSError: it is gone.
        ValueError: it is no registration.
    """
    text = file.read_text(errors="replace")
    try:
        found = Registration(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no registration of a server ({text[:80]!r}); delete it") from error
    urls = [found.url, *found.receivers] if isinstance(found.receivers, list) else [None]
    if any(not isinstance(u, str) or address_problem(u) for u in urls) or not isinstance(found.starts, int):
        raise ValueError(f"{file}: found url {found.url!r}, starts {found.starts!r}, required those of a server")
    return found


class Registry:
    """The trainer's view of the folder; lives on the first rank."""

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self._note = folder, note
        self._counts: dict[str, tuple[int, float]] = {}  # file -> its count, and when it was first seen (monotonic)
        self._told: set[str] = set()

    def look(self) -> dict[str, Registration]:
        """The registrations that can be read: URL -> registration. What cannot be read is told once, by name."""
        found = {}
        for file in sorted(self.folder.glob("*.json")):
            try:
                registration = read(file)
            except FileNotFoundError:
                continue  # its server has just left
            except (OSError, ValueError) as error:
                self.tell(f"sglang: {error}; it is skipped")
                continue
            count, _ = self._counts.get(file.name, (None, 0.0))
            if count != registration.beats:
                self._counts[file.name] = (registration.beats, time.monotonic())
            found[registration.url] = registration
        return found

    def tell_silent(self, url: str, problem: str) -> None:
        """Say once why a registered server is not used."""
        for file in sorted(self.folder.glob("*.json")):
            try:
                is_its = read(file).url == url
            except (OSError, ValueError):
                continue
            if not is_its:
                continue
            _, since = self._counts.get(file.name, (0, time.monotonic()))
            if time.monotonic() - since > STALE_SECONDS:
                self.tell(
                    f"sglang: {file} is stale: it was not renewed for {STALE_SECONDS:.0f} s and {url} is out of use "
                    f"({problem}); it is skipped. Delete it if its server is gone"
                )
            else:
                self.tell(f"sglang: {url} of {file.name} is not used: {problem}")

    def tell(self, text: str) -> None:
        """Say it, once."""
        if text not in self._told:
            self._told.add(text)
            self._note(text)
