"""Tables of pairs of answers, by kind and by verdict, as parameters of a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def rows(kinds: Mapping[str, Mapping[str, Sequence[tuple[str, str]]]]) -> list[Any]:
    """kind -> verdict -> (answer, reference) as one parameter set a pair, (answer, reference, verdict)."""
    return [
        pytest.param(answer, reference, verdict, id=f"{kind}: {answer} for {reference}")
        for kind, verdicts in kinds.items()
        for verdict, pairs in verdicts.items()
        for answer, reference in pairs
    ]
