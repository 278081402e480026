"""What `r1engine generate` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import get_args

from r1engine.config.stage import Template
from r1engine.rollout.draft import Sampling


@dataclass(frozen=True)
class Wanted:
    """How to ask and how to draw."""

    template: Template | None = None  # None: the model's chat template if it has one, else the paper's Table 1
    system: str | None = None
    samples: int = 1  # of a prompt
    max_tokens: int = 1024
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(self.temperature, self.top_p)


NUMBERS = ("samples", "max_tokens", "temperature", "top_p", "seed")


def wanted_of(template: str | None, system: str | None, draw: str) -> Wanted:
    """The options of the command.

    Args:
        template: one of `Template`; None: by the model.
        system:   message; None: none.
        draw:     "samples=4,temperature=1.0".

    Raises:
        ValueError: there is no such template or number, or its value is none.
    """
    if template is not None and template not in get_args(Template):
        raise ValueError(f"--template: found {template}, required one of {', '.join(get_args(Template))}")
    if system is not None and (template or "chat") not in ("chat", "r1", "plain"):
        raise ValueError(f"--system: found one, required the template chat, r1 or plain, found {template}")
    wanted = Wanted(template, system)  # type: ignore[arg-type]  # one of them, as checked above
    kinds = {field.name: type(getattr(wanted, field.name)) for field in fields(Wanted)}
    for entry in filter(None, draw.split(",")):
        name, _, text = entry.strip().partition("=")
        if name not in NUMBERS:
            raise ValueError(f"--draw: found {name!r}, required some of {', '.join(NUMBERS)}")
        try:
            wanted = replace(wanted, **{name: kinds[name](text)})
        except ValueError as error:
            raise ValueError(f"--draw: found {entry.strip()!r}, required a number") from error
    wanted.sampling  # noqa: B018  # it refuses what cannot be
    if wanted.samples < 1 or wanted.max_tokens < 1:
        raise ValueError(f"--draw: found samples {wanted.samples}, max_tokens {wanted.max_tokens}, required 1 or more")
    return wanted
