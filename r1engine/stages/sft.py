"""Supervised fine-tuning: next-token cross-entropy of completions, through the same policy as reinforcement learning.

Cold start and second SFT of the paper (sections 2.3.1 and 2.3.3), distillation (2.4), and the demo's base model.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1engine.batch import PackedBatch, Sequence, TokenOutputs, pack
from r1engine.config import SftConfig
from r1engine.data.chat import PromptFormat
from r1engine.data.texts import TextTable, texts_key
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.plan.utilization import training_flops
from r1engine.ranks import World
from r1engine.stages.identity import Identity, model_identity, setting
from r1engine.stages.inputs import text_batches, write_texts
from r1engine.stages.prepared import prepared
from r1engine.stages.rows import batch_metrics, own_rows
from r1engine.stages.stage import Advance, Evaluated
from r1engine.stages.supervised import policy_of, read_once
from r1kernels import GrpoObjective

# The same as `cross_entropy` where all advantages are 1: -logp, with its gradient.
CROSS_ENTROPY = GrpoObjective(loss="cispo")


def cross_entropy(outputs: TokenOutputs, row: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted negative log-likelihood of one packed row.

    Args:
        outputs: of the policy; `logp` is differentiable, or the policy has computed the loss, too.
        row:     its loss_weight is 1 / (weighted tokens of the batch) on the completions.

    Returns:
        The loss (nats a token), and the weighted sum of the entropy.
    """
    loss = -(row.loss_weight * outputs.logp).sum() if outputs.loss is None else outputs.loss[0]
    return loss, {"entropy": (row.loss_weight * outputs.entropy).sum()}


class SftStage:
    """Trains on texts. The optimizer step alone tells the place in the data."""

    def __init__(self, cfg: SftConfig, world: World, phases: Phases, progress: Progress) -> None:
        """Reads and tokenizes the texts, and builds the policy.

        Raises:
            ValueError: the model or the texts are not what the configuration needs.
        """
        self._model_path = cfg.model.path  # as the user knows it
        cfg, form = prepared(cfg, world)
        self.cfg, self.world, self._phases, self._progress = cfg, world, phases, progress
        self.train, self._dataset = self._read("train", cfg.data.train_file, form)
        self.heldout = self._read("heldout", cfg.data.heldout, form)[0] if cfg.data.heldout is not None else None
        self.batches = text_batches(cfg, len(self.train))
        self.steps = self.batches.steps
        self.policy = policy_of(cfg, world, "tokens")

    def _read(self, name: str, path: Path, form: PromptFormat) -> tuple[TextTable, str]:
        """The tokens of a file, written once below run_dir, and the digest of all that they depend on. Collective."""
        folder, data = self.cfg.model.folder, self.cfg.data
        key = partial(texts_key, path, form, data, folder / "tokenizer.json")
        write = partial(write_texts, self.cfg, path, self.cfg.run_dir / "tokens" / name, form)
        return read_once(TextTable, key, write, self.world, self._progress)

    def identity(self) -> Identity:
        """What must not change between a checkpoint and the run that goes on from it; the layout may."""
        data = self.cfg.data
        return {
            "seed": setting(self.cfg.seed),
            "data": (self._dataset, f"{data.train} with template {data.template} and max_tokens {data.max_tokens}"),
            "sft.batch_size": setting(self.cfg.sft.batch_size),
            **model_identity(self.policy, self._model_path),
        }

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Say what there is to train on, and leave the lengths of the texts for the report."""
        texts, cfg = self.train, self.cfg.sft
        self._progress.note(
            f"{len(texts):,} texts, {texts.num_tokens:,} tokens of which {texts.num_trained:,} are trained on: "
            f"{self.steps:,} steps of {min(cfg.batch_size, len(texts)):,} texts, {cfg.epochs} epochs"
        )
        if self.world.is_first:
            lengths = length_histogram(texts.lengths(), self.cfg.row_tokens)
            (self.cfg.run_dir / "lengths.json").write_text(json.dumps(lengths) + "\n")

    def advance(self, step: int) -> Advance:
        """One optimizer step on the mean cross-entropy of all completion tokens of a batch."""
        with self._phases("data"):
            sequences = weighted([self.train.at(index) for index in self.batches.at(step)])
            shards = pack(sequences, self.policy.row_shape(self.cfg.row_tokens))
            rows = own_rows(shards, self.world)
        lr = self.cfg.optimizer.lr_at(step, self.steps)
        with self._phases("update"):
            done = self.policy.update(rows, cross_entropy, lr, CROSS_ENTROPY)
        lengths = [len(sequence.tokens) for sequence in sequences]
        tokens = sum(lengths)
        metrics = done.metrics | batch_metrics(self.policy, shards, lengths)
        metrics |= {
            "lr": lr,
            "epoch": (step + 1) / self.batches.steps_per_epoch,
            "tokens_trained": tokens - sum(sequence.num_prompt for sequence in sequences),
        }
        return Advance(1, metrics, tokens, flops=training_flops(self.policy.shape, lengths))

    def evaluate(self, step: int) -> Evaluated | None:
        """Mean negative log-likelihood of the held-out completions (nats a token): of all, and of each domain."""
        if self.heldout is None:
            return None
        table = self.heldout
        domains = {name: table.of_domain(name) for name in table.domains}
        own = [self._likelihoods(indices) for indices in domains.values()]
        # Ranks of one data-parallel share have the same rows.
        sums = np.sum(list(dict(self.world.everyones((self.world.dp_rank, own))).values()), axis=0)
        total, count = sums.sum(axis=0)
        found = {"eval/loss": total / count}
        found |= {f"eval/loss/{name}": nll / n for name, (nll, n) in zip(domains, sums, strict=True) if name}
        return Evaluated(found, [], f"held-out loss {found['eval/loss']:.4f}")

    def _likelihoods(self, indices: list[int]) -> tuple[float, float]:
        """Of held-out texts, this data-parallel rank's part: negative log-likelihood (nats), completion tokens."""
        assert self.heldout is not None
        nll, count, size = 0.0, 0.0, self.cfg.sft.batch_size
        for start in range(0, len(indices), size):  # not all in memory at once
            texts = [Sequence(*self.heldout.at(index), weight=1.0) for index in indices[start : start + size]]
            rows = own_rows(pack(texts, self.policy.row_shape(self.cfg.row_tokens)), self.world)
            for row, logp in zip(rows, self.policy.logprobs(rows), strict=True):
                nll -= float((row.loss_weight * logp).double().sum())
                count += float(row.loss_weight.sum(dtype=torch.float64))
        return nll, count

    def save(self, folder: Path) -> dict[str, Any]:
        """Model and optimizer into `folder`/model."""
        self.policy.save(folder / "model")
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Read back what `save` wrote."""
        self.policy.load(folder / "model")

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Held-out loss before and after, and the last training loss."""
        evaluated = [row["eval/loss"] for row in rows if "eval/loss" in row]
        trained = [row["loss"] for row in rows if "loss" in row]
        return {
            "loss_before": evaluated[0] if evaluated else None,
            "loss_after": evaluated[-1] if evaluated else None,
            "loss_last": trained[-1] if trained else None,
        }

    def close(self) -> None:
        """Nothing to end."""


def length_histogram(lengths: np.ndarray, row_tokens: int) -> dict[str, Any]:
    """How many texts have how many tokens, in steps of a factor of the square root of two, for the report.

    Args:
        lengths:    [N] tokens of each text.
        row_tokens: that a packed row holds.
    """
    steps = int(np.ceil(2 * np.log2(lengths.max()))) + 1
    edges = 2.0 ** (np.arange(steps + 1) / 2)
    counts, _ = np.histogram(lengths, edges)
    return {"edges": edges.round(1).tolist(), "texts": counts.tolist(), "row_tokens": row_tokens}


def weighted(texts: list[tuple[list[int], int]]) -> list[Sequence]:
    """Training sequences of (tokens, size of the prompt); each completion token weighs 1 / (all of them)."""
    num_tokens = sum(len(tokens) - num_prompt for tokens, num_prompt in texts)
    return [Sequence(tokens, num_prompt, 1.0 / num_tokens) for tokens, num_prompt in texts]
