"""What a scorer is told once: how long to compute, how strict to be, whom to ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from r1engine.rewards.functions import FunctionSettings
from r1engine.rewards.language import Detector
from r1engine.rewards.math.decision import STRICT, MathPolicy
from r1engine.rewards.servers.judge import GenerativeJudge
from r1engine.rewards.servers.reward_model import RewardModel


@dataclass(frozen=True)
class ScorerSettings:
    """The settings of a scorer; each rule reads what it needs of them."""

    workers: int | None = None  # processes; None: one a core of this rank
    deadline_seconds: float = 5.0  # of one task; past it the record is undecided
    code_deadline_seconds: float = 600.0  # of all tests of one program together; each test has limits of its own
    with_language: bool = False  # every score has the component "language", not only those of reward "language"
    detector: Detector = "py3langid"  # see `language.language_share`
    blank_think_allowed: bool = False  # see `format.format_problem`
    format_rule: Literal["r1_zero", "readable"] = "r1_zero"  # see `format.format_problem`, `format.readable_problem`
    policy: MathPolicy = STRICT  # of the math rule
    unsafe: bool = False  # run code even where too little protects the machine from it, see `sandbox.Protection`
    judge: GenerativeJudge | None = None  # for records of reward "judge"
    functions: FunctionSettings = field(default_factory=lambda: FunctionSettings({}))  # of the user
    # For records of reward "preference", by what they rate: "helpfulness", "harmlessness".
    reward_models: Mapping[str, RewardModel] = field(default_factory=dict)
    rated_in_trainer: bool = False  # the trainer adds what others rate: without `reward_models` the format counts here
