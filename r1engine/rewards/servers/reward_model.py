"""Preference rewards (paper, section 2.3.4): the scores of a reward model behind a server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool  # its threads are daemons: no silent server delays the end of the program
from typing import Any

from r1engine.rewards.rated import PROBE, forgery, rendered, template_problem
from r1engine.rewards.servers.endpoint import ModelServers, ModelServersError

NEAR = 0.05  # that trainer and server may differ by, of a score
Rating = tuple[float | None, str]  # a score, higher is better, or None and why there is none


@dataclass(frozen=True)
class RewardModel:
    """A reward model behind SGLang's /classify; usable from any thread."""

    endpoint: ModelServers
    model: str
    template: str  # of the conversation as the model was trained on it, with {prompt} and {response}
    batch_size: int = 32  # texts of a request
    parallel: int = 16  # requests at once
    probe_score: float | None = None  # of PROBE, as the trainer has it

    def __post_init__(self) -> None:
        if problem := template_problem(self.template):
            raise ValueError(f"reward model {self.model}: {problem}")

    def rate(self, pairs: Sequence[tuple[str, str]]) -> list[Rating]:
        """Scores of (prompt, response) pairs, in order.

        There is none where the server gives none or one that is no finite number, and for a text that holds a
        marker of the template, such as <|im_end|>: it could end its own turn and praise itself.
        """
        ratings: list[Rating] = [self._forgery(pair) for pair in pairs]
        asked = [i for i, (_, problem) in enumerate(ratings) if not problem]
        batches = [asked[i : i + self.batch_size] for i in range(0, len(asked), self.batch_size)]
        if batches:
            with ThreadPool(min(self.parallel, len(batches))) as threads:
                texts = [[rendered(self.template, *pairs[i]) for i in batch] for batch in batches]
                found = threads.map(self._rate_batch, texts, chunksize=1)
            for i, rating in zip(asked, [rating for batch in found for rating in batch], strict=True):
                ratings[i] = rating
        return ratings

    def check(self) -> None:
        """Asks for the score of PROBE.

        Raises:
            RuntimeError: there is none, or it is not the trainer's.
        """
        score, problem = self.rate([PROBE])[0]
        if score is None:
            raise RuntimeError(f"reward model {self.model} at {self.endpoint.urls}: found no score ({problem})")
        if self.probe_score is not None and abs(score - self.probe_score) > NEAR:
            raise RuntimeError(
                f"reward model {self.model} at {self.endpoint.urls}: found the score {score:.4f} for the probe, "
                f"required probe_score {self.probe_score:.4f}; it normalizes scores, or is another model or template"
            )

    def _rate_batch(self, texts: list[str]) -> list[Rating]:
        try:
            reply = self.endpoint.post("/classify", {"model": self.model, "text": texts})
        except ModelServersError as error:
            if error.is_refusal and len(texts) > 1:  # of one text, perhaps, such as one that is too long
                return [self._rate_batch([text])[0] for text in texts]
            return [(None, f"no reply from {error}")] * len(texts)
        if not isinstance(reply, list) or len(reply) != len(texts):
            return [(None, f"the reply holds no list of {len(texts)} scores")] * len(texts)
        return [_rating(item) for item in reply]

    def _forgery(self, pair: tuple[str, str]) -> Rating:
        marker = forgery(self.template, pair)
        return None, f"the text holds {marker}, which the reward model's template uses" if marker else ""


def _rating(item: Any) -> Rating:
    try:
        score = float(item["embedding"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None, f"the reply holds no score but {item!r:.60}"
    return (score, "") if math.isfinite(score) else (None, f"the score is {score}")
