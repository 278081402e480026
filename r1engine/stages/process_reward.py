"""A process reward model or value model (paper, section 4.2): the policy's architecture with a score of each step."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from r1engine.batch import Sequence, pack
from r1engine.config import ProcessRewardConfig
from r1engine.data.chat import PromptFormat
from r1engine.data.step_table import LabelledSteps, StepTable, learned, steps_key
from r1engine.evaluation.steps import step_measures
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.plan.utilization import training_flops
from r1engine.ranks import World
from r1engine.search.scored_folder import ScoredFolder
from r1engine.stages.identity import Identity, model_identity, setting
from r1engine.stages.inputs import format_of, step_batches, write_step_tokens
from r1engine.stages.prepared import prepared_to_score
from r1engine.stages.process_loss import cross_entropy_of_steps, squared_error_of_steps
from r1engine.stages.rows import batch_metrics, of_all_shards, own_rows, probabilities_at
from r1engine.stages.stage import Advance, Evaluated
from r1engine.stages.supervised import policy_of, read_once

FEW_WRONG = 0.01  # share of wrong steps below which a note is due


class ProcessRewardStage:
    """Trains on solutions with labelled steps. The optimizer step alone tells the place in the data."""

    def __init__(self, cfg: ProcessRewardConfig, world: World, phases: Phases, progress: Progress) -> None:
        """Reads and tokenizes the data, and builds the policy.

        Raises:
            ValueError: the model or the data are not what the configuration needs.
        """
        self._model_path = cfg.model.path  # as the user knows it
        self.world, self._phases, self._progress, self.cfg = world, phases, progress, cfg
        form = format_of(cfg)
        self.train, self._dataset = self._read("train", cfg.data.train_file, form)
        heldout = cfg.data.heldout
        self.heldout = self._read("heldout", heldout, form)[0] if heldout is not None else None
        self.batches = step_batches(cfg, len(self.train))
        self.steps = self.batches.steps
        means = cfg.process.means or ("value" if self.train.of_rollouts >= 0.5 else "correctness")
        self.cfg = cfg = prepared_to_score(cfg, form, world, ScoredFolder.of(cfg.steps, means))
        self.policy = policy_of(cfg, world, "score")
        is_squared = cfg.process.loss == "squared"
        self._loss = squared_error_of_steps if is_squared else cross_entropy_of_steps

    def _read(self, name: str, path: Path, form: PromptFormat) -> tuple[StepTable, str]:
        """The tokens of a file, written once below run_dir, and the digest of all that they depend on. Collective."""
        write = partial(write_step_tokens, self.cfg, path, self.cfg.run_dir / "tokens" / name, form)
        return read_once(StepTable, partial(steps_key, path, form, self.cfg), write, self.world, self._progress)

    def identity(self) -> Identity:
        """What must not change between a checkpoint and the run that goes on from it; the layout may."""
        cfg, data = self.cfg.process, self.cfg.data
        return {
            "seed": setting(self.cfg.seed),
            "data": (self._dataset, f"{data.train} with template {data.template} and max_tokens {data.max_tokens}"),
            **{f"process.{key}": setting(getattr(cfg, key)) for key in ("batch_size", "loss", "weighting")},
            "process.after_error": setting(cfg.after_error),
            **model_identity(self.policy, self._model_path),
        }

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Say what there is to train on."""
        lengths, labels, cfg = self.train.lengths(), np.asarray(self.train.labels), self.cfg.process
        known = labels[~np.isnan(labels)]
        wrong = float((known < 0.5).mean())
        note = f"{len(lengths):,} solutions, {lengths.sum():,} tokens, {len(known):,} labelled steps of {len(labels):,}"
        note += f", {wrong:.1%} wrong: {self.steps:,} steps of {min(cfg.batch_size, len(lengths)):,}"
        self._progress.note(f"{note}, epochs {cfg.epochs}")
        if wrong < FEW_WRONG:
            self._progress.note("under 1 % of the steps are wrong: scores of wrong ones will hardly be learned")

    def advance(self, step: int) -> Advance:
        """One optimizer step on the weighted loss of a batch."""
        with self._phases("data"):
            solutions = [self.train.at(index) for index in self.batches.at(step)]
            sequences = self._weighted(solutions)
            shards = pack(sequences, self.policy.row_shape(self.cfg.row_tokens))
            rows = own_rows(shards, self.world)
        lr = self.cfg.optimizer.lr_at(step, self.steps)
        with self._phases("update"):
            done = self.policy.update(rows, self._loss, lr)
        lengths = [len(solution.tokens) for solution in solutions]
        metrics = _of_kinds(done.metrics) | batch_metrics(self.policy, shards, lengths)
        metrics |= {"lr": lr, "epoch": (step + 1) / self.batches.steps_per_epoch}
        metrics["labelled_steps"] = sum(len(sequence.targets or ()) for sequence in sequences)
        return Advance(1, metrics, sum(lengths), flops=training_flops(self.policy.shape, lengths))

    def _weighted(self, solutions: list[LabelledSteps]) -> list[Sequence]:
        """Solutions with the weights of their learned steps, which sum to 1 over the batch."""
        used = [learned(solution.labels, self.cfg.process.after_error) for solution in solutions]
        total = sum(map(len, used))
        of_steps = self.cfg.process.weighting == "step"
        return [
            Sequence(
                solution.tokens,
                0,
                1 / total if of_steps else 1 / (len(solutions) * len(indices)),
                targets=tuple((solution.last[i], solution.labels[i]) for i in indices),
            )
            for solution, indices in zip(solutions, used, strict=True)
        ]

    # ------------------------------------------------------------------ held-out data

    def evaluate(self, step: int) -> Evaluated | None:
        """F1, accuracy and calibration on the held-out solutions."""
        if self.heldout is None:
            return None
        table = self.heldout
        labels = [[None if math.isnan(y) else y for y in table.at(index).labels] for index in range(len(table))]
        found = step_measures(self.scores(table), labels)
        f1 = f", F1 {found['f1']:.3f}" if "f1" in found else ""
        note = f"held-out step accuracy {found['accuracy']:.3f}{f1}"
        return Evaluated({f"eval/{name}": value for name, value in found.items()}, [], note)

    def scores(self, table: StepTable) -> list[list[float]]:
        """The probability of each step of each solution, on every rank."""
        own: dict[int, list[float]] = {}
        size = self.cfg.process.batch_size
        for start in range(0, len(table), size):  # not all in memory at once
            some = [table.at(index) for index in range(start, min(start + size, len(table)))]
            texts, last = [Sequence(solution.tokens, 0, 1.0) for solution in some], [solution.last for solution in some]
            found = probabilities_at(texts, last, self.policy, self.world, self.cfg.row_tokens)
            own |= {start + number: values for number, values in found.items()}
        together = of_all_shards(own, self.world)
        return [together[index] for index in range(len(table))]

    # ------------------------------------------------------------------ checkpoints and the end

    def save(self, folder: Path) -> dict[str, Any]:
        """Model and optimizer into `folder`/model."""
        self.policy.save(folder / "model")
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Read back what `save` wrote."""
        self.policy.load(folder / "model")

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Held-out measures before and after, and the last training loss."""
        evaluated = [row for row in rows if "eval/accuracy" in row]
        before, after = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})
        trained = [row["loss"] for row in rows if "loss" in row]
        found = {
            f"{name}_{when}": row.get(f"eval/{name}")
            for name in ("accuracy", "f1", "auc", "calibration_error")
            for when, row in (("before", before), ("after", after))
        }
        return found | {"loss_last": trained[-1] if trained else None}

    def close(self) -> None:
        """Nothing to end."""


def _of_kinds(metrics: dict[str, float]) -> dict[str, float]:
    """The mean probability of right steps and of wrong ones, out of the sums with their weights."""
    metrics = dict(metrics)
    total = {"right": metrics.pop("share_right")}
    total["wrong"] = 1 - total["right"]
    for kind, weight in total.items():
        summed = metrics.pop(f"score_{kind}")
        if weight > 1e-6:
            metrics[f"score_{kind}"] = summed / weight
    return metrics | {"share_right": total["right"]}
