"""How questions and conversations are written for a model: the one place for RL, supervised training and evaluation.

A prompt and what follows it are rendered by one template and tokenized apart, as generation does. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1engine.config.stage import CHAT_TEMPLATES, Data, Template
from r1engine.hf.tokenizer import PromptTokenizer, end_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]  # role and content

# Table 1 of the paper, word for word; "prompt" is replaced by the question.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
# Ours, before the turns of Table 1: "multiple tags that correspond to specific reasoning steps" (section 4.2).
STEP_TAGS = " Each step of the reasoning process is enclosed within <step> </step> tags."
R1_ZERO_STEPS_TEMPLATE = R1_ZERO_TEMPLATE.replace(" User: {question}", STEP_TAGS + " User: {question}")
R1_TOKENS = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")  # of the shipped template r1
THINK, END_THINK = "<think>", "</think>"
PREFILL = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"  # behind a template
# A template that writes the date of today would give other prompts tomorrow, and a run could not go on.
DATE = "26 Jul 2024"  # Llama 3.1's, where no other is given
FIXED_DATE = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"
PROBE = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."}]


@dataclass(frozen=True)
class Text:
    """A prompt, and what the model learns to write behind it."""

    prompt: str
    completion: str  # without the end token
    place: str  # "train.jsonl:7", for error messages


class QuestionFormat:
    """Questions without roles, in the paper's Table 1 or as they are; completions end with the folder's end token."""

    def __init__(self, folder: Path, tokenizer: PromptTokenizer, template: Template) -> None:
        """
        Raises:
            ValueError: the folder names no end token.
        """
        self.identity = self._template = template
        self.end_token = end_token(folder, tokenizer)
        self.source: str | None = None
        self.tokenizer = tokenizer
        special = [text for text, is_special in tokenizer.added_tokens.items() if is_special]
        self._markers = _Markers([] if template == "none" else special, tokenizer)

    def prompt(self, question: str, place: str) -> str:
        """The text that the model is shown.

        Raises:
            ValueError: the question holds a special token.
        """
        _refuse(self.marker([{"role": "user", "content": question}]), place)
        return render(question, self._template)

    def marker(self, messages: list[Message]) -> str:
        """A special token that the texts hold, "" if there is none. As they are (`none`), they may hold any."""
        return self._markers.first(message["content"] for message in messages)

    def text(self, messages: list[Message], place: str) -> Text:
        """A question and its completion as a text to train on.

        Raises:
            ValueError: there are more turns, or a system message.
        """
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise ValueError(f"{place}: found a conversation, required by data.template = {self._template} is one turn")
        return Text(render(messages[0]["content"], self._template), messages[1]["content"], place)

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts, behind what the model expects in front of a text."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def encode_completions(self, texts: list[str]) -> list[list[int]]:
        """Token ids of completions, without the end token."""
        return [encoding.ids for encoding in self.tokenizer.encode_continuations(texts)]


class ChatFormat:
    """Conversations in a chat template, rendered by transformers."""

    def __init__(self, folder: Path, tokenizer: PromptTokenizer, data: Data) -> None:
        """
        Args:
            folder:    of the model.
            tokenizer: of the folder.
            data:      says which template, the system message, and whether the prompt opens the thoughts.

        Raises:
            ValueError: there is no such template, it refuses a user's question, or its turns end with no token.
        """
        self.template, self.tokenizer, self._system = data.template, tokenizer, data.system
        self._renderer = _transformers_tokenizer(folder)
        own = _own_template(folder, self._renderer) if data.template == "chat" else _shipped(data.template)
        if missing := [token for token in R1_TOKENS if data.template == "r1" and token not in tokenizer.added_tokens]:
            raise ValueError(
                f"data.template: r1 needs the tokens {missing}, not in {folder}; choose plain, chat or r1_zero"
            )
        added = tokenizer.added_tokens
        special = [text for text, is_special in added.items() if is_special]
        self._special = _Markers(special, tokenizer)
        written = [text for text in added if text.strip() and (text in own or text in (THINK, END_THINK))]
        self._markers = _Markers([*special, *written], tokenizer)
        self._source = own
        if data.think == "prefilled" and not self._render(PROBE[:1], opens=True).rstrip().endswith(THINK):
            self._source = own.removesuffix("\n") + PREFILL
        # What the folder that is trained in must hold to be asked in the same way; None: what it has.
        self.source = None if data.template == "chat" and self._source == own else self._source
        self.end, self.end_token = self._end()
        self.identity = f"{self._source}\n{self._renderer.special_tokens_map}\n{self._system}\n{self.end_token}"

    def prompt(self, question: str, place: str) -> str:
        """The text that the model is shown, up to where its turn begins.

        Raises:
            ValueError: the question holds a marker, or the template refuses it or does not write it as it is.
        """
        return self.conversation([{"role": "user", "content": question}], place)

    def conversation(self, messages: list[Message], place: str) -> str:
        """The same behind the turns before; the last message is the user's. Errors as of `prompt`."""
        _refuse(self.marker(messages), place)
        return self._prompt(self._with_system(messages), place)

    def history(self, messages: list[Message], place: str) -> str:
        """A conversation that ends with the user, up to where the next turn begins.

        Raises:
            ValueError: the template refuses it or does not write it as it is.
        """
        return self._prompt(self._with_system(messages), place)

    def marker(self, messages: list[Message]) -> str:
        """A token of the template, or a special one, that the texts hold; "" if there is none.

        It would end a turn, or begin one, inside a text. The assistant may write those that are not special, such as
        `<think>`.
        """
        messages = self._with_system(messages)
        asked = self._markers.first(m["content"] for m in messages if m["role"] != "assistant")
        return asked or self._special.first(m["content"] for m in messages if m["role"] == "assistant")

    def text(self, messages: list[Message], place: str) -> Text:
        """The last message of a conversation, the assistant's, as a text to train on behind what precedes it.

        Args:
            messages: without a marker.
            place:    of the row, for messages.

        Raises:
            ValueError: the template refuses the conversation; does not write all that is in the last message, such as
                its thoughts; begins the turn in another way than its generation prompt; or ends it without its token.
        """
        messages = self._with_system(messages)
        prompt, whole = self._prompt(messages[:-1], place), self._checked(messages, place, opens=False)
        opened = prompt.rstrip().endswith(THINK)
        head = prompt[: prompt.rindex(THINK)] if opened else prompt
        if not whole.startswith(head):
            raise ValueError(
                f"{place}: the template '{self.template}' begins the turn with {_difference(head, whole)}, and its "
                f"generation prompt with {head[-40:]!r}; choose data.template r1 or plain"
            )
        written, end, rest = whole[len(head) :].partition(self.end)
        if not end:
            raise ValueError(f"{place}: the turn ends with {rest or written[-40:]!r}, required {self.end!r}")
        if lost := _lost(messages[-1]["content"], written):
            raise ValueError(
                f"{place}: the template '{self.template}' does not write all of the answer: {lost!r:.60} is not in the "
                f"rendered turn {written!r:.60}; choose data.template r1 or plain"
            )
        if opened:
            if not written.lstrip().startswith(THINK):
                raise ValueError(
                    f"{place}: the prompt ends in {THINK}, and the answer has no thoughts, required are some; or a "
                    "template that does not open them"
                )
            written = written.lstrip().removeprefix(THINK).lstrip("\n")
        return Text(prompt, written, place)

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered prompts: the template has written all of them, BOS too."""
        return self.encode_completions(texts)

    def encode_completions(self, texts: list[str]) -> list[list[int]]:
        """Token ids of completions, without the end token."""
        return [encoding.ids for encoding in self.tokenizer.encode_continuations(texts)]

    def _with_system(self, messages: list[Message]) -> list[Message]:
        if self._system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self._system}, *messages]

    def _prompt(self, messages: list[Message], place: str) -> str:
        prompt = self._checked(messages, place, opens=True)
        for message in messages:
            if message["role"] != "assistant" and message["content"].strip() not in prompt:
                raise ValueError(
                    f"{place}: the template '{self.template}' does not write the {message['role']}'s message "
                    f"{message['content']!r:.60} as it is"
                )
        return prompt

    def _checked(self, messages: list[Message], place: str, *, opens: bool) -> str:
        try:
            return self._render(messages, opens=opens)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{place}: the template '{self.template}' refuses the conversation: {error}") from error

    def _render(self, messages: list[Message], *, opens: bool) -> str:
        source = FIXED_DATE + self._source if "strftime_now" in self._source else self._source
        text = self._renderer.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=opens, tokenize=False, date_string=DATE
        )
        assert isinstance(text, str)  # of one conversation, not tokenized
        return text

    def _end(self) -> tuple[str, int]:
        """The token behind the assistant's text: what it is called and its id."""
        messages = self._with_system(PROBE)
        self._prompt(messages[:-1], "data.template")
        _, found, tail = self._checked(messages, "data.template", opens=False).rpartition(PROBE[-1]["content"])
        if not found:
            raise ValueError(f"data.template: '{self.template}' does not write the assistant's text as it is")
        ends = [text for text in self.tokenizer.added_tokens if text.strip() and tail.lstrip().startswith(text)]
        index = self.tokenizer.token_to_id(max(ends, key=len)) if ends else None
        if index is None:
            raise ValueError(
                f"data.template: after the assistant's text the template '{self.template}' writes {tail!r:.60}, "
                "required is an added token of the tokenizer that ends the turn"
            )
        return max(ends, key=len), index


PromptFormat = QuestionFormat | ChatFormat


def make_format(folder: Path, tokenizer: PromptTokenizer, data: Data) -> PromptFormat:
    """How the configuration wants questions and conversations to be written.

    Raises:
        ValueError: the folder has no end token or no such template, or the template cannot be used.
    """
    if data.template in CHAT_TEMPLATES:
        return ChatFormat(folder, tokenizer, data)
    return QuestionFormat(folder, tokenizer, data.template)


def render(question: str, template: Template) -> str:
    """A question in Table 1 (`r1_zero`), in Table 1 with tags of steps (`r1_zero_steps`), or as it is (`none`)."""
    table = {"r1_zero": R1_ZERO_TEMPLATE, "r1_zero_steps": R1_ZERO_STEPS_TEMPLATE}.get(template, "{question}")
    return table.format(question=question)


def _refuse(marker: str, place: str) -> None:
    if marker:
        raise ValueError(f"{place}: the question holds {marker}, a token of the template or a special one; rewrite it")


class _Markers:
    """Tokens that are looked for in texts, as they are and as the tokenizer normalizes them."""

    def __init__(self, tokens: list[str], tokenizer: PromptTokenizer) -> None:
        longest_first = sorted(set(tokens) - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._normalize = tokenizer.normalize

    def first(self, texts: Any) -> str:
        """The first one in any of the texts, or ""."""
        if self._pattern is None:
            return ""
        for text in texts:
            if found := self._pattern.search(text) or self._pattern.search(self._normalize(text)):
                return found[0]
        return ""


def _transformers_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def _own_template(folder: Path, renderer: PreTrainedTokenizerFast) -> str:
    try:
        return renderer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"data.template: {folder} has no chat template, required by 'chat'; choose r1, plain or r1_zero"
        ) from error


def _shipped(template: Template) -> str:
    return (Path(__file__).parent / "templates" / f"{template}.jinja").read_text(encoding="utf-8")


def _lost(content: str, written: str) -> str:
    """The first piece of a text, divided at its think tags, that a rendered turn does not have in its place; "".

    A template may set white space around thoughts and answer, and nothing else.
    """
    pieces = [piece.strip() for piece in re.split(r"(</?think>)", content) if piece.strip()]
    body, position = written.rstrip(), 0
    if not body.endswith(pieces[-1]):
        return pieces[-1]
    last = len(body) - len(pieces[-1])
    for piece in pieces[:-1]:
        found = body.find(piece, position, last)
        if found < 0:
            return piece
        position = found + len(piece)
    return ""


def _difference(head: str, whole: str) -> str:
    """Where a rendered conversation leaves the prompt."""
    at = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), len(whole))
    return repr(whole[at : at + 40])
