"""What a suite of benchmarks asks for: section 3 of the paper, for any model."""

from __future__ import annotations

import datetime
from typing import Annotated

from pydantic import Field

from r1engine.config.section import LocalPath, Positive, Section

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
