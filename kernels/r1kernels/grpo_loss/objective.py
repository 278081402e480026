"""What is optimized: the terms of a GRPO-like loss and their constants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["token", "sequence", "sequence_mean"]
Kl = Literal["k1", "k2", "k3", "abs"]


@dataclass(frozen=True, kw_only=True)
class GrpoObjective:
    """The loss of a token with log-probability `logp`, advantage A and weight w, summed over the tokens:

        w * (tis * policy + kl_coef * kl - entropy_coef * entropy)

    policy, with ratio = exp(logp - old_logp), c = clip(ratio, 1 - clip_eps, 1 + clip_eps_high), sg = no gradient:

        clip   -min(ratio * A, c * A); with dual_clip, at most -dual_clip * A where A < 0   (PPO, GRPO, DAPO, GSPO)
        cispo  -sg(c) * A * logp                                                            (MiniMax-M1)
        sapo   -(4 / tau) * sigmoid(tau * (ratio - 1)) * A, tau by the sign of A            (Qwen)

    ratio_level "sequence_mean" takes exp of the mean log-ratio of the sequence's tokens (GSPO), "sequence" of their
    sum: eq. 1 of R1 as printed, where `kl` is that of the whole sequence, too.

    kl, with d = ref_logp - logp:   k1 = -d,   k2 = d^2 / 2,   k3 = exp(d) - d - 1 (R1 eq. 2),   abs = |d|.
    An estimator with a good value need not have a good gradient. On samples of the policy, k1 and k3 estimate
    KL(policy || reference) without bias; but the mean of k1's gradient is 0 and that of k3's is the gradient of
    KL(reference || policy). k2's gradient, (logp - ref_logp) * grad logp, is the right one. So `kl_grad="k2"` gives
    the loss the value of `kl` and a right gradient. kl_importance multiplies kl by the ratio, through which the
    gradient flows, too: right also for samples of the old policy (DeepSeek-V3.2).

    tis corrects for a generator whose probabilities are not the trainer's: v = exp(old_logp - rollout_logp) at
    tis_level; "truncate" clips v to [tis_low, tis_high], "mask" takes v inside and 0 outside of it (IcePop).

    Raises:
        ValueError: an option is unknown, out of its range, or does not go with another.
    """

    loss: Literal["clip", "cispo", "sapo"] = "clip"
    ratio_level: Level = "token"
    clip_eps: float = 10.0  # R1 uses 10
    clip_eps_high: float | None = None  # None: clip_eps (DAPO's clip-higher sets it)
    dual_clip: float | None = None  # c > 1; None: off. TRL's `delta` is the same bound
    sapo_tau: float = 1.0  # for A >= 0
    sapo_tau_negative: float = 1.05  # for A < 0
    kl: Kl = "k3"
    kl_grad: Kl | None = None  # estimator whose gradient is used; None: that of `kl`
    kl_importance: bool = False
    kl_coef: float = 0.0  # R1 uses 0.001; at 0 the KL is reported only
    entropy_coef: float = 0.0
    tis: Literal["off", "truncate", "mask"] = "off"
    tis_level: Level = "token"
    tis_low: float = 0.0
    tis_high: float = 2.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("loss", ("clip", "cispo", "sapo")),
            ("ratio_level", get_args(Level)),
            ("kl", get_args(Kl)),
            ("kl_grad", (*get_args(Kl), None)),
            ("tis", ("off", "truncate", "mask")),
            ("tis_level", get_args(Level)),
        ):
            if (found := getattr(self, name)) not in allowed:
                raise ValueError(f"GrpoObjective: {name} must be one of {', '.join(map(str, allowed))}, got {found!r}")
        for name, is_right, required in (
            ("clip_eps", self.clip_eps > 0, "> 0"),
            ("clip_eps_high", self.clip_eps_high is None or self.clip_eps_high > 0, "> 0"),
            ("dual_clip", self.dual_clip is None or self.dual_clip > 1, "> 1"),
            ("sapo_tau", self.sapo_tau > 0, "> 0"),
            ("sapo_tau_negative", self.sapo_tau_negative > 0, "> 0"),
            ("kl_coef", math.isfinite(self.kl_coef), "finite"),
            ("entropy_coef", math.isfinite(self.entropy_coef), "finite"),
            ("tis_low", 0 <= self.tis_low <= self.tis_high, f"in [0, tis_high={self.tis_high}]"),
        ):
            if not is_right:
                raise ValueError(f"GrpoObjective: {name} must be {required}, got {getattr(self, name)}")
        if self.kl_importance and self.ratio_level != "token":
            raise ValueError(f"GrpoObjective: kl_importance needs ratio_level='token', got {self.ratio_level!r}")

    @property
    def clip_high(self) -> float:
        """Clip range above 1."""
        return self.clip_eps if self.clip_eps_high is None else self.clip_eps_high

    @property
    def needs_sequences(self) -> bool:
        """True if a token's loss depends on the other tokens of its sequence."""
        return self.ratio_level != "token" or (self.tis != "off" and self.tis_level != "token")
