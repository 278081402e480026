"""Which characters of a completion each of its tokens wrote, and how probable it was."""

from __future__ import annotations

import math
from collections.abc import Callable

from r1engine.batch import Completion

Decode = Callable[[list[int]], str]  # special tokens left out
HALF = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are no whole character yet


def token_texts(completion: Completion, decode: Decode) -> dict[str, list[int]]:
    """For the page of a run.

    Returns:
        token_characters: of each token the characters it adds to the text; 0 for a part of a character that is not its
        last, and for a special token. token_percent: its probability as it was drawn, at the sampling temperature.
        Nothing where a tokenizer writes a token otherwise alone than between others.
    """
    ids, begin, lengths = completion.tokens, 0, []
    if not completion.truncated:
        ids = ids[:-1]  # the stop token is not in the text
    for end in range(1, len(ids) + 1):
        # The token before keeps a tokenizer from treating this as the begin of a text.
        before = ids[max(0, begin - 1) : begin]
        whole = decode(before + ids[begin:end])
        if whole.endswith(HALF) and end < len(ids):
            lengths.append(0)
            continue
        lengths.append(len(whole) - len(decode(before)))
        begin = end
    lengths += [0] * (len(completion.tokens) - len(ids))
    if sum(lengths) != len(completion.text) or min(lengths, default=0) < 0:
        return {}
    return {"token_characters": lengths, "token_percent": [round(100 * math.exp(logp)) for logp in completion.logp]}
