"""In which order data is trained on: another one every epoch, and exactly resumable."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1engine.config.data_files import data_files
from r1engine.data.prompts import PromptTable

if TYPE_CHECKING:
    from r1engine.batch import Prompt


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes (hex); of a folder or pattern, that of its files' digests."""
    files = data_files(Path(path))
    if files != [Path(path)]:
        return hashlib.sha256(" ".join(file_digest(file) for file in files).encode()).hexdigest()
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shuffled(count: int, *, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: 0 to count - 1 sorted by a hash of (seed, epoch, index), the same on every platform."""

    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=16).digest()

    return sorted(range(count), key=key)


class Batches:
    """Indices of the rows of each optimizer step: every row once an epoch; the last batch of an epoch may be smaller.

    The batch of a step is a function of (seed, step) alone, so the step is the whole state.
    """

    def __init__(self, count: int, *, batch_size: int, epochs: int, seed: int) -> None:
        """
        Args:
            count:      rows of the data.
            batch_size: rows of a step.
            epochs:     passes over the data.
            seed:       of the run.
        """
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self.steps_per_epoch = -(-count // batch_size)
        self.steps = epochs * self.steps_per_epoch
        self._epoch, self._order = -1, [0]

    def at(self, step: int) -> list[int]:
        """The rows of a step (from 0)."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, shuffled(self._count, seed=self._seed, epoch=epoch)
        return self._order[batch * self._batch_size : (batch + 1) * self._batch_size]


class PromptStream:
    """Prompts without end, every epoch in another order.

    The order of an epoch is a function of (seed, epoch) alone, so the whole state is two numbers and a run
    resumes exactly where it stopped. It uses no global generator.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, digest: str) -> None:
        """
        Args:
            prompts: what to draw from.
            seed: of the run.
            digest: SHA-256 of the data file (`file_digest`); resuming on other data is refused.

        Raises:
            ValueError: there are no prompts.
        """
        if not prompts:
            raise ValueError("PromptStream: found no prompts, required at least one")
        self.prompts, self._seed, self._digest = prompts, seed, digest
        self._epoch, self._position = 0, 0
        self._order = self._shuffled(0)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts; runs on into the next epoch."""
        return [self._advance() for _ in range(n)]

    def of_id(self, number: int) -> Prompt:
        """The prompt with this id; ids rise with the place in the file."""
        prompts = self.prompts  # a table makes a prompt for each look at one
        ids = prompts.ids if isinstance(prompts, PromptTable) else [prompt.id for prompt in prompts]
        prompt = prompts[bisect_left(ids, number)]
        assert prompt.id == number
        return prompt

    def state(self) -> dict[str, int | str]:
        """What `restore` needs, of plain values."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "count": len(self.prompts),
            "sha256": self._digest,
        }

    def restore(self, state: dict[str, int | str]) -> None:
        """Goes to a place given by `state`.

        Raises:
            ValueError: the state is of another data file or seed, or names a place that does not exist.
        """
        here = self.state()
        if set(state) != set(here):
            raise ValueError(f"PromptStream: found a state with keys {sorted(state)}, required {sorted(here)}")
        for key, what in (("count", "number of prompts"), ("sha256", "data file (sha256)"), ("seed", "seed")):
            if state[key] != here[key]:
                raise ValueError(
                    f"PromptStream: the {what} changed since the checkpoint: it has {state[key]}, this run {here[key]}"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < len(self.prompts):
            raise ValueError(
                f"PromptStream: found epoch {epoch}, position {position}, "
                f"required epoch >= 0 and position in 0..{len(self.prompts) - 1}"
            )
        self._epoch, self._position = epoch, position
        self._order = self._shuffled(epoch)

    def _advance(self) -> Prompt:
        prompt = self.prompts[self._order[self._position]]
        self._position += 1
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled(self._epoch)
        return prompt

    def _shuffled(self, epoch: int) -> list[int]:
        return shuffled(len(self.prompts), seed=self._seed, epoch=epoch)


FILE_IDS = 10**9  # prompts of the n-th further file have ids from n times so many on


@dataclass(frozen=True)
class SharedFile:
    """Prompts of another file, which are part of what is drawn."""

    stream: PromptStream
    share: float  # of the prompts of a rollout, exact over several
    from_step: int = 0  # optimizer steps before which none is taken


class MixedStream:
    """Prompts of one file, and of others by their shares, each from a step on; exactly resumable.

    How many prompts of another file are among the n that are asked for is a function of how many were asked for since
    its first step; in which places they stand, of that and the seed.
    """

    def __init__(self, main: PromptStream, shares: Sequence[SharedFile] = (), *, seed: int = 0) -> None:
        """
        Args:
            main:   has what the others leave.
            shares: of the others.
            seed:   of the run.
        """
        self._main, self._shares, self._seed = main, list(shares), seed
        self._asked = [0] * len(self._shares)  # prompts that were asked for since the share began

    def next(self, n: int, step: int = 0) -> list[Prompt]:
        """The next `n` prompts, after `step` optimizer steps."""
        sources = [0] * n  # of each place: 0 is the main file
        free = list(range(n))
        for number, share in enumerate(self._shares):
            if step < share.from_step:
                continue
            before = self._asked[number]
            self._asked[number] += n
            part = Fraction(repr(share.share))
            count = min(len(free), int(part * (before + n)) - int(part * before))
            for place in sorted(sorted(free, key=lambda place: self._hash(number, before, place))[:count]):
                sources[place] = number + 1
            free = [place for place in free if not sources[place]]
        return [self._take(source) for source in sources]

    def of_id(self, number: int) -> Prompt:
        """The prompt with this id."""
        source, index = divmod(number, FILE_IDS)
        if not source:
            return self._main.of_id(index)
        return replace(self._shares[source - 1].stream.of_id(index), id=number)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, of plain values."""
        more = [
            {"asked": asked, **share.stream.state()} for asked, share in zip(self._asked, self._shares, strict=True)
        ]
        return self._main.state() | ({"more": more} if more else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place given by `state`.

        Raises:
            ValueError: the state is of other data files or another seed, or names a place that does not exist.
        """
        more = state.get("more", [])
        if len(more) != len(self._shares):
            raise ValueError(f"data.more: the checkpoint has {len(more)} more files, this run {len(self._shares)}")
        self._main.restore({key: value for key, value in state.items() if key != "more"})
        for number, (share, saved) in enumerate(zip(self._shares, more, strict=True)):
            share.stream.restore({key: value for key, value in saved.items() if key != "asked"})
            self._asked[number] = int(saved["asked"])

    def _take(self, source: int) -> Prompt:
        if not source:
            return self._main.next(1)[0]
        prompt = self._shares[source - 1].stream.next(1)[0]
        return replace(prompt, id=source * FILE_IDS + prompt.id)

    def _hash(self, number: int, before: int, place: int) -> bytes:
        text = f"share/{self._seed}/{number}/{before}/{place}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
