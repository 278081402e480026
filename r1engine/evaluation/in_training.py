"""The benchmarks of a run while it trains, drawn by its generator and stored as by `r1engine evaluate`.

Nothing of it touches what trains: the random numbers are addressed by the questions, and the stream of training
questions is not asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from r1engine.config import RlConfig
from r1engine.config.evaluation import Suite
from r1engine.data.chat import PromptFormat
from r1engine.evaluation.entries import Ask, Entry, load_entries
from r1engine.evaluation.evaluate import clear, manifest_of
from r1engine.evaluation.marking import Judge
from r1engine.evaluation.meter import Meter
from r1engine.evaluation.results import Summary
from r1engine.evaluation.runner import Grading, Runner, missing, summarize_all
from r1engine.evaluation.samplers import OnReply, Shows, drafts_of, draw_replies
from r1engine.evaluation.store import Store
from r1engine.evaluation.target import EvaluationTarget
from r1engine.hf.architecture import read_architecture
from r1engine.ranks import World
from r1engine.rewards import Scorer
from r1engine.rollout import Generator
from r1engine.rollout.draft import Sampling

SHARES = ("truncated", "unread")


class RunningSampler:
    """The generator of a run, with the weights that it has."""

    def __init__(self, generator: Generator, cfg: RlConfig, form: PromptFormat, max_tokens: int) -> None:
        self._generator, self._cfg, self._max_tokens = generator, cfg, max_tokens
        self._shows, self._arch = Shows(form), read_architecture(cfg.model.folder)

    def draw(self, asks: Sequence[Ask], on_reply: OnReply, on_tokens: Callable[[int], None]) -> None:
        """See `Sampler.draw`."""
        made = drafts_of(asks, self._shows, self._arch, self._max_tokens, on_reply)
        sampling = Sampling(self._cfg.evaluation.temperature, self._cfg.evaluation.top_p)
        draw_replies(self._generator, made, sampling, on_reply, on_tokens)

    def close(self) -> None:
        """The run's own generator goes on."""


class RunBenchmarks:
    """`evaluation.benchmarks` of a run."""

    def __init__(self, cfg: RlConfig, world: World, form: PromptFormat) -> None:
        """Reads the files of the benchmarks.

        Raises:
            ConfigError: see `load_entries`.
        """
        self._cfg, self._world, self._form = cfg, world, form
        self.entries = entries_of(cfg)

    def evaluate(
        self, generator: Generator, scorer: Scorer, step: int, on_tokens: Callable[[int], None]
    ) -> dict[str, float]:
        """Draws and grades all benchmarks; the results lie in run_dir/evaluation/step_XXXXXXXX. Collective.

        Returns:
            See `metrics_of`.
        """
        cfg, world = self._cfg, self._world
        max_tokens = cfg.rollout.max_tokens_at(step)
        store = Store(cfg.run_dir / "evaluation" / f"step_{step:08d}")
        world.from_first(lambda: self._begin(store, step, max_tokens))
        todo = missing(store, self.entries, cfg.seed, world.rank, world.size)
        judge = Judge(cfg.rewards.judge) if cfg.rewards.judge is not None else None
        runner = Runner(store, world.rank, Meter(0, enabled=False), on_tokens=on_tokens)
        sampler = RunningSampler(generator, cfg, self._form, max_tokens)
        with generator.awake():
            runner.work(todo, sampler, Grading(scorer, judge))
        world.wait()
        found: dict[str, Summary] = world.from_first(lambda: summarize_all(store, self.entries))
        return {key: value for name, one in found.items() for key, value in metrics_of(name, one).items()}

    def _begin(self, store: Store, step: int, max_tokens: int) -> None:
        """What an earlier attempt at this step has left was drawn from other weights."""
        cfg = self._cfg
        if store.folder.is_dir():
            clear(store.folder)
        suite = Suite(
            out=store.folder,
            seed=cfg.seed,
            temperature=cfg.evaluation.temperature,
            top_p=cfg.evaluation.top_p,
            max_tokens=max_tokens,
            template=cfg.data.template,
            rewards=cfg.rewards,
            benchmarks=cfg.evaluation.benchmarks,
        )
        name = f"{os.fspath(cfg.run_dir)}@{step}"
        store.begin(manifest_of(EvaluationTarget(name, Path(cfg.run_dir)), suite, self.entries, {}))


def metrics_of(name: str, found: Summary) -> dict[str, float]:
    """What is logged of a benchmark's summary; what is not known is not in it."""
    values = {key: found.get(key) for key in SHARES} | {"length_mean": found.get("tokens")}
    if score := found.get("score"):
        values |= {"pass_at_1": score["mean"], "pass_at_1_low": score["low"], "pass_at_1_high": score["high"]}
    if cons := found.get("cons"):
        values["cons_at_k"] = cons["mean"]
    values["undecided"] = found["undecided"]["count"] / found["replies"]
    return {"eval/" + f"{name}/{key}": float(value) for key, value in values.items() if value is not None}


def entries_of(cfg: RlConfig) -> list[Entry]:
    """The benchmarks of a run, read and checked.

    Raises:
        ConfigError: see `load_entries`.
    """
    return load_entries(cfg.evaluation.benchmarks, has_judge=cfg.rewards.judge is not None)
