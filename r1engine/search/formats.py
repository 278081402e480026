"""How process reward models want question and steps written: own ones as drawn, released ones as their makers do.

Nothing is searched for in a text: each step is tokenized by itself, so that its mark stands where it was put.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from r1engine.config.stage import Data
from r1engine.data.chat import ChatFormat, Message
from r1engine.hf.architecture import Architecture
from r1engine.hf.files import read_json
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer, stop_tokens
from r1engine.search.scored_folder import read_scored_folder
from r1engine.search.tree import StepPath

FormatName = Literal["own", "qwen_math_prm", "skywork", "math_shepherd", "rlhflow"]
# What the labels of released models were: of rollouts, or of people and judges. Skywork's makers do not say.
MEANS = {"qwen_math_prm": "correctness", "skywork": "", "math_shepherd": "value", "rlhflow": "value"}
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


class StepChunk(NamedTuple):
    """A step as a scorer runs it."""

    tokens: tuple[int, ...]
    read: int  # index of the token at which its score is read


class PathWriter(Protocol):
    """Writes paths for a model."""

    pair: tuple[int, int] | None  # tokens of "good" and "bad" of a language model

    def head(self, path: StepPath) -> tuple[int, ...]:
        """Tokens before the first step."""

    def chunks(self, path: StepPath) -> list[StepChunk]:
        """Each step. It depends on no later one."""


class OwnWriter:
    """Tokens as they were drawn; the score is read at a step's last one."""

    def __init__(self, folder: Path) -> None:
        self.pair: tuple[int, int] | None = None
        self._stop = stop_tokens(folder, load_tokenizer(folder))

    def head(self, path: StepPath) -> tuple[int, ...]:
        """The prompt."""
        return tuple(path.prompt.tokens)

    def chunks(self, path: StepPath) -> list[StepChunk]:
        """The steps, without the token that ends the completion; such a step alone has no tokens."""
        kept = [step[:-1] if step and step[-1] in self._stop else step for step in path.steps]
        return [StepChunk(step, len(step) - 1) for step in kept]


class MarkWriter:
    """A text before the steps, and behind each step a mark, at which the score is read."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        policy: PromptTokenizer,
        form: tuple[str, str],
        mark: tuple[str, int],
        pair: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            tokenizer: of the model.
            policy:    what the steps are tokens of.
            form:      text before and behind the question.
            mark:      text between a step and its mark, and the mark's token.
            pair:      see `PathWriter`.
        """
        self._tokenizer, self._policy, self._form, self._mark = tokenizer, policy, form, mark
        self.pair = pair

    def head(self, path: StepPath) -> tuple[int, ...]:
        """The question in its form."""
        before, behind = self._form
        return tuple(self._tokenizer.encode(before + path.prompt.question.text + behind).ids)

    def chunks(self, path: StepPath) -> list[StepChunk]:
        """Each step and its mark."""
        between, mark = self._mark
        texts = [text + between for text in texts_of(path, self._policy)]
        found = self._tokenizer.encode_continuations(texts)
        return [StepChunk((*one.ids, mark), len(one.ids)) for one in found]


class TurnWriter:
    """RLHFlow: each step is a user's turn, and the model answers + or -, which is read where the answer begins."""

    def __init__(self, folder: Path, policy: PromptTokenizer) -> None:
        """
        Raises:
            ValueError: the folder has no chat template, or one token for both answers.
        """
        self._tokenizer, self._policy = load_tokenizer(folder), policy
        try:
            self._form = ChatFormat(folder, self._tokenizer, Data(template="chat"))
        except ValueError as error:
            raise ValueError(f"scorer.format: found rlhflow, which is asked by a chat template: {error}") from error
        self.pair: tuple[int, int] | None = _answers(self._tokenizer, folder)

    def head(self, path: StepPath) -> tuple[int, ...]:
        """Nothing: the question stands in the first step's turn."""
        return ()

    def chunks(self, path: StepPath) -> list[StepChunk]:
        """Each turn, with the answer to the one before."""
        texts = texts_of(path, self._policy)
        texts[0] = f"{path.prompt.question.text} {texts[0]}"
        done: list[int] = []
        found = []
        for count in range(1, len(texts) + 1):
            turns = [("user", texts[0])]
            for text in texts[1:count]:
                turns += [("assistant", "+"), ("user", text)]
            messages: list[Message] = [{"role": role, "content": text} for role, text in turns]
            written = self._form.history(messages, "scorer")
            tokens = self._form.encode_prompts([written])[0]
            if tokens[: len(done)] != done:
                raise ValueError(f"scorer: the chat template writes step {count - 1} otherwise before step {count}")
            found.append(StepChunk(tuple(tokens[len(done) :]), len(tokens) - len(done) - 1))
            done = tokens
        return found


def texts_of(path: StepPath, policy: PromptTokenizer) -> list[str]:
    """The steps' texts, without blanks and marks of blanks around them."""
    return [text.strip() for text in policy.decode_batch([list(step) for step in path.steps])]


def make_writer(name: FormatName, folder: Path, policy: PromptTokenizer) -> PathWriter:
    """How the model of a folder is asked.

    Raises:
        ValueError: the folder's tokenizer lacks what the format needs.
    """
    if name == "own":
        return OwnWriter(folder)
    tokenizer = load_tokenizer(folder)
    if name == "qwen_math_prm":
        mark = tokenizer.token_to_id("<extra_0>")
        if mark is None:
            raise ValueError(f"{folder}: found no token <extra_0>, required by scorer.format qwen_math_prm")
        before = f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\n"
        form = before, "<|im_end|>\n<|im_start|>assistant\n"
        return MarkWriter(tokenizer, policy, form, ("", mark))
    if name == "skywork":
        settings = read_json(folder / "tokenizer_config.json")
        token = settings.get("bos_token") or ""
        bos = token.get("content", "") if isinstance(token, dict) else token
        return MarkWriter(tokenizer, policy, (bos, "\n"), ("", _last(tokenizer, "\n")))
    if name == "math_shepherd":
        mark = _last(tokenizer, " \u043a\u0438")
        return MarkWriter(tokenizer, policy, ("", " "), ("", mark), _answers(tokenizer, folder))
    return TurnWriter(folder, policy)


def format_of_folder(folder: Path) -> FormatName:
    """By what is in the folder: own ones say so, Qwen's have their mark.

    Raises:
        ValueError: it does not tell.
    """
    if read_scored_folder(folder) is not None:
        return "own"
    name = (read_json(folder / "config.json").get("architectures") or [""])[0]
    if name.endswith("ForProcessRewardModel"):
        return "qwen_math_prm"
    if name.endswith("ForCausalLM"):
        raise ValueError(
            f"scorer.path: {folder} is {name} without good and bad tokens; required a score head, or scorer.format"
        )
    raise ValueError(f"scorer.path: {folder} does not say how it is asked; required scorer.format")


def _answers(tokenizer: PromptTokenizer, folder: Path) -> tuple[int, int]:
    """The tokens of + and -.

    Raises:
        ValueError: they are one.
    """
    good, bad = _last(tokenizer, "+"), _last(tokenizer, "-")
    if good == bad:
        raise ValueError(f"{folder}: found token {good} for both + and -, required one for each")
    return good, bad


def _last(tokenizer: PromptTokenizer, text: str) -> int:
    return tokenizer.encode_continuations([text])[0].ids[-1]


def check_tokens(tokens: Sequence[int], arch: Architecture, folder: Path, most: int) -> None:
    """Looks at a question with its steps before the model of a folder runs it.

    Raises:
        ValueError: there are more than `most` tokens, or one that the model has not.
    """
    if len(tokens) > most:
        raise ValueError(f"scorer: found a solution of {len(tokens)} tokens, required at most {most}: {folder}")
    if tokens and max(tokens) >= arch.vocab_size:
        raise ValueError(f"scorer: found token {max(tokens)}, required below {arch.vocab_size}: {folder}")


def known_means(name: FormatName, folder: Path) -> str:
    """What the scores mean: correctness, value, or "" where nobody says."""
    about = read_scored_folder(folder)
    return about.means if about is not None else MEANS.get(name, "")
