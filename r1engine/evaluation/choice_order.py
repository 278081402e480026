"""The order in which the options of a question are shown. No torch.

It follows from the question's id alone: not from its place in the file, the process, or what was drawn before. The
samples of a question are shown its rotations in turn, so that over as many samples as there are options (or a multiple)
each option stands at each place equally often, and a model that likes one letter gains nothing.
"""

from __future__ import annotations

import hashlib


def shown_order(question: str, options: int, sample: int) -> list[int]:
    """Which option, counted as in the file, stands at each place.

    Args:
        question: id.
        options:  their number.
        sample:   number of the sample.
    """
    drawn = sorted(range(options), key=lambda option: hashlib.sha256(f"{question}\n{option}".encode()).digest())
    turn = sample % options
    return drawn[turn:] + drawn[:turn]
