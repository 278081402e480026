"""Supervised fine-tuning: next-token cross-entropy of completions, through the same policy as reinforcement learning.

Cold start and second SFT of the paper (sections 2.3.1 and 2.3.3), distillation (2.4), and the demo's base model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from r1engine.batch import PackedBatch, Sequence, TokenOutputs, pack
from r1engine.config import SftConfig
from r1engine.data.chat import PromptFormat
from r1engine.data.texts import TextTable, texts_key
from r1engine.model.policy import Policy
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.ranks import World
from r1engine.stages.identity import Identity, model_identity, setting
from r1engine.stages.inputs import text_batches, write_texts
from r1engine.stages.prepared import prepared
from r1engine.stages.stage import Advance, Evaluated


def cross_entropy(outputs: TokenOutputs, row: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted negative log-likelihood of one packed row.

    Args:
        outputs: of the policy; `logp` is differentiable.
        row:     its loss_weight is 1 / (weighted tokens of the batch) on the completions.

    Returns:
        The loss (nats a token), and the weighted sum of the entropy.
    """
    return -(row.loss_weight * outputs.logp).sum(), {"entropy": (row.loss_weight * outputs.entropy).sum()}


class SftStage:
    """Trains on texts. The optimizer step alone tells the place in the data."""

    def __init__(self, cfg: SftConfig, world: World, phases: Phases, progress: Progress) -> None:
        """Reads and tokenizes the texts, and builds the policy.

        Raises:
            ValueError: the model or the texts are not what the configuration needs.
        """
        cfg, form = prepared(cfg, world)
        self.cfg, self.world, self._phases, self._progress = cfg, world, phases, progress
        self.train, self._dataset = self._read("train", cfg.data.train_file, form)
        self.heldout = self._read("heldout", cfg.data.heldout, form)[0] if cfg.data.heldout is not None else None
        self.batches = text_batches(cfg, len(self.train))
        self.steps = self.batches.steps
        layout = cfg.parallel.model_copy(update={"offload": False})  # nothing else wants the device's memory
        self.policy = Policy(cfg.model, layout, cfg.optimizer, world, seed=cfg.seed)

    def _read(self, name: str, path: Path, form: PromptFormat) -> tuple[TextTable, str]:
        """The tokens of a file, written once below run_dir, and the digest of all that they depend on. Collective."""
        folder, data = self.cfg.model.folder, self.cfg.data
        key = self.world.from_first(partial(texts_key, path, form, data, folder / "tokenizer.json"))
        cache = self.cfg.run_dir / "tokens" / name
        table = TextTable(self.world.from_first(partial(write_texts, self.cfg, path, cache, key, form)))
        for note in table.notes:
            self._progress.note(note)
        return table, key

    def identity(self) -> Identity:
        """What must not change between a checkpoint and the run that goes on from it; the layout may."""
        data = self.cfg.data
        return {
            "seed": setting(self.cfg.seed),
            "data": (self._dataset, f"{data.train} with template {data.template} and max_tokens {data.max_tokens}"),
            "sft.batch_size": setting(self.cfg.sft.batch_size),
            **model_identity(self.policy),
        }

    def begin(self, rows: list[dict[str, Any]]) -> None:
        """Nothing to prepare."""

    def advance(self, step: int) -> Advance:
        """One optimizer step on the mean cross-entropy of all completion tokens of a batch."""
        sequences = weighted([self.train.at(index) for index in self.batches.at(step)])
        rows, lr = self._rows(sequences), self.cfg.optimizer.lr_at(step, self.steps)
        with self._phases("update"):
            done = self.policy.update(rows, cross_entropy, lr)
        tokens = sum(len(sequence.tokens) for sequence in sequences)
        epoch = (step + 1) / self.batches.steps_per_epoch
        return Advance(1, done.metrics | {"lr": lr, "epoch": epoch, "tokens": tokens}, tokens=tokens)

    def evaluate(self, step: int) -> Evaluated | None:
        """Mean negative log-likelihood of the held-out completions (nats a token)."""
        if self.heldout is None:
            return None
        rows = self._rows(weighted([self.heldout.at(index) for index in range(len(self.heldout))]))
        logps = self.policy.logprobs(rows)
        own = -sum(float((row.loss_weight * logp).sum()) for row, logp in zip(rows, logps, strict=True))
        # Ranks of one data-parallel share have the same rows.
        loss = sum(dict(self.world.everyones((self.world.dp_rank, own))).values())
        return Evaluated({"eval/loss": loss}, [], f"held-out loss {loss:.4f}")

    def _rows(self, sequences: list[Sequence]) -> list[PackedBatch]:
        """This data-parallel rank's rows, on its device."""
        shards = pack(sequences, self.policy.row_shape(self.cfg.row_tokens))
        return [row.to(self.world.device) for row in shards[self.world.dp_rank]]

    def save(self, folder: Path) -> dict[str, Any]:
        """Model and optimizer into `folder`/model."""
        self.policy.save(folder / "model", None)
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Read back what `save` wrote."""
        self.policy.load(folder / "model", has_snapshot=False)

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


def weighted(texts: list[tuple[list[int], int]]) -> list[Sequence]:
    """Training sequences of (tokens, size of the prompt); each completion token weighs 1 / (all of them)."""
    num_tokens = sum(len(tokens) - num_prompt for tokens, num_prompt in texts)
    return [Sequence(tokens, num_prompt, 1.0 / num_tokens) for tokens, num_prompt in texts]
