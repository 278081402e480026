"""Scores of steps in this process: a model of prefixes that runs every token of a tree of steps once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from r1engine.config.process import StepScorerSection
from r1engine.hf.score_folder import read_trunk
from r1engine.hf.tokenizer import PromptTokenizer
from r1engine.rollout.local.decoder import Decoder
from r1engine.rollout.local.heads import read_scored
from r1engine.rollout.local.kept import KeptSegments, Segment
from r1engine.search.formats import FormatName, check_tokens, format_of_folder, known_means, make_writer
from r1engine.search.tree import StepPath

if TYPE_CHECKING:
    from r1engine.search.lockstep import StepScorer


class _Part(NamedTuple):
    """What a path has more than the part before it: the question, or a step."""

    key: bytes  # of all tokens up to its end
    tokens: tuple[int, ...]
    read: int  # index of the token at which the score is read


@dataclass(frozen=True)
class _Kept(Segment[bytes]):
    """A part that has been run."""

    score: float


class _Run(NamedTuple):
    """Parts of a path that are to be run, behind what is kept of it."""

    past: list[torch.Tensor]  # [layers, parts, heads, P, numbers] of each piece
    before: bytes | None
    parts: list[_Part]

    @property
    def tokens(self) -> list[int]:
        return [token for part in self.parts for token in part.tokens]

    @property
    def num_past(self) -> int:
        """Tokens that are kept."""
        return sum(kv.shape[3] for kv in self.past)


class LocalScorer:
    """A process reward model of a folder: its decoder and its head.

    Keys and values of every prefix are kept within a bound; those that went are run again when they are wanted. A score
    is the same whatever is kept or scored beside it: in every bit where the model is compiled (csrc/cpu), elsewhere up
    to rounding.

    Attributes:
        labels:     what its scores estimate: "correctness" of a step, "value" of a prefix, "": it does not say.
        tokens_run: tokens that the model has computed so far.
    """

    def __init__(
        self, folder: Path, name: FormatName, policy: PromptTokenizer, cfg: StepScorerSection, device: torch.device
    ) -> None:
        """
        Args:
            folder: of the model.
            name:   how it is asked.
            policy: what the steps are tokens of.
            cfg:    bounds of memory.
            device: float32 on CPUs, bfloat16 on GPUs.

        Raises:
            ValueError: the folder is not a model that is computed here, or has no score of a step.
        """
        self._arch, self._folder = read_trunk(folder), folder
        self._writer = make_writer(name, folder, policy)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._decoder = Decoder(self._arch, device=device, dtype=dtype)
        tensors, self._head = read_scored(folder, self._arch, self._writer.pair, device)
        self._decoder.weights.load(tensors)
        self.labels = known_means(name, folder)
        self.tokens_run = 0
        self._batch_tokens = cfg.batch_tokens
        self._kept = KeptSegments[bytes, _Kept](int(cfg.cache_gib * 2**30))

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        return self._kept.num_bytes

    @torch.no_grad()
    def score(self, paths: Sequence[StepPath]) -> list[list[float]]:
        """Probabilities of `steps[scored:]` of each path. A step without tokens of its own is worth what is before it.

        Raises:
            ValueError: a path is longer than the model's context, or has tokens that the model has not.
        """
        written = [self._parts(path) for path in paths]
        scores: dict[bytes, float] = {}
        # The questions first: what many paths begin with is run once.
        self._run({parts[0].key: run for parts in written if (run := self._plan(parts[:1], scores))}, scores)
        self._run({parts[-1].key: run for parts in written if (run := self._plan(parts, scores))}, scores)
        return [
            [scores[part.key] for part in parts[len(parts) - len(path.steps) + path.scored :]]
            for path, parts in zip(paths, written, strict=True)
        ]

    def clear(self) -> None:
        """Forget what is kept of all prefixes."""
        self._kept.clear()

    def _parts(self, path: StepPath) -> list[_Part]:
        """Question and steps, each with the key of all that is up to its end."""
        head, chunks = self._writer.head(path), self._writer.chunks(path)
        found = [_Part(_key(b"", head), head, len(head) - 1)] if head else []
        for chunk in chunks:
            # The key of a step without tokens is that of what is before it, and so is its score.
            before = found[-1].key if found else b""
            key = _key(before, chunk.tokens) if chunk.tokens else before
            found.append(_Part(key, chunk.tokens, chunk.read))
        tokens = [token for part in found for token in part.tokens]
        check_tokens(tokens, self._arch, self._folder, self._arch.max_positions)
        return found

    def _plan(self, parts: list[_Part], scores: dict[bytes, float]) -> _Run | None:
        """What is to be run of a path, None for nothing; what is kept goes to `scores`."""
        kept: dict[bytes, _Kept] = {}
        rest: list[_Part] = []
        for part in parts:
            if not rest and (found := self._kept.get(part.key)) is not None:
                kept[part.key], scores[part.key] = found, found.score
            elif part.tokens:
                rest.append(part)
        self._kept.touch([*reversed(kept)])
        if not rest:
            return None
        return _Run([one.kv for one in kept.values()], next(reversed(kept), None), rest)

    def _run(self, runs: dict[bytes, _Run], scores: dict[bytes, float]) -> None:
        """Run new tokens, many paths at once, and keep what they leave."""
        for batch in _batches(_rows(runs.values(), self._batch_tokens), self._batch_tokens):
            tokens = [[run.tokens for run in row] for row in batch]
            done = self._decoder.extend(tokens, [row[0].past for row in batch])
            self.tokens_run += len(done.hidden)
            together = [*chain.from_iterable(batch)]
            parts = [part for run in together for part in run.parts]
            starts = accumulate((len(part.tokens) for part in parts[:-1]), initial=0)
            reads = [start + part.read for start, part in zip(starts, parts, strict=True)]
            probabilities = self._head.probabilities(done.hidden[reads]).tolist()
            scores |= {part.key: score for part, score in zip(parts, probabilities, strict=True)}
            for run, kv in zip(together, done.kv, strict=True):
                start, before = 0, run.before
                for part in run.parts:
                    stop = start + len(part.tokens)
                    self._keep(part.key, _Kept(before, kv[:, :, :, start:stop].clone(), scores[part.key]))
                    start, before = stop, part.key

    def _keep(self, key: bytes, part: _Kept) -> None:
        """Keep a part, if that before it is kept and there is room."""
        before = self._kept.chain(part.parent)
        if part.parent is not None and not before:
            return
        if self._kept.get(key) is not None:
            self._kept.touch([key, *before])
        elif self._kept.make_room(part.num_bytes, {*before}):
            self._kept.put(key, part)


def open_scorer(cfg: StepScorerSection, device: torch.device, policy: PromptTokenizer) -> StepScorer:
    """What scores steps.

    Args:
        cfg:    which folder, and its memory.
        device: where its model is to run.
        policy: what the steps are tokens of.

    Raises:
        ValueError: the model is not computed here, a server has another, or it does not say how it is asked.
        RuntimeError: a server does not answer.
    """
    name: FormatName = format_of_folder(cfg.path) if cfg.format == "auto" else cfg.format
    if cfg.urls:
        from r1engine.search.servers import ServerScorer

        return ServerScorer(cfg.path, name, policy, cfg)
    return LocalScorer(cfg.path, name, policy, cfg, device)


def _rows(runs: Iterable[_Run], most: int) -> list[list[_Run]]:
    """Runs behind the same part together, as long as they have no more new tokens than there are before them, and all
    tokens are at most so many.

    Each is computed beside the others' tokens, which it does not see: more of them would cost more than is saved.
    """
    of_part: dict[bytes | None, list[list[_Run]]] = {}
    for run in runs:
        rows, past = of_part.setdefault(run.before, []), run.num_past
        new = len(run.tokens) + (sum(len(one.tokens) for one in rows[-1]) if rows else 0)
        if rows and new <= min(past, most - past):
            rows[-1].append(run)
        else:
            rows.append([run])
    return list(chain.from_iterable(of_part.values()))


def _batches(rows: list[list[_Run]], most: int) -> Iterator[list[list[_Run]]]:
    """Rows of about the same size, of which all tokens, with those before and with padding, are at most so many."""
    sizes = [(sum(len(run.tokens) for run in row), row[0].num_past) for row in rows]
    batch: list[list[_Run]] = []
    new = old = 0
    for at in sorted(range(len(rows)), key=sizes.__getitem__):
        new, old = max(new, sizes[at][0]), max(old, sizes[at][1])
        if batch and (len(batch) + 1) * (new + old) > most:
            yield batch
            batch, (new, old) = [], sizes[at]
        batch.append(rows[at])
    if batch:
        yield batch


def _key(before: bytes, tokens: tuple[int, ...]) -> bytes:
    return blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()
