"""Draws answers to questions with a folder's model and grades them while others are drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1engine.batch import Completion, Prompt
from r1engine.config import Rewards, RlConfig
from r1engine.data.prompts import PromptTable
from r1engine.grpo import record_of
from r1engine.hf.folder import weights_of
from r1engine.hf.formats import model_dtype
from r1engine.observe.failure import RunFailed
from r1engine.observe.progress import Progress
from r1engine.ranks import World, interleaved, is_first_to
from r1engine.rewards import Score, Scorer
from r1engine.rewards.from_config import check_named, check_sandbox, make_scorer
from r1engine.rollout import Generator, make_generator
from r1engine.rollout.draft import Draft, Sampling
from r1engine.stages.inputs import load_questions
from r1engine.stages.prepared import prepared

LOOK_SECONDS = 0.05  # between looks for what has ended
NO_REPLY = "no reply from "  # begins the reason of what a judge that is away leaves undecided

Graded = tuple[Completion, Score]
Row = dict[str, Any]


@dataclass
class AnswerSampler:
    """A model with its prompts and what grades it. Every rank has one."""

    cfg: RlConfig
    generator: Generator
    scorer: Scorer
    prompts: PromptTable

    def draw(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], on_tokens: Callable[[int], None]
    ) -> list[list[Graded]]:
        """Answers of these numbers to each prompt, graded.

        With the embedded generator an answer depends on (seed, question, number, weights) only, as exactly as
        `LocalGenerator` says.
        """
        limit = self.cfg.rollout.max_tokens_at(0)
        drafts = [Draft(prompt, n, step=0, stream=n, max_tokens=limit) for prompt in prompts for n in numbers]
        graded = self._graded(drafts, on_tokens)
        return [graded[i : i + len(numbers)] for i in range(0, len(graded), len(numbers))]

    def _graded(self, drafts: list[Draft], on_tokens: Callable[[int], None]) -> list[Graded]:
        found: dict[int, tuple[Completion, Future[Score]]] = {}
        is_over = threading.Event()

        def hand_in() -> None:
            waiting = list(range(len(drafts)))
            while waiting:
                is_last = is_over.is_set()
                for i in [i for i in waiting if drafts[i].finish]:
                    completion = self.generator.completions([drafts[i]])[0]
                    found[i] = completion, self.scorer.submit(record_of(completion), is_rated=False)
                waiting = [i for i in waiting if i not in found]
                if is_last:
                    return
                is_over.wait(LOOK_SECONDS)

        rollout = self.cfg.rollout
        with ThreadPoolExecutor(1, thread_name_prefix="grading") as pool:
            handing = pool.submit(hand_in)
            try:
                with self.generator.awake():
                    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k)
                    self.generator.draw(drafts, sampling, on_tokens=on_tokens)
            finally:
                is_over.set()
        handing.result()
        return [(completion, score.result()) for completion, score in (found[i] for i in range(len(drafts)))]


def check_judges(problems: Sequence[str], run_dir: Path, kept: str) -> None:
    """End a stage whose judge does not reply.

    Args:
        problems: reasons that begin with NO_REPLY, of all ranks; none: nothing is wrong.
        run_dir:  of the stage.
        kept:     what is not lost, for the message.

    Raises:
        RunFailed: a judge is away; the first rank to come says so.
    """
    if not problems:
        return
    if not is_first_to("tell the failure"):
        raise RunFailed()
    raise RunFailed(
        f"{run_dir}: the judge is away ({problems[0].removeprefix(NO_REPLY)}); {kept}, and the same command goes on "
        "when it is back"
    )


def rows_at_first(world: World, away: Sequence[str], groups: list[list[Row]], run_dir: Path, kept: str) -> list[Row]:
    """The rows of all ranks, in the order of the questions that they share, on the first rank. Collective.

    Args:
        world:   the ranks.
        away:    of this rank, see `check_judges`.
        groups:  rows of each of its questions.
        run_dir: of the stage.
        kept:    what is not lost, for the message.

    Raises:
        RunFailed: a judge is away.
    """
    check_judges([problem for found in world.everyones(away) for problem in found], run_dir, kept)
    return [row for group in interleaved(world.at_first(groups)) for row in group]


@contextmanager
def open_sampler(
    cfg: RlConfig, rewards: Rewards, world: World, progress: Progress, *, around: str = "{question}"
) -> Iterator[AnswerSampler]:
    """A sampler with the weights of `cfg.model.path` and the questions of `cfg.data.train`. Collective.

    Args:
        cfg:      sections model, data, rollout; seed and run_dir.
        rewards:  how answers are graded.
        world:    the ranks.
        progress: gets the notes.
        around:   a text with {question}, which the model is asked.

    Raises:
        ValueError: the model, the questions or a server of the rewards does not fit the configuration.
        RuntimeError: a server does not start.
    """
    source = cfg.model.folder
    cfg, form = prepared(cfg, world)
    progress.phase("load")
    with make_scorer(rewards) as scorer:
        prompts = load_questions(cfg, cfg.data.train_file, form, world, around=around)
        for note in prompts.notes + check_named(rewards, prompts.rewards) + check_sandbox(rewards, prompts.rewards):
            progress.note(note)
        generator = make_generator(cfg, world, model_dtype(cfg.model.dtype, world.device), progress.note)
        try:
            generator.load_weights(weights_of(source) if world.is_first or not generator.takes_shares else ())
            yield AnswerSampler(cfg, generator, scorer, prompts)
        finally:
            generator.close()
