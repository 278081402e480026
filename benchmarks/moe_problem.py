"""The mixture-of-experts layer that the bench_moe_*.py scripts measure: DeepSeek-V3's sizes, one rank of 8."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import timing
import torch

from r1kernels import moe_plan
from r1kernels.moe_plan import RowPlan


@dataclass(frozen=True)
class Problem:
    """T tokens, each with K of this rank's E experts: as many rows as a rank of 8 gets when each has T tokens."""

    tokens: int
    experts: int  # 32: an eighth of DeepSeek-V3's 256
    topk: int
    hidden: int
    inner: int
    device: torch.device

    @property
    def rows(self) -> int:
        """Choices, without padding."""
        return self.tokens * self.topk

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def ids(self) -> torch.Tensor:
        return torch.rand(self.tokens, self.experts, device=self.device).argsort(1)[:, : self.topk].int().contiguous()

    def plan(self, align: int = 128) -> RowPlan:
        return moe_plan(self.ids(), self.experts, align=align)

    def weights(self) -> torch.Tensor:
        return torch.rand(self.tokens, self.topk, device=self.device)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up [E, 2I, H], down [E, H, I])"""
        sizes = (self.experts, 2 * self.inner, self.hidden), (self.experts, self.hidden, self.inner)
        return tuple(self.randn(*s) / s[2] ** 0.5 for s in sizes)

    def describe(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("tokens", "experts", "topk", "hidden", "inner")}


def problems(description: str | None) -> tuple[list[Problem], int]:
    """(what to measure, rounds) from the command line: --device, --smoke."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--smoke", action="store_true", help="one small size, once: does it run?")
    args = parser.parse_args()
    device = timing.use_device(args.device)
    torch.manual_seed(0)
    if args.smoke:
        return [Problem(40, 4, 2, 128, 128, device)], 1
    if device.type == "cpu":
        return [Problem(512, 8, 4, 512, 256, device)], 5
    return [Problem(tokens, 32, 8, 7168, 2048, device) for tokens in (4096, 16384, 65536)], 10


def copy_bytes(problem: Problem, rounds: int) -> int:
    """Size of the copy that a problem's bytes are measured against."""
    if rounds == 1:
        return 2**20
    return 2**26 if problem.device.type == "cpu" else 2**30
