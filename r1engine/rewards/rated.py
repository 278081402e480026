"""How a prompt and a response are written for a reward model: in its training, in the trainer, and over HTTP.

A template is a text with one {prompt} and one {response}. The folder of a reward model holds its own as NAME.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from r1engine.rewards.format import TAGS

NAME = "rated_template.txt"
PROBE = ("What is 1 + 1?", "1 + 1 is 2.")  # whose score the trainer writes down, and servers are asked for
_MARKER = re.compile(r"<[^<>\s]+>|\[/?INST\]")  # of a chat template


def template_problem(template: str) -> str:
    """What is wrong with a template, "" if nothing is."""
    if template.count("{prompt}") == template.count("{response}") == 1:
        return ""
    return f"found the template {template!r:.80}, required one {{prompt}} and one {{response}} in it"


def rendered(template: str, prompt: str, response: str) -> str:
    """The text that is rated."""
    texts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{prompt\}|\{response\}", lambda match: texts[match[0]], template)


def forgery(template: str, texts: Iterable[str]) -> str:
    """A marker of the template, such as <|im_end|>, that a text holds; "" if there is none.

    Such a text could end its own turn and praise itself.
    """
    markers = [marker for marker in _MARKER.findall(template) if marker not in TAGS]  # which every response has
    return next((marker for text in texts for marker in markers if marker in text), "")
