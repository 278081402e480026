"""Rewards (paper, sections 2.2.2, 2.3.2): is the answer right, where it should be, in the right language. No torch.

A verdict has three values. "undecided" says that a rule could not be computed: it is no reward of 0, the
sample is to be left out of its group.
"""

from __future__ import annotations

from r1engine.rewards.record import Record, Score, Verdict
from r1engine.rewards.scorer import Scorer
from r1engine.rewards.settings import ScorerSettings

__all__ = ["Record", "Score", "Scorer", "ScorerSettings", "Verdict"]
