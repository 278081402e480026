"""How a model is split over GPUs, and what does not divide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from r1engine.config import Parallel
from r1engine.hf.architecture import Architecture
from r1engine.hf.layout import check_layout

Recompute = Literal["none", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes of the trainer; Megatron's meaning of each."""

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # chunks of layers a stage holds
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    first_stage: int | None = None  # layers of the first pipeline stage; None: an even share
    last_stage: int | None = None
    recompute: Recompute = "full"
    distributed_optimizer: bool = True
    optimizer_offload: bool = False  # Adam's state in host memory, updated there

    @property
    def data(self) -> int:
        """Ranks that hold the same dense parameters and see different rows."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.expert * self.expert_tensor * self.pipeline)

    def stage_layers(self, num_layers: int) -> list[list[int]]:
        """The decoder layers of each pipeline stage; with chunks, every stage's first chunk comes before all second."""
        ends = {0: self.first_stage, self.pipeline - 1: self.last_stage}
        fixed = {stage: count for stage, count in ends.items() if count is not None}
        rest = self.pipeline - len(fixed)
        share = (num_layers - sum(fixed.values())) // rest if rest else 0
        layers: list[list[int]] = [[] for _ in range(self.pipeline)]
        start = 0
        for _ in range(self.virtual):
            for stage in range(self.pipeline):
                count = fixed.get(stage, share) // self.virtual
                layers[stage] += range(start, start + count)
                start += count
        return layers

    def problem(self, arch: Architecture) -> str | None:
        """What does not divide; None for a layout that can run."""
        ranks = self.tensor * self.pipeline * self.context
        if self.gpus % ranks:
            return f"tensor x pipeline x context = {ranks} does not divide {self.gpus} GPUs"
        parallel = Parallel(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual=self.virtual,
            context=self.context,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            first_stage_layers=self.first_stage,
            last_stage_layers=self.last_stage,
        )
        try:
            parallel.data_ranks(self.gpus)
            check_layout(arch, parallel)
        except ValueError as error:
            return str(error)
        return None

    def describe(self) -> str:
        """In the field's short form: TP8 PP4 EP32 CP4 DP1."""
        parts = [
            ("TP", self.tensor),
            ("PP", self.pipeline),
            ("VP", self.virtual),
            ("EP", self.expert),
            ("ETP", self.expert_tensor),
        ]
        parts += [("CP", self.context), ("DP", self.data)]
        shown = [f"{name}{size}" for name, size in parts if size > 1 or name == "TP"]
        if self.first_stage is not None or self.last_stage is not None:
            shown.append(f"first {self.first_stage or 'even'} last {self.last_stage or 'even'}")
        if self.optimizer_offload:
            shown.append("optimizer on host")
        return " ".join(shown)
