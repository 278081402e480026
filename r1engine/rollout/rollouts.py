"""Draws the completions of each iteration: with the present weights, or partly ahead, while the trainer works.

    take: returns the oldest questions that are drawn to their end: this iteration trains on them
    drawing: with rollout.max_staleness, a thread goes on with the others while the updates run
    the weights change: what is not finished keeps its tokens, and goes on with the new weights

max_staleness 0 is on-policy: one call issues the questions, draws them to their end and takes them.

A question is carried over at most max_staleness - 1 times. Then `take` waits for it: dropping what takes long would
favour short completions. So a token is at most max_staleness versions of the weights old when it is trained on. Every
iteration checks this by the version tags of its samples. It also checks the account of the questions: each one that
was issued is consumed once, dropped for a reason, or still here. Nothing draws while a checkpoint is written.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from r1engine.batch import Completion, Outline, Prompt
from r1engine.config import RlConfig
from r1engine.data.stream import MixedStream
from r1engine.ranks import World
from r1engine.rollout.draft import Draft, Sampling, new_drafts
from r1engine.rollout.generator import Generator


@dataclass
class Pending:
    """One question on its way."""

    number: int  # place among all that were issued
    drafts: list[Draft]
    carried: int = 0  # iterations that went on without it

    @property
    def is_ended(self) -> bool:
        """Whether every sample of it has ended."""
        return all(draft.finish for draft in self.drafts)

    @property
    def oldest(self) -> int | None:
        """Version of the oldest weights that a token of it was drawn from; None: nothing was drawn."""
        return min((version for draft in self.drafts for version, _ in draft.versions), default=None)


class Rollouts:
    """This rank's questions on their way. `take`, `metrics` and `load` are collective."""

    def __init__(self, generator: Generator, prompts: MixedStream, cfg: RlConfig, world: World) -> None:
        """
        Args:
            generator: with weights of a known version.
            prompts:   of the run; only this object takes from it.
            cfg:       of the run.
            world:     each rank has every size-th question of a rollout.
        """
        self._generator, self._prompts, self._cfg, self._world = generator, prompts, cfg, world
        self.questions: list[Pending] = []  # in the order of their issue
        self._issued = 0  # by all ranks
        self._counts: Counter[str] = Counter()  # of this rank: issued, consumed, dropped_<reason>
        self._tokens_ahead = self._version = 0

    # ------------------------------------------------------------------ one iteration

    def take(
        self,
        step: int,
        on_tokens: Callable[[int], None] | None = None,
        *,
        questions: int | None = None,
        drawing: int = 0,
    ) -> list[Completion]:
        """This rank's completions for one iteration, group after group; then the next questions are issued.

        Args:
            step:      optimizer steps done before.
            on_tokens: called with the number of tokens of each part that is drawn inside this call.
            questions: of all ranks; None: those of a rollout.
            drawing:   number of the call in this step; only without staleness there may be several.

        Raises:
            RuntimeError: a sample is staler than allowed, or a question was lost or doubled.
        """
        self._version = self._generator.weight_version
        quota = self._share(self._cfg.questions_at(step) if questions is None else questions)
        self._drop_stale()
        self._issue(step, quota, drawing)
        with self._generator.awake():
            self._draw(on_tokens, lambda: self._choose(quota) is not None)
        chosen = self._choose(quota)
        assert chosen is not None
        self._check_staleness(chosen)
        taken = {question.number for question in chosen}
        self.questions = [question for question in self.questions if question.number not in taken]
        self._counts["consumed"] += len(chosen)
        for question in self.questions:
            question.carried += 1
        following = step + self._cfg.updates_at(step)
        if following >= self._cfg.steps:
            self._drop("end_of_run", self.questions)
        elif self._cfg.rollout.max_staleness:
            self._issue(following, self._share(self._cfg.questions_at(following)))
        self._check_accounts(taken, quota)
        return self._generator.completions([draft for question in chosen for draft in question.drafts])

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside, a thread draws what was issued; at the exit it stops, and the samples keep the tokens they have."""
        if not self._cfg.rollout.max_staleness:
            yield
            return
        stop = threading.Event()
        self._tokens_ahead = 0

        def note(number: int) -> None:
            self._tokens_ahead += number

        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
            drawing = pool.submit(self._draw, note, stop.is_set)
            try:
                yield
            finally:
                stop.set()
        drawing.result()

    def _draw(self, on_tokens: Callable[[int], None] | None, should_stop: Callable[[], bool]) -> None:
        rollout = self._cfg.rollout
        drafts = [draft for question in self.questions for draft in question.drafts if not draft.finish]
        if drafts and not should_stop():
            sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k)
            self._generator.draw(drafts, sampling, on_tokens=on_tokens, should_stop=should_stop)

    def _share(self, questions: int) -> int:
        """This rank's of so many questions."""
        return len(range(self._world.rank, questions, self._world.size))

    def _choose(self, quota: int) -> list[Pending] | None:
        """The questions to train on, the oldest first; None while they have not ended.

        Those that must not be carried over again are among them. They never exceed the quota, because room - quota are
        carried over and oversample is at most 2. (In a smaller last rollout, and if the settings were lowered between
        two runs, there may be more. What is left of them is dropped.)
        """
        most = self._cfg.rollout.max_staleness - 1
        due = [q for q in self.questions if q.carried >= most][:quota]
        others = [q for q in self.questions if q.carried < most and q.is_ended]
        chosen = [*due, *others][:quota]
        if len(chosen) < quota or not all(q.is_ended for q in due):
            return None
        return sorted(chosen, key=lambda q: q.number)

    # ------------------------------------------------------------------ accounts

    def _issue(self, step: int, quota: int, drawing: int = 0) -> None:
        """Take new questions from the stream and deal them round to the ranks that have room."""
        room = round(quota * self._cfg.rollout.oversample)
        rooms: list[int] = self._world.everyones(room - len(self.questions))
        turns = [rank for turn in range(max(rooms)) for rank in range(self._world.size) if rooms[rank] > turn]
        own: list[tuple[int, Prompt]] = []
        for rank, prompt in zip(turns, self._prompts.next(len(turns), step), strict=True):
            if rank == self._world.rank:
                own.append((self._issued, prompt))
            self._issued += 1
        size, limit = self._cfg.grpo.group_size, self._cfg.rollout.max_tokens_at(step)
        drafts = new_drafts(
            [prompt for _, prompt in own], num_samples=size, step=step, max_tokens=limit, drawing=drawing
        )
        for i, (number, _) in enumerate(own):
            self.questions.append(Pending(number, drafts[i * size : (i + 1) * size]))
        self._counts["issued"] += len(own)

    def _drop_stale(self) -> None:
        """Drop what no longer can be used: only after max_staleness was lowered between two runs."""
        limit = self._version - self._cfg.rollout.max_staleness
        self._drop("stale", [q for q in self.questions if q.oldest is not None and q.oldest < limit])

    def _drop(self, reason: str, questions: list[Pending]) -> None:
        numbers = {question.number for question in questions}
        self.questions = [question for question in self.questions if question.number not in numbers]
        self._counts[f"dropped_{reason}"] += len(numbers)

    def _check_staleness(self, chosen: list[Pending]) -> None:
        limit = self._version - self._cfg.rollout.max_staleness
        for question in chosen:
            if question.oldest is None or question.oldest < limit:
                raise RuntimeError(
                    f"rollout: question {question.number} has tokens of weights {question.oldest}, required is at "
                    f"least {limit} (rollout.max_staleness = {self._cfg.rollout.max_staleness})"
                )

    def _check_accounts(self, taken: set[int], quota: int) -> None:
        """Issued = consumed + dropped + here, by number and by count."""
        here = [question.number for question in self.questions]
        dropped = sum(n for name, n in self._counts.items() if name.startswith("dropped_"))
        balance = self._counts["issued"] - self._counts["consumed"] - dropped
        if balance != len(here) or len(set(here)) != len(here) or taken & set(here) or len(taken) != quota:
            raise RuntimeError(
                f"rollout: questions were lost or doubled: {dict(self._counts)}, here {sorted(here)}, taken "
                f"{sorted(taken)}"
            )

    def prompt_of(self, number: int) -> Prompt:
        """The prompt with this id, whichever rank draws it."""
        return self._prompts.of_id(number)

    def metrics(self, completions: Sequence[Completion | Outline]) -> dict[str, float]:
        """Questions since the start of the run on all ranks, and how old the tokens of an iteration are (versions)."""
        total: Counter[str] = Counter()
        for counts in self._world.everyones(dict(self._counts) | {"carried": len(self.questions)}):
            total.update(counts)
        spans = [(self._version - drawn_from, number) for c in completions for drawn_from, number in c.versions]
        return {f"questions/{name}": total[name] for name in sorted(total)} | {
            "staleness/mean": sum(age * number for age, number in spans) / max(1, sum(number for _, number in spans)),
            "staleness/max": max(age for age, _ in spans),
            "tokens_ahead": sum(self._world.everyones(self._tokens_ahead)),
        }

    # ------------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """Write this rank's questions; called when nothing is being drawn."""
        questions = [
            {
                "number": question.number,
                "carried": question.carried,
                "prompt": question.drafts[0].prompt.id,
                "drafts": [{k: v for k, v in vars(draft).items() if k != "prompt"} for draft in question.drafts],
            }
            for question in self.questions
        ]
        state = {
            "questions": questions,
            "issued": self._issued,
            "counts": dict(self._counts),
            "weight_version": self._generator.weight_version,
        }
        torch.save(state, folder / f"rollouts_{self._world.rank}.pt")

    def load(self, folder: Path) -> None:
        """Read back what every rank's `save` wrote, also of another number of ranks, and take this rank's share.

        The generator's next weights get the number that they had.

        Raises:
            ValueError: the folder has none.
        """
        states = [torch.load(file, weights_only=True) for file in sorted(folder.glob("rollouts_*.pt"))]
        if not states:
            raise ValueError(f"{folder}: found no rollouts_*.pt, required those of a checkpoint of this version")
        everyone = []
        for q in (q for state in states for q in state["questions"]):
            prompt = self._prompts.of_id(q["prompt"])
            everyone.append(Pending(q["number"], [Draft(prompt, **draft) for draft in q["drafts"]], q["carried"]))
        self.questions = sorted(everyone, key=lambda question: question.number)[self._world.rank :: self._world.size]
        self._counts = Counter(issued=len(self.questions))
        size = self._cfg.grpo.group_size
        if resized := [q for q in self.questions if len(q.drafts) != size]:
            self._drop("group_size", resized)
        if self._world.rank == 0:  # and what is past is on its account
            for state in states:
                self._counts.update(state["counts"])
            self._counts["issued"] -= len(everyone)
        self._issued = states[0]["issued"]
        self._generator.weight_version = states[0]["weight_version"] - 1
