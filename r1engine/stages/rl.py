"""Reinforcement learning as a stage: what stands around the iteration of stages/iteration.py."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from r1engine.batch import Completion
from r1engine.config import RlConfig
from r1engine.data.prompts import PromptTable
from r1engine.data.stream import MixedStream, PromptStream, SharedFile, file_digest
from r1engine.evaluation.in_training import RunBenchmarks
from r1engine.evaluation.pass_at_1 import pass_at_1, sample_row
from r1engine.grpo import record_of
from r1engine.hf.formats import model_dtype
from r1engine.model.policy import Policy
from r1engine.observe.hacking_alarm import Alarms
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.ranks import World
from r1engine.rewards.from_config import check_named, check_sandbox, make_scorer
from r1engine.rollout import make_generator
from r1engine.rollout.rollouts import Rollouts
from r1engine.rollout.token_texts import token_texts
from r1engine.stages.identity import Identity, model_identity, setting
from r1engine.stages.inputs import check_raters, load_questions, note_unusable
from r1engine.stages.iteration import Iteration, Parts, iterate, refresh, verify
from r1engine.stages.prepared import prepared
from r1engine.stages.process_rating import make_step_rater, warning_of
from r1engine.stages.rating import make_raters
from r1engine.stages.rl_metrics import silent_functions
from r1engine.stages.stage import Advance, Evaluated


class RlStage:
    """GRPO on questions, with a generator and a scorer."""

    def __init__(self, cfg: RlConfig, world: World, phases: Phases, progress: Progress) -> None:
        """Builds the parts: scorer, data, generator, policy, in this order.

        Raises:
            ValueError: the model, the data or a server of the rewards does not fit the configuration.
            RuntimeError: a server does not start.
        """
        self._model_path = cfg.model.path  # as the user knows it
        cfg, self._format = prepared(cfg, world)
        self.cfg, self.world, self.progress, self.steps = cfg, world, progress, cfg.steps
        scorer = make_scorer(cfg.rewards)
        self._to_close = [scorer.close]
        try:
            train, main = self._stream(cfg.data.train_file)
            more = [(source, *self._stream(source.path)) for source in cfg.data.more]
            shares = [SharedFile(stream, source.share, source.from_step) for source, _, stream in more]
            self.prompts = MixedStream(main, shares, seed=cfg.seed)
            tables = [train, *(table for _, table, _ in more)]
            heldout = self._load(cfg.data.heldout) if cfg.data.heldout is not None else []
            self.heldout = heldout[: cfg.evaluation.questions]
            self.benchmarks = RunBenchmarks(cfg, world, self._format)
            named = {prompt.question.reward for prompt in self.heldout}.union(*(table.rewards for table in tables))
            named |= {item.question.reward for entry in self.benchmarks.entries for item in entry.items}
            for note in check_named(cfg.rewards, named) + check_sandbox(cfg.rewards, named):
                progress.note(note)
            for table in tables:
                world.from_first(partial(check_raters, cfg, table))
            most = cfg.data.most_unusable
            for note in world.from_first(lambda: [note_unusable(scorer, table, most) for table in tables]):
                progress.note(note) if note else None
            generator = make_generator(cfg, world, model_dtype(cfg.model.dtype, world.device), progress.note)
            self._to_close.insert(0, generator.close)
            self.policy = Policy(
                cfg.model,
                cfg.parallel,
                cfg.optimizer,
                world,
                seed=cfg.seed,
                temperature=cfg.rollout.temperature,
            )
            rollouts = Rollouts(generator, self.prompts, cfg, world)
            self.parts = Parts(cfg, world, self.policy, generator, rollouts, scorer, phases, progress)
            self.parts.raters = make_raters(cfg.rewards, self.policy)
            self.parts.step_rater = make_step_rater(cfg.rewards, self.policy)
            if warning := warning_of(cfg.rewards):
                progress.note(warning)
            if cfg.grpo.kl_coef > 0:
                self._renew_reference()
            of_steps = ["process"] if cfg.rewards.process else []
            self._judged = [*cfg.rewards.reward_models, *of_steps]
            self.alarms = Alarms(self._judged, window=cfg.rewards.alarm_window, quick=of_steps)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ data and rewards

    def _load(self, path: Path) -> PromptTable:
        """The prompts of a file; what it notes is told. Collective."""
        table = load_questions(self.cfg, path, self._format, self.world)
        for note in table.notes:
            self.progress.note(note)
        return table

    def _stream(self, path: Path) -> tuple[PromptTable, PromptStream]:
        """The prompts of a file of questions, and their order. Collective."""
        table = self._load(path)
        content = self.world.once_a_node(lambda: file_digest(path))
        digest = hashlib.sha256(f"{content} {self._format.identity}".encode()).hexdigest()
        return table, PromptStream(table, seed=self.cfg.seed, digest=digest)

    # ------------------------------------------------------------------ the stage

    def _renew_reference(self) -> None:
        """The reference becomes the policy as it is."""
        with self.policy.awake():
            self.parts.reference = self.policy.snapshot()

    def identity(self) -> Identity:
        """What must not change between a checkpoint and the run that goes on from it; the layout may."""
        state, more = self.prompts.state(), self.cfg.data.more
        of_more = [saved["sha256"] for saved in state.get("more", [])]
        kl_coef = self.cfg.grpo.kl_coef  # above 0 it needs a reference, which is in the checkpoint
        return {
            "seed": setting(self.cfg.seed),
            "data.train": (state["sha256"], str(self.cfg.data.train)),
            **({"data.more": (of_more, ", ".join(str(source.path) for source in more))} if more else {}),
            "grpo.kl_coef": (kl_coef > 0, str(kl_coef)),
            **model_identity(self.policy, self._model_path),
        }

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Send the weights into the generator, and feed the alarms with what was logged."""
        with self.policy.awake():  # and asleep afterwards: an evaluation comes next
            refresh(self.parts)
        verify(self.parts)
        for row in rows:
            self.alarms.update(row)

    def advance(self, step: int) -> Advance:
        """Make one iteration; then renew the reference where it is due."""
        done, made = iterate(self.parts, step), self.cfg.updates_at(step)
        every = self.cfg.grpo.reference_every
        if self.parts.reference is not None and every and step // every != (step + made) // every:
            self._renew_reference()
        warnings = self.alarms.update(done.metrics)
        alarms = {f"alarm/{name}": float(name in warnings) for name in self._judged}
        weights = self.cfg.rewards.weights_at(step)
        undecided = {
            i: {**record_of(completion).as_row(), "reason": score.reason}
            for i, (completion, score) in enumerate(done.graded)
            if isinstance(completion, Completion) and score.is_undecided(weights)
        }
        return Advance(
            steps=made,
            metrics=done.metrics | alarms,
            tokens=int(done.metrics["tokens_generated"]),
            samples=self._samples(done),
            undecided=self._in_order(undecided),
            notes=[f"{name}: {warning}" for name, warning in warnings.items()] + silent_functions(done.graded),
        )

    def _samples(self, done: Iteration) -> list[dict[str, Any]]:
        """Rows of samples.jsonl, on the first rank: completions from all over the rollout, each from its home."""
        count = min(self.cfg.log.samples, len(done.graded))
        chosen = range(0, len(done.graded), len(done.graded) // count) if count else range(0)
        rows = {}
        for i in [*chosen][:count]:
            completion, score = done.graded[i]
            if isinstance(completion, Completion):
                group = [_in_group(done, other) for other in self._group_of(i)]
                tokens = token_texts(completion, self._format.tokenizer.decode)
                rows[i] = sample_row(completion, score, done.samples[i].advantage) | {"group": group} | tokens
        return self._in_order(rows)

    def _in_order(self, rows: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of all ranks by their numbers, on the first rank. Collective."""
        everyones = [pair for own in self.world.at_first(rows) for pair in own.items()]
        return [row for _, row in sorted(everyones, key=lambda pair: pair[0])]

    def _group_of(self, index: int) -> range:
        """The completions of the same question."""
        size = self.cfg.grpo.group_size
        return range(index - index % size, index - index % size + size)

    def evaluate(self, step: int) -> Evaluated | None:
        """pass@1 of the held-out questions, and the benchmarks."""
        found = self._evaluate_heldout(step) if self.heldout else None
        if not self.benchmarks.entries:
            return found
        parts = self.parts
        metrics = self.benchmarks.evaluate(parts.generator, parts.scorer, step, self.progress.advance)
        shown = {entry.name: metrics.get(f"eval/{entry.name}/pass_at_1") for entry in self.benchmarks.entries}
        scores = [f"{name} {'unknown' if value is None else f'{value:.3f}'}" for name, value in shown.items()]
        notes = ([found.note] if found else []) + scores
        return Evaluated((found.metrics if found else {}) | metrics, found.samples if found else [], ", ".join(notes))

    def _evaluate_heldout(self, step: int) -> Evaluated:
        generator, scorer = self.parts.generator, self.parts.scorer
        metrics, rows = pass_at_1(
            generator, scorer, self.heldout, self.cfg, self.world, step=step, on_tokens=self.progress.advance
        )
        samples = [{"heldout": True, **row} for row in rows[: self.cfg.log.samples]]
        if "eval/pass_at_1" not in metrics:
            return Evaluated(metrics, samples, "held-out pass@1 is unknown: no sample could be decided")
        low, high = metrics["eval/pass_at_1_low"], metrics["eval/pass_at_1_high"]
        note = f"held-out pass@1 {metrics['eval/pass_at_1']:.3f} (95 % {low:.3f} to {high:.3f})"
        note += f", format {metrics['eval/format']:.3f}, {metrics['eval/length_mean']:.0f} tokens"
        return Evaluated(metrics, samples, note)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write model, optimizer, reference and the questions on their way."""
        self.policy.save(folder / "model", self.parts.reference)
        self.parts.rollouts.save(folder)
        return {"prompts": self.prompts.state()}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Read back what `save` wrote."""
        self.prompts.restore(state["prompts"])
        self.parts.rollouts.load(folder)
        has_reference = self.parts.reference is not None
        self.parts.reference = self.policy.load(folder / "model", has_snapshot=has_reference)

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The first and the last evaluation, and how far trainer and generator were apart."""
        evaluations = [row for row in rows if "eval/length_mean" in row]
        before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
        differences = [row for row in rows if "logp_diff/mean" in row]
        return {
            f"{name}_{when}": row.get(f"eval/{key}")
            for name, key in (("pass_at_1", "pass_at_1"), ("format", "format"), ("length", "length_mean"))
            for when, row in (("before", before), ("after", after))
        } | {
            "logp_diff_mean": sum(row["logp_diff/mean"] for row in differences) / max(1, len(differences)),
            "logp_diff_max": max((row["logp_diff/max"] for row in differences), default=0.0),
        }

    def close(self) -> None:
        """End the generator's servers and the grading processes."""
        for close in self._to_close:
            close()


def _in_group(done: Iteration, index: int) -> dict[str, Any]:
    """What is shown of a completion beside another one of its question."""
    completion, score = done.graded[index]
    return {"verdict": score.verdict, "reward": done.rewards[index], "length": completion.num_tokens}
