"""Preference rewards (paper, section 2.3.4): what each reward model sees, when it counts, and when to stop it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from r1engine.rewards.endpoint import Endpoint, EndpointError

# Scores of (prompt, text) pairs, higher is better; None where there is none.
ScoreTexts = Callable[[Sequence[tuple[str, str]]], list[float | None]]


def summary(completion: str, *, think_prefilled: bool = False) -> str:
    """What follows the thoughts: the part that the user reads, without `<answer>` tags; "" if they never end."""
    closed = completion.rfind("</think>")
    if closed < 0 and (think_prefilled or "<think>" in completion):
        return ""
    text = completion[closed + len("</think>") :] if closed >= 0 else completion
    return text.replace("<answer>", "").replace("</answer>", "").strip()


def preference_components(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    helpfulness: ScoreTexts | None,
    harmlessness: ScoreTexts | None,
    think_prefilled: bool = False,
) -> list[dict[str, float]]:
    """Components "helpfulness" and "harmlessness" of each completion; one without a score is left out, not 0.

    "For helpfulness, we focus exclusively on the final summary"; "for harmlessness, we evaluate the entire response".
    """
    components: list[dict[str, float]] = [{} for _ in completions]
    summaries = [summary(text, think_prefilled=think_prefilled) for text in completions]
    for name, model, texts in (
        ("helpfulness", helpfulness, summaries),
        ("harmlessness", harmlessness, completions),
    ):
        if model is None:
            continue
        scores = model(list(zip(prompts, texts, strict=True)))
        if len(scores) != len(texts):
            raise ValueError(f"{name}: the reward model gave {len(scores)} scores for {len(texts)} texts")
        for found, score in zip(components, scores, strict=True):
            if score is not None and math.isfinite(score):
                found[name] = score
    return components


@dataclass(frozen=True)
class RewardModel:
    """A reward model behind SGLang's /classify; a `ScoreTexts`."""

    endpoint: Endpoint
    model: str
    render: Callable[[str, str], str]  # (prompt, text) -> the conversation as the model was trained on it
    batch_size: int = 32

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Scores of all pairs; None for a batch that the server does not score."""
        scores: list[float | None] = []
        for start in range(0, len(pairs), self.batch_size):
            texts = [self.render(*pair) for pair in pairs[start : start + self.batch_size]]
            try:
                reply = self.endpoint.post("/classify", {"model": self.model, "text": texts})
                found = [float(item["embedding"][0]) for item in reply]
            except (EndpointError, KeyError, IndexError, TypeError, ValueError):
                found = []
            scores += found if len(found) == len(texts) else [None] * len(texts)
        return scores


def weight_at(schedule: dict[int, float], step: int) -> float:
    """Weight of a reward in a step: that of the largest key not above it.

    The paper's later version trains 1,700 steps and "preference-based rewards are introduced only in the final 400":
    {0: 0.0, 1300: 1.0}.

    Raises:
        ValueError: the schedule does not start at step 0.
    """
    if 0 not in schedule:
        raise ValueError(f"preference schedule: found the steps {sorted(schedule)}, required one from step 0 on")
    return schedule[max(start for start in schedule if start <= step)]


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
        self._deviations = deviations
        self._model: deque[float] = deque(maxlen=window)
        self._verifiable: deque[float] = deque(maxlen=window)

    def update(self, model_reward: float, verifiable_reward: float) -> str:
        """Takes the mean rewards of a step; a warning in one line, or ""."""
        self._model.append(model_reward)
        self._verifiable.append(verifiable_reward)
        if len(self._model) < self._model.maxlen:
            return ""
        up, down = _change(self._model), _change(self._verifiable)
        if up[1] < self._deviations or down[1] > -self._deviations:
            return ""
        return (
            f"reward hacking? in the last {len(self._model)} steps the reward model's score changed by {up[0]:+.3g}, "
            f"the verifiable reward by {down[0]:+.3g}"
        )


def _change(values: deque[float]) -> tuple[float, float]:
    """(difference of the halves' means, the same in standard errors)."""
    half = len(values) // 2
    old, new = list(values)[:half], list(values)[-half:]
    means = [sum(part) / half for part in (old, new)]
    squares = [sum((x - mean) ** 2 for x in part) for part, mean in zip((old, new), means, strict=True)]
    error = math.sqrt(sum(squares) / (half * (half - 1)))
    difference = means[1] - means[0]
    return difference, difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
