"""One call of the embedded generator: which sequence is in which row of the decoder, until every sequence has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from r1engine.rollout.draft import Draft, Sampling, StepEnds
from r1engine.rollout.local.cache import Cache
from r1engine.rollout.local.decoder import Decoder, Prefill
from r1engine.rollout.local.graphs import Steps
from r1engine.rollout.local.kv_store import KVStore
from r1engine.rollout.local.pages import PagedCache
from r1engine.rollout.local.sampling import sample, uniforms

PREFILL_TOKENS = 8192  # padded prompt tokens run at once, unless one prompt alone is longer


class DraftEnds(NamedTuple):
    """Where a draft ends, and what becomes of it there."""

    stop_tokens: frozenset[int]
    steps: StepEnds | None = None  # a draft ends with its first step, too
    store: KVStore | None = None  # of keys and values that drafts with `origins` start from, and leave
    on_ended: Callable[[Draft], None] | None = None  # called with each draft that has ended


class SetBack(NamedTuple):
    """A draft that waits for pages, with what has been computed of it."""

    draft: int
    kv: list[torch.Tensor]  # on the host, per layer [parts, heads, T, numbers]
    experts: list[np.ndarray]  # of its tokens


class DecodeBatch:
    """Decodes drafts, one a row. A row whose draft ends takes the next one; when none is left or fits, the last row
    moves into its place, so that a decode step never computes a finished sequence.

    Where pages run out, the newest draft is set back: the host keeps its keys and values, and it goes on before any
    other draft begins. So the oldest one always goes on, and nothing is computed twice.
    """

    def __init__(
        self,
        decoder: Decoder,
        drafts: list[Draft],
        *,
        keys: list[np.uint64],
        slots: int,
        sampling: Sampling,
        version: int,
        ends: DraftEnds,
        cache: Cache,
    ) -> None:
        """`keys` are the drafts' streams of uniforms; neighbours with equal prompts and tokens share their prefill.
        `cache` has rows for `slots` drafts or for all, and room for one at least; what it holds does not matter."""
        self._decoder, self._sampling, self._version = decoder, sampling, version
        self._ends, self._store, self._on_ended = ends.steps, ends.store, ends.on_ended
        drafts, keys, num_kept = _kept_last(drafts, keys, self._store)
        self._drafts, self._draft_keys = drafts, keys
        self.tokens_run = 0
        self._prefixes: list[list[int]] = []  # what the drafts go on from, equal neighbours once
        self._prefix_of: list[int] = []  # of each draft
        for draft in drafts[: len(drafts) - num_kept]:
            if not self._prefixes or self._prefixes[-1] != draft.prompt.tokens + draft.tokens:
                self._prefixes.append(draft.prompt.tokens + draft.tokens)
            self._prefix_of.append(len(self._prefixes) - 1)
        self._next_draft = 0
        self._num_rows, num_rows = 0, min(slots, len(drafts))
        self._is_stop = _chosen(ends.stop_tokens, decoder.arch.vocab_size)
        self._may_end = _chosen(ends.steps.may_end if ends.steps is not None else (), decoder.arch.vocab_size)
        self._cache, self._steps = cache, None
        if isinstance(cache, PagedCache) and decoder.device.type == "cuda":
            self._steps = Steps(decoder, cache, num_rows)
        self._set_back: list[SetBack] = []  # the oldest last
        self._has_warned = False
        # What follows is on the host, one entry a row.
        self._draft_of = np.full(num_rows, -1)  # -1: none
        self._keys = np.zeros(num_rows, dtype=np.uint64)
        self._input = np.zeros(num_rows, dtype=np.int64)  # the token the row decodes next
        self._positions = np.zeros(num_rows, dtype=np.int64)  # and its index in the sequence
        self._counts = np.zeros(num_rows, dtype=np.int64)  # tokens sampled
        self._earlier = np.zeros(num_rows, dtype=np.int64)  # of them before this call
        self._tokens = np.zeros((num_rows, 64), dtype=np.int64)  # sampled in this call
        self._logp = np.zeros((num_rows, 64), dtype=np.float64)
        self._experts: list[list[np.ndarray]] = [[] for _ in range(num_rows)]  # of the tokens run, in order
        self._prefill: Prefill | None = None  # of prefixes [_first_prefix, _last_prefix)
        self._first_prefix = self._last_prefix = 0

    def run(self) -> Iterator[int]:
        """Decodes everything; yields how many tokens each decode step, or each batch of first tokens, drew."""
        holes = np.arange(0)
        while True:
            while self._set_back or self._next_draft < len(self._drafts):
                vacant = np.concatenate([holes, np.arange(self._num_rows, len(self._draft_of))])
                admitted, left = self._admit(vacant)
                if not admitted and len(left) == len(vacant):
                    break
                holes = left[left < self._num_rows]
                yield admitted
            if len(holes):
                self._compact(holes)
            if self._num_rows == 0:
                return
            while not self._cache.reserve(self._positions[: self._num_rows]):
                self._set_back_newest()
            holes = self._draw(np.arange(self._num_rows), *self._step())
            yield self._num_rows

    def interrupt(self) -> None:
        """Called between two steps of `run`, which then is not asked again: the drafts keep the tokens they have."""
        for row in np.flatnonzero(self._draft_of[: self._num_rows] >= 0):
            self._hand_over(int(row))
        if self._store is not None:
            for draft in self._drafts[max(self._next_draft, len(self._prefix_of)) :]:
                self._store.unpin(draft)

    def _step(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Decodes one token of every row; returns as `Decoder.step`."""
        live = slice(0, self._num_rows)
        self.tokens_run += self._num_rows
        on_host = np.stack([self._input[live], self._positions[live]])
        if self._steps is not None:
            return self._steps.step(on_host)
        inputs = torch.from_numpy(on_host).to(self._decoder.device)
        return self._decoder.step(inputs[0], inputs[1], self._cache)

    def _admit(self, vacant: np.ndarray) -> tuple[int, np.ndarray]:
        """Puts drafts into `vacant` rows, as many as fit: first those that were set back, those that start from what is
        kept last.

        Returns:
            the number of tokens drawn, and the rows that are vacant still or again.
        """
        if not len(vacant):
            return 0, vacant
        if self._set_back:
            return self._resume(vacant)
        return self._begin(vacant) if self._next_draft < len(self._prefix_of) else self._restore(vacant)

    def _begin(self, vacant: np.ndarray) -> tuple[int, np.ndarray]:
        """Puts drafts of the prefilled prefixes into `vacant` rows and draws their next tokens. Returns as `_admit`."""
        if self._prefix_of[self._next_draft] == self._last_prefix:
            self._prefill = None  # frees its keys and values before the next ones are made
            self._prefill = self._prefill_next()
        prefill = self._prefill
        assert prefill is not None
        most = min(self._next_draft + len(vacant), len(self._prefix_of))
        chosen = [i for i in range(self._next_draft, most) if self._is_prefilled(i)]
        names = [self._prefix_of[i] for i in chosen]
        count = self._cache.may_start([len(self._prefixes[name]) for name in names], names, self._num_live())
        chosen, names, rows, vacant = chosen[:count], names[:count], vacant[:count], vacant[count:]
        if not chosen:
            return 0, vacant
        self._next_draft += len(chosen)
        source = np.array(names) - self._first_prefix
        lengths = np.array(prefill.lengths)[source]
        for row, i, length in zip(rows.tolist(), chosen, lengths.tolist(), strict=True):
            self._seat(row, i, length - 1)
        if prefill.experts is not None:
            of_prefixes = prefill.experts.to(torch.int16).cpu().numpy()
            for row, i, length in zip(rows, source, lengths, strict=True):
                self._experts[row] = [of_prefixes[i, :length]]
        self._cache.fill(rows, prefill.kv, source, lengths, names)
        if self._store is not None:
            for row, i in zip(rows.tolist(), chosen, strict=True):
                if (draft := self._drafts[i]).origins:  # without the tokens that an interrupted draft has already
                    self._store.keep(draft, draft.origins[-1], self._cache, row, len(draft.prompt.tokens) - 1)
        logits = prefill.logits[torch.from_numpy(source).to(self._decoder.device)]
        return len(chosen), np.concatenate([self._draw(rows, logits), vacant])

    def _restore(self, vacant: np.ndarray) -> tuple[int, np.ndarray]:
        """Puts drafts that start from what is kept into `vacant` rows; they draw nothing yet. Returns as `_admit`."""
        store, first = self._store, self._next_draft
        assert store is not None
        self._prefill = None  # no prefix is left; what is kept of a step is put together in its place
        chosen = range(first, min(first + len(vacant), len(self._drafts)))
        names = [(self._drafts[i].prompt.id, *self._drafts[i].origins) for i in chosen]
        lengths = [len(self._drafts[i].prompt.tokens) + len(self._drafts[i].tokens) - 1 for i in chosen]
        count = self._cache.may_start(lengths, names, self._num_live())
        self._next_draft, rows, vacant = first + count, vacant[:count], vacant[count:]
        alike: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for row, i, length, name in zip(rows.tolist(), chosen, lengths, names, strict=False):
            self._seat(row, i, length)
            alike.setdefault(name, []).append((row, i))
        for group in alike.values():
            store.restore(self._drafts[group[0][1]], self._cache, [row for row, _ in group])
            for _, i in group:
                store.unpin(self._drafts[i])
        return 0, vacant

    def _resume(self, vacant: np.ndarray) -> tuple[int, np.ndarray]:
        """Puts the oldest draft that was set back into a vacant row, if it fits. Returns as `_admit`."""
        draft, kv, experts = self._set_back[-1]
        row, length = int(vacant[0]), kv[0].shape[2]
        if not self._cache.may_start([length], [None], self._num_live()):
            return 0, vacant
        self._set_back.pop()
        self._seat(row, draft, length)
        self._experts[row] = experts
        self._cache.restore([row], kv)
        return 0, vacant[1:]

    def _set_back_newest(self) -> None:
        """Takes the newest draft from its row, to the host."""
        row = int(self._draft_of[: self._num_rows].argmax())
        assert self._num_rows > 1 and isinstance(self._cache, PagedCache), "one draft always fits"
        if not self._has_warned:
            message = "generator: no pages are left for keys and values; the host keeps those of the newest drafts"
            logging.getLogger(__name__).warning(message)
        self._has_warned = True
        self._hand_over(row)
        kv = self._cache.set_aside(row, int(self._positions[row]))
        self._set_back.append(SetBack(int(self._draft_of[row]), kv, self._experts[row]))
        self._draft_of[row] = -1
        self._compact(np.array([row]))

    def _num_live(self) -> int:
        return int((self._draft_of[: self._num_rows] >= 0).sum())

    def _seat(self, row: int, i: int, position: int) -> None:
        """Puts draft i into a row; its last token is at `position`, and nothing is known of its experts."""
        draft = self._drafts[i]
        self._num_rows = max(self._num_rows, row + 1)
        self._draft_of[row], self._keys[row], self._positions[row] = i, self._draft_keys[i], position
        self._input[row] = draft.tokens[-1] if draft.tokens else draft.prompt.tokens[-1]
        self._counts[row] = self._earlier[row] = len(draft.tokens)
        self._experts[row] = []

    def _is_prefilled(self, draft: int) -> bool:
        return self._prefix_of[draft] < self._last_prefix

    def _prefill_next(self) -> Prefill:
        """Runs the next prefixes: no more than the rows can take at once, within PREFILL_TOKENS."""
        first = self._last_prefix
        last_draft = min(self._next_draft + len(self._draft_of), len(self._prefix_of)) - 1
        prefixes: list[list[int]] = []
        longest = 0
        for prefix in self._prefixes[first : self._prefix_of[last_draft] + 1]:
            longest = max(longest, len(prefix))
            if prefixes and longest * (len(prefixes) + 1) > PREFILL_TOKENS:
                break
            prefixes.append(prefix)
        self._first_prefix, self._last_prefix = first, first + len(prefixes)
        self.tokens_run += sum(map(len, prefixes))
        return self._decoder.prefill(prefixes)

    def _draw(self, rows: np.ndarray, logits: torch.Tensor, experts: torch.Tensor | None = None) -> np.ndarray:
        """Draws the next token of each of `rows`, whose last token chose `experts`; returns those whose draft ended."""
        uniform = torch.from_numpy(uniforms(self._keys[rows], self._counts[rows])).to(logits.device)
        drawn, logp = sample(
            logits,
            uniform,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
        )
        tokens, on_host = self._fetch(rows, drawn, logp, experts)
        places = self._counts[rows] - self._earlier[rows]
        self._tokens[rows, places] = tokens
        self._logp[rows, places] = on_host
        self._input[rows] = tokens
        self._positions[rows] += 1
        self._counts[rows] += 1
        if places.max() + 1 == self._tokens.shape[1]:
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)], axis=1)
            self._logp = np.concatenate([self._logp, np.zeros_like(self._logp)], axis=1)
        limits = np.array([self._drafts[i].max_tokens for i in self._draft_of[rows]])
        is_step = self._are_steps(rows, tokens)
        is_ended = self._is_stop[tokens] | (self._counts[rows] == limits) | is_step
        for row, at_step in zip(rows[is_ended], is_step[is_ended], strict=True):
            draft = self._hand_over(row)
            draft.finish = "stop" if self._is_stop[draft.tokens[-1]] else "step" if at_step else "length"
            if self._store is not None and draft.origins and draft.finish != "stop":
                self._store.keep(draft, draft.stream, self._cache, int(row), int(self._positions[row]))
            if self._experts[row] and not draft.origins:
                draft.experts = torch.from_numpy(np.concatenate(self._experts[row]))
            if self._on_ended is not None:
                self._on_ended(draft)
        ended = rows[is_ended]
        self._draft_of[ended] = -1
        self._cache.release(ended.tolist())
        return ended

    def _fetch(
        self, rows: np.ndarray, drawn: torch.Tensor, logp: torch.Tensor, experts: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What was drawn, on the host, and its log-probabilities; experts go to their rows."""
        # One transfer, the only point where the host waits for the device. float64 holds every id exactly.
        numbers = torch.stack([drawn.double(), logp.double()])
        if experts is not None:
            numbers = torch.cat([numbers, experts.flatten(1).t().double()])
        fetched = numbers.cpu().numpy()
        if experts is not None:
            for row, of_token in zip(rows, fetched[2:].T.reshape(experts.shape).astype(np.int16), strict=True):
                self._experts[row].append(of_token[None])
        return fetched[0].astype(np.int64), fetched[1]

    def _are_steps(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Whether each row's step has ended with the token that it drew."""
        found = self._may_end[tokens]
        if self._ends is not None:
            for at in np.flatnonzero(found):
                row = rows[at]
                drawn = self._tokens[row, : self._counts[row] - self._earlier[row]].tolist()
                found[at] = self._ends.is_end(self._drafts[self._draft_of[row]].tokens + drawn)
        return found

    def _hand_over(self, row: int) -> Draft:
        """Puts what a row sampled into its draft, and returns it."""
        draft, count = self._drafts[self._draft_of[row]], self._counts[row] - self._earlier[row]
        draft.add(self._tokens[row, :count].tolist(), self._logp[row, :count].tolist(), self._version)
        return draft

    def _compact(self, holes: np.ndarray) -> None:
        """Moves the last rows into `holes`, so that the live rows are the first ones."""
        num_rows = self._num_rows - len(holes)
        is_hole = np.zeros(self._num_rows, dtype=bool)
        is_hole[holes] = True
        self._num_rows, target = num_rows, np.flatnonzero(is_hole[:num_rows])
        if not len(target):
            return
        source = num_rows + np.flatnonzero(~is_hole[num_rows:])
        of_rows = (self._draft_of, self._keys, self._input, self._positions, self._counts, self._earlier)
        for column in (*of_rows, self._tokens, self._logp):
            column[target] = column[source]
        for old, new in zip(source, target, strict=True):
            self._experts[new] = self._experts[old]
        self._cache.move(source, target, int(self._positions[target].max()))


def _chosen(tokens: Iterable[int], vocab_size: int) -> np.ndarray:
    """[V] bool: which tokens are among these."""
    found = np.zeros(vocab_size, dtype=bool)
    found[[token for token in tokens if token < vocab_size]] = True
    return found


def _kept_last(
    drafts: list[Draft], keys: list[np.uint64], store: KVStore | None
) -> tuple[list[Draft], list[np.uint64], int]:
    """The drafts in the order in which they are admitted, those that start from what is kept last, and their number."""
    if store is None:
        return drafts, keys, 0
    is_kept = [store.holds(draft) for draft in drafts]
    order = sorted(range(len(drafts)), key=is_kept.__getitem__)  # stable
    for draft, at in zip(drafts, is_kept, strict=True):
        if at:
            store.pin(draft)
    return [drafts[i] for i in order], [keys[i] for i in order], sum(is_kept)
