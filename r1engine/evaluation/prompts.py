"""The prompts of benchmarks, word for word, one file each in prompts/. No torch.

Sources: multiple_choice, drop_*, simpleqa_grader: openai/simple-evals, which the paper names for MMLU, DROP, GPQA and
SimpleQA (section 3). mmlu_redux: Zero-Eval. mmlu_pro: its own, without the examples, as the paper has it. boxed: the
paper's model card; boxed_chinese, cluewsc: OpenCompass. c_eval, livecodebench*, c_simpleqa_grader: their owners.
frames_articles: evalscope. IFEval, SimpleQA and C-SimpleQA ask the question alone.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "prompts"
_PLACE = re.compile(r"\{(\w+)\}")


@cache
def prompt_template(name: str) -> str:
    """The text of a prompt's file, without the line end that ends the file."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def prompt(name: str, /, **texts: str) -> str:
    """The prompt with a text in each of its places; braces in these texts stay as they are.

    Raises:
        KeyError: a place has no text.
    """
    return _PLACE.sub(lambda match: texts[match[1]], prompt_template(name))
