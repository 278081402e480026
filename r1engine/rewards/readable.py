"""The readable pattern of the cold-start data (paper, section 2.3.1):

|special_token|<reasoning_process>|special_token|<summary>
"""

from __future__ import annotations

SPECIAL_TOKEN = "|special_token|"  # the paper does not say which; a run may take another


def write_readable(reasoning: str, summary: str, token: str = SPECIAL_TOKEN) -> str:
    """One completion in the readable pattern; `read_readable` gives back both parts, white space included.

    Raises:
        ValueError: a part is blank or holds the token, so that it could not be read back.
    """
    if not token.strip():
        raise ValueError(f"readable pattern: found the token {token!r}, required one that is not blank")
    for name, part in (("reasoning", reasoning), ("summary", summary)):
        if not part.strip():
            raise ValueError(f"readable pattern: the {name} is blank")
        # Also a token that would begin in one part and end in the next.
        if (token + part + token).find(token, 1) != len(token) + len(part):
            raise ValueError(f"readable pattern: the {name} holds the token {token!r}")
    return f"{token}{reasoning}{token}{summary}"


def read_readable(text: str, token: str = SPECIAL_TOKEN) -> tuple[str, str]:
    """(reasoning, summary) of a completion in the readable pattern.

    Raises:
        ValueError: it does not start with the token, does not hold it exactly twice, or a part is blank.
    """
    if not text.startswith(token):
        raise ValueError(f"readable pattern: found {text[:20]!r} at the start, required the token {token!r}")
    parts = text.split(token)
    if len(parts) != 3:
        raise ValueError(f"readable pattern: found the token {token!r} {len(parts) - 1} times, required 2")
    for name, part in (("reasoning", parts[1]), ("summary", parts[2])):
        if not part.strip():
            raise ValueError(f"readable pattern: the {name} is blank")
    return parts[1], parts[2]
