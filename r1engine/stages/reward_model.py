"""A reward model (paper, section 2.3.4): the policy's architecture with a score, trained on pairs or labels."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from r1engine.batch import Sequence, pack_units
from r1engine.config import RewardModelConfig
from r1engine.data.chat import PromptFormat
from r1engine.data.rated import RatedForm
from r1engine.data.rated_table import RatedTable, ratings_key
from r1engine.evaluation.ratings import accuracy, measures, outcomes, shown
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.plan.utilization import training_flops
from r1engine.ranks import World
from r1engine.rewards.rated import PROBE
from r1engine.stages.identity import Identity, model_identity, setting
from r1engine.stages.inputs import rating_batches, write_ratings
from r1engine.stages.prepared import prepared_to_rate
from r1engine.stages.reward_loss import of_texts, pairwise, pointwise
from r1engine.stages.rows import batch_metrics, of_all_shards, own_rows
from r1engine.stages.stage import Advance, Evaluated
from r1engine.stages.supervised import policy_of, read_once

RATINGS = "ratings.json"  # what the report draws of the last evaluation


class RewardModelStage:
    """Trains on pairs or labels. The optimizer step alone tells the place in the data."""

    def __init__(self, cfg: RewardModelConfig, world: World, phases: Phases, progress: Progress) -> None:
        """Reads and tokenizes the data, and builds the policy.

        Raises:
            ValueError: the model or the data are not what the configuration needs.
        """
        self._model_path = cfg.model.path  # as the user knows it
        cfg, form, rated = prepared_to_rate(cfg, world)
        self.cfg, self.world, self._phases, self._progress = cfg, world, phases, progress
        self.train, self._dataset = self._read("train", cfg.data.train_file, form, rated)
        heldout = cfg.data.heldout
        self.heldout = self._read("heldout", heldout, form, rated)[0] if heldout is not None else None
        self.batches = rating_batches(cfg, len(self.train))
        self.steps = self.batches.steps
        self.policy = policy_of(cfg, world, "score")
        options = cfg.reward_model
        self._is_pairs = options.loss == "pairwise"
        self._probe = rated.tokens([rated.head(PROBE[0])], [PROBE[1]])[0]
        self._loss = partial(pairwise, margin=options.margin, center=options.center) if self._is_pairs else pointwise

    def _read(self, name: str, path: Path, form: PromptFormat, rated: RatedForm) -> tuple[RatedTable, str]:
        """The tokens of a file, written once below run_dir, and the digest of all that they depend on. Collective."""
        key = partial(ratings_key, path, form, rated, self.cfg)
        write = partial(write_ratings, self.cfg, path, self.cfg.run_dir / "tokens" / name, form, rated)
        return read_once(RatedTable, key, write, self.world, self._progress)

    def identity(self) -> Identity:
        """What must not change between a checkpoint and the run that goes on from it; the layout may."""
        cfg, data = self.cfg.reward_model, self.cfg.data
        return {
            "seed": setting(self.cfg.seed),
            "data": (self._dataset, f"{data.train} with template {data.template} and max_tokens {data.max_tokens}"),
            "reward_model.batch_size": setting(cfg.batch_size),
            "reward_model.loss": setting(cfg.loss),
            **model_identity(self.policy, self._model_path),
        }

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Say what there is to train on."""
        lengths, cfg = self.train.lengths(), self.cfg.reward_model
        what = "pairs" if self._is_pairs else "labels"
        note = f"{len(lengths):,} {what}, {lengths.sum():,} tokens: {self.steps:,} steps of "
        note += f"{min(cfg.batch_size, len(lengths)):,}, epochs {cfg.epochs}"
        if self._is_pairs:
            note += (
                f"; chosen texts have {lengths[:, 0].mean() / lengths[:, 1].mean():.2f} x the tokens of rejected ones"
            )
        self._progress.note(note)

    def advance(self, step: int) -> Advance:
        """One optimizer step on the mean loss of a batch."""
        with self._phases("data"):
            indices = self.batches.at(step)
            units = self._units(self.train, indices, self.train.values[indices])
            shards = pack_units(units, self.policy.row_shape(self.cfg.row_tokens))
            rows = own_rows(shards, self.world)
        lr = self.cfg.optimizer.lr_at(step, self.steps)
        with self._phases("update"):
            done = self.policy.update(rows, self._loss, lr)
        lengths = [len(text.tokens) for unit in units for text in unit]
        metrics = done.metrics | batch_metrics(self.policy, shards, lengths)
        metrics |= {"lr": lr, "epoch": (step + 1) / self.batches.steps_per_epoch}
        return Advance(1, metrics, sum(lengths), flops=training_flops(self.policy.shape, lengths))

    def _units(self, table: RatedTable, indices: list[int], values: np.ndarray) -> list[list[Sequence]]:
        """The texts of each pair or label; `values` travel in the place of the advantage."""
        weight = 1 / len(indices)
        rated = [table.at(index).texts for index in indices]
        return [
            [Sequence(text, len(text) - 1, weight, advantage=float(value)) for text in texts]
            for texts, value in zip(rated, values, strict=True)
        ]

    # ------------------------------------------------------------------ held-out data

    def evaluate(self, step: int) -> Evaluated | None:
        """Accuracy on the held-out pairs or labels, and what else tells good scores from bad ones."""
        if self.heldout is None:
            return None
        table, scores = self.heldout, self._scores(self.heldout)
        lengths, labels = table.lengths(), None if self._is_pairs else np.asarray(table.values)
        found = {f"eval/{name}": value for name, value in measures(scores, lengths, labels).items()}
        found["eval/probe_score"] = self._probe_score()
        right, sign = outcomes(scores, labels), 1 if labels is None else 2 * labels - 1
        size = scores[:, 0] - scores[:, 1] if labels is None else scores[:, 0]
        found["eval/loss"] = float(np.logaddexp(0, -sign * size).mean())
        for number, name in enumerate(table.domains):
            if name:
                found[f"eval/accuracy/{name}"] = accuracy(right[table.domain == number])["accuracy"]
        if self.world.is_first:
            (self.cfg.run_dir / RATINGS).write_text(json.dumps(shown(scores, lengths, labels)) + "\n")
        low, high = found["eval/accuracy_low"], found["eval/accuracy_high"]
        note = f"held-out accuracy {found['eval/accuracy']:.3f} (95 % {low:.3f} to {high:.3f})"
        return Evaluated(found, [], note)

    def _scores(self, table: RatedTable) -> np.ndarray:
        """[N, texts of each] float64, on every rank."""
        own: dict[int, list[float]] = {}
        size = self.cfg.reward_model.batch_size
        for start in range(0, len(table), size):  # not all in memory at once
            indices = list(range(start, min(start + size, len(table))))
            units = self._units(table, indices, np.array(indices) - start)
            own |= {start + place: scores for place, scores in self._own_scores(units).items()}
        together = of_all_shards(own, self.world)
        return np.array([together[i] for i in range(len(table))])

    def _own_scores(self, units: list[list[Sequence]]) -> dict[int, list[float]]:
        """Of the units in this rank's rows: the number in the place of the advantage -> the scores of the texts."""
        found, k = {}, len(units[0])
        rows = own_rows(pack_units(units, self.policy.row_shape(self.cfg.row_tokens)), self.world)
        for row, values in zip(rows, self.policy.scores(rows), strict=True):
            score, place, weight = (of_texts(x, row).tolist() for x in (values, row.advantage, row.loss_weight))
            for i in range(0, sum(w > 0 for w in weight), k):
                found[round(place[i])] = score[i : i + k]
        return found

    def _probe_score(self) -> float:
        """Of PROBE, on every rank."""
        own = self._own_scores([[Sequence(self._probe, len(self._probe) - 1, 1.0, advantage=0.0)]])
        return next(found[0][0] for found in self.world.everyones(own) if found)

    # ------------------------------------------------------------------ checkpoints and the end

    def save(self, folder: Path) -> dict[str, Any]:
        """Model and optimizer into `folder`/model."""
        self.policy.save(folder / "model")
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Read back what `save` wrote."""
        self.policy.load(folder / "model")

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Held-out accuracy before and after, how much it has to do with the length, and the last training loss."""
        evaluated = [row for row in rows if "eval/accuracy" in row]
        before, after = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})
        trained = [row["loss"] for row in rows if "loss" in row]
        return {
            "accuracy_before": before.get("eval/accuracy"),
            "accuracy_after": after.get("eval/accuracy"),
            "length_correlation": after.get("eval/length_correlation"),
            "probe_score": after.get("eval/probe_score"),
            "loss_last": trained[-1] if trained else None,
        }

    def close(self) -> None:
        """Nothing to end."""
