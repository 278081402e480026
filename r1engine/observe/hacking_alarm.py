"""When to distrust a reward model: its score rises while the verifiable reward falls."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

QUICK_WINDOW = 16


class HackingAlarm:
    """Tells when a reward model's score rises while the verifiable reward falls: the policy learns the model's faults.

    Compares the means of the two halves of the last `window` steps; both differences must exceed `deviations` times
    their standard error, in opposite directions.
    """

    def __init__(self, *, window: int = 40, deviations: float = 4.0) -> None:
        """
        Args:
            window: steps looked at.
            deviations: how sure to be; if only the score rises, 4 is one false alarm in 3 * 10^4 independent windows.

        Raises:
            ValueError: the window is too short for two means with an error.
        """
        if window < 8:
            raise ValueError(f"HackingAlarm: found window {window}, required at least 8 steps")
        self._window, self._deviations = window, deviations
        self._model: deque[float] = deque(maxlen=window)
        self._verifiable: deque[float] = deque(maxlen=window)

    def update(self, model_reward: float, verifiable_reward: float) -> str:
        """Takes the mean rewards of a step; a warning in one line, or ""."""
        self._model.append(model_reward)
        self._verifiable.append(verifiable_reward)
        if len(self._model) < self._window:
            return ""
        up, down = _change(self._model), _change(self._verifiable)
        if up[1] < self._deviations or down[1] > -self._deviations:
            return ""
        return (
            f"reward hacking? in the last {len(self._model)} steps the reward model's score changed by {up[0]:+.3g}, "
            f"the verifiable reward by {down[0]:+.3g}"
        )


class Alarms:
    """Alarms for each reward model of a run, fed with the metrics of its rollouts."""

    def __init__(self, names: Sequence[str], *, window: int, quick: Sequence[str] = ()) -> None:
        """
        Args:
            names:  of the reward models.
            window: steps looked at.
            quick:  those of them that are looked at in a window of QUICK_WINDOW, too: a policy that is paid by the step
                    collapses faster than a long window fills.
        """
        self._alarms = {
            name: [HackingAlarm(window=size) for size in sorted({window, *([QUICK_WINDOW] if name in quick else [])})]
            for name in names
        }

    def update(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Takes a rollout's `reward/<name>` and `reward/accuracy`, if it has both; the warnings by name."""
        warnings = {}
        for name, alarms in self._alarms.items():
            model, verifiable = metrics.get(f"reward/{name}"), metrics.get("reward/accuracy")
            if model is None or verifiable is None:
                continue
            found = [alarm.update(model, verifiable) for alarm in alarms]
            if warning := next(filter(None, found), ""):
                warnings[name] = warning
        return warnings


def _change(values: deque[float]) -> tuple[float, float]:
    """(difference of the halves' means, the same in standard errors)."""
    half = len(values) // 2
    old, new = list(values)[:half], list(values)[-half:]
    means = [sum(part) / half for part in (old, new)]
    squares = [sum((x - mean) ** 2 for x in part) for part, mean in zip((old, new), means, strict=True)]
    error = math.sqrt(sum(squares) / (half * (half - 1)))
    difference = means[1] - means[0]
    return difference, difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
