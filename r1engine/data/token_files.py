"""Tokens of a data file in a folder of their own: written once, with what is left out, then mapped from disk."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

LISTED = 5  # rows that are left out and named in a message; all stand in DROPPED
DROPPED = "dropped.jsonl"
MOST_DOMAINS = 100  # of a file: each is a key of the log


def cached(cache: Path, key: str, write: Callable[[Path], None]) -> Path:
    """The folder of a key below `cache`; what `write` writes into a folder, if it is not there yet."""
    folder = cache / key[:16]
    if not folder.is_dir():
        partial = cache / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        os.replace(partial, folder)
    return folder


class TokenFiles:
    """What a `TokenWriter` wrote."""

    def __init__(self, folder: Path) -> None:
        """Maps the files of `folder`."""
        about = json.loads((folder / "about.json").read_text())
        self.longest: int = about["longest"]  # tokens of the longest text
        self.longest_at: str = about["longest_at"]  # where it stands
        self.largest_token: int = about["largest_token"]
        self.largest_token_at: str = about["largest_token_at"]  # where the first text with it stands
        self.domains: list[str] = about["domains"]  # in the order of the file; "" where a row names none
        self.left_out: str = about["left_out"]  # which rows and why
        self.notes = [f"left out, listed in {folder / DROPPED}: {self.left_out}"] if self.left_out else []
        self.domain = np.load(folder / "domain.npy", mmap_mode="r")  # [rows] index of `domains`
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")  # of each text, behind a 0
        self._tokens = np.memmap(folder / "tokens", np.int32, "r")


class TokenWriter:
    """What is in memory of a file that is written: a few numbers a row, and what was left out."""

    def __init__(self, tokens: BinaryIO, dropped: TextIO) -> None:
        self._tokens, self._dropped = tokens, dropped
        self._ends, self._domain = array("q", [0]), array("h")
        self._domains: dict[str, int] = {}
        self._about: dict[str, Any] = {"longest": 0, "longest_at": "", "largest_token": -1, "largest_token_at": ""}
        self._reasons: Counter[str] = Counter()
        self._first: list[str] = []  # of those that were left out

    def drop(self, place: str, reason: str, words: str) -> None:
        """Leave a row out, of which `words` say what `reason` says of several."""
        self._reasons[reason] += 1
        self._dropped.write(json.dumps({"place": place, "reason": words}) + "\n")
        if len(self._first) < LISTED:
            self._first.append(f"{place} {words}")

    def take(self, texts: list[list[int]], domain: str, place: str) -> None:
        """Write the texts of a row.

        Raises:
            ValueError: its domain is one too many.
        """
        number = self._domains.setdefault(domain, len(self._domains))
        if number >= MOST_DOMAINS:
            raise ValueError(f"{place}: domain is '{domain}', one more than the {MOST_DOMAINS} that a file may name")
        self._domain.append(number)
        for ids in texts:
            tokens = np.array(ids, np.int32)
            self._tokens.write(tokens.tobytes())
            self._ends.append(self._ends[-1] + len(ids))
            for name, found in (("longest", len(ids)), ("largest_token", int(tokens.max()))):
                if found > self._about[name]:
                    self._about |= {name: found, f"{name}_at": place}

    def left_out(self, path: Path, what: str, allowed: float) -> str:
        """How many rows of `path`, which are `what`, are left out and why; "" for none.

        Raises:
            ValueError: they are all, or a larger share than `allowed`.
        """
        count = sum(self._reasons.values())
        if not count:
            return ""
        total = count + len(self._domain)
        reasons = [f"{n:,} {reason}" for reason, n in self._reasons.most_common()]
        problem = f"{path}: {count:,} of {total:,} {what} ({count / total:.1%}): {'; '.join(reasons)}"
        problem += f" ({'; '.join(self._first)}{' and others' if count > LISTED else ''})"
        if count == total or count > allowed * total:
            raise ValueError(f"{problem}; at most data.max_dropped = {allowed:.1%} may be left out")
        return problem

    def save(self, folder: Path, left_out: str) -> None:
        """Write all but the tokens, for `TokenFiles`."""
        np.save(folder / "ends.npy", np.array(self._ends, np.int64))
        np.save(folder / "domain.npy", np.array(self._domain, np.int16))
        about = self._about | {"left_out": left_out, "domains": list(self._domains)}
        (folder / "about.json").write_text(json.dumps(about))


def of_marker(marker: str) -> tuple[str, str]:
    """Why rows, and a row, that hold a marker are left out."""
    return f"hold {marker}, a token of the template or a special one", f"holds {marker}"


def of_length(size: int, limit: int) -> tuple[str, str]:
    """Why rows, and a row of so many tokens, that are too long are left out."""
    return f"have more than data.max_tokens = {limit:,} tokens", f"has {size} tokens"
