"""Training of a reward model (paper, section 2.3.4). Defaults are those of v2, section 3.1."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1engine.config.section import Fraction, LocalPath, Positive, Section
from r1engine.config.stage import Data, Optimizer, StageConfig, Template, column_problems

Sees = Literal["summary", "response"]


RATED_FIELDS = ("prompt", "chosen", "rejected", "delta", "response", "safe", "domain")


class RatedData(Data):
    """The pairs or labels."""

    train: LocalPath | None = None
    """.jsonl or .parquet file with `prompt`, `chosen`, `rejected`, or with `prompt`, `response`, `safe`."""
    heldout: LocalPath | None = None
    """The same, for the held-out accuracy; null: no evaluation."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field -> its column, dots lead into nested values: {prompt: chosen.0.content, chosen: chosen.1.content, ...}.
    A list of messages is the prompt, or the one of the assistant (chosen, rejected, response)."""
    template: Template = "chat"
    """How a prompt and a response are written: as what is rated later was generated."""
    max_tokens: Positive = 8_192
    """Tokens of a text with its end token; none is ever cut. v2: "The maximum sequence length ... is set to 8192"."""
    max_dropped: Fraction = 0.05
    """Share of rows that may be left out (too long, equal, with a token of the template inside); more are refused."""


class RewardTraining(Section):
    """The loss, and how often and in which batches the pairs or labels are trained on."""

    loss: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: the chosen response above the rejected one (v2: helpfulness); pointwise: safe or not (v2: safety)."""
    sees: Sees | None = None
    """summary: what follows the thoughts; response: all of it; null: summary for pairs ("For helpfulness, we focus
    exclusively on the final summary"), response for labels ("For harmlessness, we evaluate the entire response")."""
    epochs: Positive = 1
    """Passes over the data. v2: "for a single epoch over the training dataset"."""
    batch_size: Positive = 256
    """Pairs or labels of an optimizer step. v2: "with a batch size of 256"."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """The scores of a pair should be so many times its `delta` apart (Llama 2); 0: off. Not in the paper."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (chosen + rejected)^2, which keeps the scores around 0; 0: off. Not in the paper."""


class RewardModelConfig(StageConfig):
    """A reward model: a scalar head on the model, trained on pairs or labels."""

    stage: Literal["reward_model"] = "reward_model"
    """Kind of stage."""
    data: RatedData = RatedData()
    reward_model: RewardTraining = RewardTraining()
    optimizer: Optimizer = Optimizer(lr=6e-6)  # v2: "a learning rate of 6e-6"

    @property
    def sees(self) -> Sees:
        """What of a response is rated."""
        return self.reward_model.sees or ("summary" if self.reward_model.loss == "pairwise" else "response")

    @property
    def texts_of_unit(self) -> int:
        """Texts that stay together in a row: those of a pair."""
        return 2 if self.reward_model.loss == "pairwise" else 1

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest pair, or of the longest text."""
        return self.texts_of_unit * self.data.max_tokens

    @model_validator(mode="after")
    def _fits_together(self) -> RewardModelConfig:
        of_pair = "2 x " if self.texts_of_unit == 2 else ""
        problems = self.row_problems(f"{of_pair}data.max_tokens {self.data.max_tokens}")
        problems += column_problems(self.data.columns, RATED_FIELDS)
        if self.reward_model.loss == "pointwise":
            for name in ("margin", "center"):
                if value := getattr(self.reward_model, name):
                    problems.append(f"reward_model.{name}: found {value}, required 0 with reward_model.loss pointwise")
        if problems:
            raise ValueError("\n".join(problems))
        return self
