"""Texts of a reward model: how a prompt and a response become tokens. The one place for its training and for rating."""

from __future__ import annotations

from pathlib import Path

from r1engine.data.chat import ChatFormat, Message, PromptFormat
from r1engine.hf.files import read_text
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer
from r1engine.rewards.rated import NAME, rendered, template_problem


class RatedForm:
    """A template with {prompt} and {response}, and the tokenizer of the reward model.

    What stands before the response and what follows are tokenized apart, as a model generates. What the model expects
    in front of a text (BOS) is there once.
    """

    def __init__(self, template: str, tokenizer: PromptTokenizer) -> None:
        """
        Raises:
            ValueError: the template has not one {prompt} and behind it one {response}.
        """
        problem = template_problem(template)
        if not problem and template.index("{response}") < template.index("{prompt}"):
            problem = f"found the template {template!r:.80}, required {{prompt}} before {{response}}"
        if problem:
            raise ValueError(problem)
        # A server puts the front there itself.
        self.template = template.removeprefix(tokenizer.front) if tokenizer.front else template
        self._head, _, self._tail = self.template.partition("{response}")
        self._tokenizer = tokenizer

    def head(self, prompt: str) -> str:
        """The text before the response."""
        return rendered(self._head, prompt, "")

    def tokens(self, heads: list[str], responses: list[str]) -> list[list[int]]:
        """Token ids of each text, on all cores: what stands before the response, the response and its end."""
        before = self._tokenizer.encode_batch(heads)
        behind = self._tokenizer.encode_continuations([response + self._tail for response in responses])
        return [a.ids + b.ids for a, b in zip(before, behind, strict=True)]


def form_to_train(form: PromptFormat, tokenizer: PromptTokenizer) -> RatedForm:
    """How a reward model is shown what `form` writes: the prompt, then the response up to the token that ends it.

    Raises:
        ValueError: the template does not write a question as it is, once; or the end token has no text.
    """
    end = tokenizer.id_to_token(form.end_token)
    if end is None:
        raise ValueError(f"data.template: the token {form.end_token}, which ends a text, is not in tokenizer.json")
    try:
        return RatedForm(form.prompt("{prompt}", "data.template") + "{response}" + end, tokenizer)
    except ValueError as error:
        raise ValueError(f"data.template: {error}") from error


def head_of(messages: list[Message], form: PromptFormat, rated: RatedForm, place: str) -> str:
    """What stands before a response to these messages, of which the last is the user's.

    Raises:
        ValueError: the template cannot write them.
    """
    if len(messages) == 1:
        return rated.head(messages[0]["content"])
    if not isinstance(form, ChatFormat):
        raise ValueError(f"{place}: found a conversation, required is one message; or data.template chat, r1 or plain")
    return form.history(messages, place)


def form_of_folder(folder: Path, template: str | None) -> RatedForm:
    """How a finished reward model wants its texts.

    Args:
        folder:   of the reward model.
        template: None: that in the folder.

    Raises:
        ValueError: there is none, or it is none; or the folder has no tokenizer.
    """
    path = folder / NAME
    if template is None and not path.is_file():
        raise ValueError(
            f"{path}: no such file, required is the text as the model was trained on it, with {{prompt}} and "
            "{response}; or `template` beside `path`"
        )
    try:
        return RatedForm(read_text(path) if template is None else template, load_tokenizer(folder))
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if template is None else f"template: {error}") from error
