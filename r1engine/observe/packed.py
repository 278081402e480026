"""Text packed for a page: deflate, then base 85 in letters that HTML leaves alone. The browser unpacks it.

A page holds plotly (4.8 MB), its curves and its completions; packed it is a third of that, and still needs no network.
"""

from __future__ import annotations

import base64
import zlib
from functools import cache

_SAFE = bytes.maketrans(b"<>&", b",./")  # neither a tag nor an entity can begin; these three are no letters of base 85
_BACK = bytes.maketrans(b",./", b"<>&")


def packed(text: str) -> str:
    """For an element <script type="text/plain">; `unpacked` of templates/parts.html reads it."""
    return base64.b85encode(zlib.compress(text.encode(), 9)).translate(_SAFE).decode()


def unpacked(text: str) -> str:
    """What `packed` was given."""
    return zlib.decompress(base64.b85decode(text.encode().translate(_BACK))).decode()


@cache
def packed_plotly() -> str:
    """The JavaScript of plotly."""
    from plotly.offline import get_plotlyjs

    return packed(get_plotlyjs())
