"""Which rank waits for which collective, from what the ranks' flight recorders hold.

A collective of a group has a number, which its ranks count alike. Where some of them are in number n and others
have not come to it, the former wait for the latter; where they are in different ones, they went different ways.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DUMP = re.compile(r".*rank_(\d+)")


@dataclass(frozen=True)
class Recorded:
    """What the recorder of a rank holds."""

    rank: int
    groups: dict[str, list[int]]  # name -> ranks
    entries: list[dict[str, Any]]  # oldest first
    time_ns: int = 0  # when it was read; 0: not known
    stack: list[str] = field(default_factory=list)  # of its main thread, innermost last
    where: str = ""  # host and process


def read_dump(path: Path) -> Recorded:
    """A file that PyTorch writes of a rank when NCCL has timed out (TORCH_FR_DUMP_TEMP_FILE, ending in the rank).

    Raises:
        ValueError: it is none, or a pickle of more than plain values.
    """
    match = DUMP.fullmatch(path.name)
    try:
        with open(path, "rb") as file:
            dump = _PlainUnpickler(file).load()
        config = dump["pg_config"].values()
        groups = {
            str(group["name"]): [int(rank) for rank in re.findall(r"\d+", str(group["ranks"]))] for group in config
        }
        return Recorded(int(match[1]) if match else -1, groups, list(dump["entries"]))
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"doctor: {path}: found no dump of a flight recorder: {error}, required one") from error


class _PlainUnpickler(pickle.Unpickler):
    """The recorder writes dicts, lists, texts and numbers; whatever names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def waits(recorded: list[Recorded]) -> list[str]:
    """A sentence for each collective that some ranks are in and others are not, the longest wait first."""
    found: list[tuple[float, str]] = []
    for key, pending in _pending(recorded).items():
        group, number = key
        members = next((r.groups[group] for r in recorded if group in r.groups), [r.rank for r in recorded])
        kinds: dict[str, list[int]] = {}
        for rank, entry in pending.items():
            kinds.setdefault(_what(entry), []).append(rank)
        if len(kinds) > 1:
            told = "; ".join(f"{ranks_named(ranks)} in {what}" for what, ranks in kinds.items())
            found.append((float("inf"), f"the ranks of group {_named(group, pending)} went different ways: {told}"))
            continue
        behind = [rank for rank in members if rank not in pending and _last(recorded, rank, group) < number]
        since = [
            (r.time_ns - pending[r.rank]["time_created_ns"]) / 1e9 for r in recorded if r.rank in pending and r.time_ns
        ]
        seconds = max(since) if since else None
        (what,) = kinds
        if behind:
            verb = "waits" if len(pending) == 1 else "wait"
            span = "" if seconds is None else f" for {seconds:,.0f} s"
            place = f"{what}, number {number} of group {_named(group, pending)}"
            found.append((seconds or 0.0, f"{ranks_named(pending)} {verb}{span} in {place}, for {ranks_named(behind)}"))
    return [text for _, text in sorted(found, key=lambda entry: -entry[0])]


def _pending(recorded: list[Recorded]) -> dict[tuple[str, int], dict[int, dict[str, Any]]]:
    """(group, number) -> rank -> the first collective of the group that is not done there."""
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for r in recorded:
        seen = set()
        for entry in sorted(r.entries, key=lambda entry: entry["record_id"]):
            group = str(entry["process_group"][0])
            if entry["is_p2p"] or entry["retired"] or entry["state"] == "completed" or group in seen:
                continue
            seen.add(group)
            found.setdefault((group, entry["collective_seq_id"]), {})[r.rank] = entry
    return found


def _last(recorded: list[Recorded], rank: int, group: str) -> int:
    """The newest collective of a group that a rank has come to; 0: none, -1: the rank says nothing."""
    for r in recorded:
        if r.rank == rank:
            numbers = [e["collective_seq_id"] for e in r.entries if str(e["process_group"][0]) == group]
            return max(numbers, default=0)
    return -1


def _what(entry: dict[str, Any]) -> str:
    return f"{entry['profiling_name']} {entry['input_sizes']}"


def _named(group: str, pending: dict[int, dict[str, Any]]) -> str:
    text = str(next(iter(pending.values()))["process_group"][1])
    return f"{group} ({text})" if text not in ("", "undefined") else group


def ranks_named(numbers: Collection[int]) -> str:
    """ "rank 3", "ranks 0, 1, 2", at most eight of them."""
    shown = ", ".join(map(str, sorted(numbers)[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
