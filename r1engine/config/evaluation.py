"""What a suite of benchmarks asks for: section 3 of the paper, for any model."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1engine.config.rewards import Rewards
from r1engine.config.section import Count, LocalPath, Positive, Section
from r1engine.config.source import read_source, validate
from r1engine.config.stage import Template

Day = Annotated[datetime.date, Field(strict=False)]  # not strict: an override is text


class BenchmarkSettings(Section):
    """One benchmark of a suite: where its owners' file is, and how often each question is asked."""

    file: LocalPath
    """The owners' own file or folder; none is shipped, and none is fetched."""
    kind: str | None = None
    """Row of `r1engine evaluate list`; null: the name that the suite gives the benchmark."""
    samples: Positive | None = None
    """Replies to each question (k). Paper, section 3: "typically between 4 and 64, depending on the test set size";
    null: 64 up to 100 questions, 16 up to 300, 8 up to 600, then 4."""
    questions: Positive | None = None
    """The first so many; null: all."""
    consensus: bool = False
    """Also the majority of the k replies; the paper's cons@64."""
    first_day: Day | None = None
    """Problems from this day on, where they have dates. Paper: LiveCodeBench from 2024-08-01."""
    last_day: Day | None = None
    """Problems up to this day, itself included. Paper: LiveCodeBench to 2025-01-31."""
    articles: bool = False
    """FRAMES: show the articles with the question, where the file has them; else the question alone."""
    private: bool = False
    """Pages show numbers and letters of this benchmark, no text."""

    def samples_of(self, questions: int) -> int:
        """k, of a benchmark of so many questions."""
        if self.samples is not None:
            return self.samples
        return next((k for most, k in ((100, 64), (300, 16), (600, 8)) if questions <= most), 4)


class EndpointSettings(Section):
    """An OpenAI-compatible server that is evaluated (TARGET is its URL)."""

    model: str = "default"
    """The model's name there."""
    mode: Literal["chat", "tokens"] = "chat"
    """chat: one user message, without a system prompt, in the server's own template; tokens: token ids of `template`
    and `tokenizer` on /v1/completions, as training writes them."""
    tokenizer: LocalPath | None = None
    """tokens: Hugging Face folder of the tokenizer and the template."""
    parallel: Positive = 64
    """Requests at once, of each rank."""
    tries: Positive = 3
    """Tries of one request."""
    stall_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A reply that is silent for so long has failed."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Most seconds of one reply."""
    key_variable: str = ""
    """Environment variable that holds the API key; "": none is sent."""


class ServersSettings(Section):
    """SGLang servers that are started for a folder (generator: sglang)."""

    python: LocalPath | None = None
    """Interpreter of the environment that sglang is installed in."""
    servers: Positive = 1
    """Servers on this machine; each takes the next `tensor` GPUs."""
    tensor: Positive = 1
    """GPUs of one server."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Share of GPU memory for weights and KV pool."""
    start_seconds: Annotated[float, Field(gt=0)] = 900.0
    """A server that does not answer for so long after its start has failed."""
    args: list[str] = Field(default=[])
    """More arguments of sglang.launch_server."""


class Suite(Section):
    """How models are evaluated: `r1engine evaluate TARGET SUITE.yaml`. Defaults are those of section 3 of the paper."""

    out: LocalPath | None = None
    """Folder of the results; an evaluation that was begun there goes on. null: runs/evals/<target>-<suite>."""
    seed: Count = 0
    """Of every sample, with the benchmark, the question and the number of the sample."""
    temperature: Annotated[float, Field(gt=0)] = 0.6
    """Paper, section 3: "a sampling temperature of 0.6"."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """The same sentence: "and a top-p value of 0.95"."""
    max_tokens: Positive = 32_768
    """Paper, section 3: "a maximum generation length of 32,768 tokens"; cut to what the model's context leaves."""
    generator: Literal["local", "sglang"] = "local"
    """Who draws for a folder: this process, or SGLang servers that are started for it."""
    template: Template | None = None
    """How questions are shown: chat (the folder's own), r1, plain, r1_zero (Table 1) or none; null: a run's as it was
    trained, else chat."""
    think: Literal["own", "prefilled"] = "own"
    """prefilled: the prompt ends in <think>. R1's README: "we recommend enforcing the model to initiate its response"
    so."""
    system: str | None = None
    """System message; R1's README: "avoid adding a system prompt"."""
    slots: Positive = 64
    """Sequences that this process decodes at once."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto: float32 on CPUs, bfloat16 on GPUs."""
    endpoint: EndpointSettings = EndpointSettings()
    sglang: ServersSettings = ServersSettings()
    rewards: Rewards = Rewards()
    """How replies are graded: deadlines, workers, `judge`."""
    benchmarks: Annotated[dict[str, BenchmarkSettings], Field(min_length=1)]
    """By a name of your choice; the row of the table is `kind`, or this name."""

    @model_validator(mode="after")
    def _names_are_files(self) -> Suite:
        if bad := [name for name in self.benchmarks if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name)]:
            raise ValueError(f"benchmarks: found the name {bad[0]!r}, required letters, digits, _ and -")
        if self.generator == "sglang" and self.sglang.python is None:
            raise ValueError("sglang.python: found null, required the Python of an environment with sglang")
        return self


def load_suite(path: Path, overrides: list[str]) -> Suite:
    """The suite of a YAML file with `key.sub=value` overrides applied in order.

    Raises:
        ConfigError: a key or a value is wrong; every problem is listed with its origin.
    """
    return validate(Suite, read_source(path, overrides))
