"""Scores of steps over unmodified SGLang servers, which have a model with a score, or a language model of two answers.

What a server can do follows from how it was started:

- With its radix cache a score is asked for one step at a time, of all tokens up to there. The server keeps the keys and
  values of what it has run, so a path that grew by a step costs the step.
- With --disable-radix-cache --chunked-prefill-size -1 all steps of a path are one request, and all tokens run again.
- Of a language model the log-probabilities of its two answers are asked for, of all steps in one request.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

from r1engine.config.process import StepScorerSection
from r1engine.hf.score_folder import read_trunk
from r1engine.hf.tokenizer import PromptTokenizer
from r1engine.rewards.servers.endpoint import ModelServers, ModelServersError
from r1engine.search.formats import FormatName, check_tokens, known_means, make_writer
from r1engine.search.tree import StepPath

Way = Literal["one by one", "at once", "two answers"]
EQUAL = 1e-3  # probabilities of the same text, asked for in two ways, differ by less
TRIAL = (5, 6, 7, 8, 9, 10)  # tokens that every tokenizer has


class _Ask(NamedTuple):
    """A path as a server gets it."""

    question: int  # its number: the same server has its keys and values
    tokens: list[int]
    at: list[int]  # indices of the tokens at which scores are read; a step without tokens repeats one


@dataclass(frozen=True)
class _Server:
    """A server and what it can do."""

    endpoint: ModelServers
    way: Way
    what: str  # architecture and version, for messages


class ServerScorer:
    """A process reward model behind servers.

    Attributes:
        labels:     what its scores estimate: "correctness" of a step, "value" of a prefix, "": it does not say.
        tokens_run: tokens that the servers have computed so far, without those that they had kept; None: they do not
            say (0.5.23 keeps them for a score, too, and does not count them in its reply).
    """

    def __init__(self, folder: Path, name: FormatName, policy: PromptTokenizer, cfg: StepScorerSection) -> None:
        """Looks at every server, and tries whether it reads scores where they are asked for.

        Args:
            folder: of the model; its weights are not read.
            name:   how it is asked.
            policy: what the steps are tokens of.
            cfg:    the servers.

        Raises:
            ValueError: a server has another kind of model, or one that ignores positions.
            RuntimeError: a server does not answer.
        """
        self._arch, self._folder, self._cfg = read_trunk(folder), folder, cfg
        self._writer = make_writer(name, folder, policy)
        self.labels = known_means(name, folder)
        self.tokens_run: int | None = 0
        self._counting = Lock()
        self._servers = [self._open(url) for url in cfg.urls]

    def score(self, paths: Sequence[StepPath]) -> list[list[float]]:
        """Probabilities of `steps[scored:]` of each path. A step without tokens of its own is worth what is before it.

        Raises:
            RuntimeError: no server answers.
            ValueError: a path is longer than the model's context, has tokens that the model has not, or a server gives
                other scores than were asked for.
        """
        asks = [self._ask_of(path) for path in paths]
        if not asks:
            return []
        with ThreadPool(min(self._cfg.parallel, len(asks))) as threads:
            return threads.map(self._answered, asks, chunksize=1)

    def clear(self) -> None:
        """Let the servers forget all prefixes.

        Raises:
            RuntimeError: one does not answer.
        """
        from r1engine.web import NoReply, request  # aiohttp is slow to import

        for url in self._cfg.urls:
            key = os.environ.get(self._cfg.key_variable, "")
            try:
                request("POST", f"{url.rstrip('/')}/flush_cache", {}, key=key, seconds=self._cfg.timeout_seconds)
            except NoReply as error:
                raise RuntimeError(f"scorer {url}/flush_cache: {error}") from error

    def _ask_of(self, path: StepPath) -> _Ask:
        """The tokens of a path up to the last score, and the places of the scores that are wanted."""
        head, chunks = self._writer.head(path), self._writer.chunks(path)
        tokens, at = list(head), list[int]()
        for chunk in chunks:
            at.append(len(tokens) + chunk.read if chunk.tokens else at[-1] if at else len(tokens) - 1)
            tokens += chunk.tokens
        check_tokens(tokens, self._arch, self._folder, self._arch.max_positions - 1)  # a server keeps one for a draw
        wanted = at[path.scored :]
        return _Ask(path.prompt.id, tokens[: wanted[-1] + 1] if wanted else [], wanted)

    # ------------------------------------------------------------------ servers

    def _open(self, url: str) -> _Server:
        cfg = self._cfg
        endpoint = ModelServers(
            url, timeout_seconds=cfg.timeout_seconds, tries=cfg.tries, key_variable=cfg.key_variable
        )
        try:
            model, settings = endpoint.get("/model_info"), endpoint.get("/server_info")
        except ModelServersError as error:
            raise RuntimeError(f"scorer {error}") from error
        name = (model.get("architectures") or ["a model without a name"])[0]
        what = f"{name} (sglang {settings.get('version', 'of no version')})"
        if bool(model.get("is_generation")) != (self._writer.pair is not None):
            required = "a language model" if self._writer.pair is not None else "a model with a score: --is-embedding"
            raise ValueError(f"scorer {url}: found {what}, required {required}")
        server = _Server(endpoint, self._way_of(settings), what)
        if server.way == "at once":
            self._try(server)
        return server

    def _way_of(self, settings: dict[str, Any]) -> Way:
        if self._writer.pair is not None:
            return "two answers"
        is_whole = settings.get("disable_radix_cache") is True and settings.get("chunked_prefill_size") == -1
        return "at once" if is_whole else "one by one"

    def _try(self, server: _Server) -> None:
        """Refuse a server that ignores positions: its scores would all be the last one.

        Raises:
            ValueError: it does.
        """
        trial = _Ask(0, list(TRIAL), [1, len(TRIAL) - 1])
        try:
            together, alone = self._ask(server, trial), self._one_by_one(server, trial)
        except ModelServersError as error:
            raise RuntimeError(f"scorer {error}") from error
        if any(abs(a - b) > EQUAL for a, b in zip(together, alone, strict=True)):
            raise ValueError(
                f"scorer {server.endpoint.urls}: {server.what} gives {together} for two steps at once, and {alone} one "
                "by one; required is the same: start it with its radix cache on, then they are asked for one by one"
            )

    def _answered(self, ask: _Ask) -> list[float]:
        """From the question's own server, or the next one that answers."""
        if not ask.at:
            return []
        once, problem = ask._replace(at=[*dict.fromkeys(ask.at)]), ""
        for turn in range(len(self._servers)):
            server = self._servers[(ask.question + turn) % len(self._servers)]
            try:
                found = dict(zip(once.at, self._ask(server, once), strict=True))
                return [found[index] for index in ask.at]
            except ModelServersError as error:
                problem = str(error)
        raise RuntimeError(f"scorer {problem}")

    def _ask(self, server: _Server, ask: _Ask) -> list[float]:
        if server.way == "two answers":
            return self._of_two_answers(server, ask)
        return self._at_once(server, ask) if server.way == "at once" else self._one_by_one(server, ask)

    def _one_by_one(self, server: _Server, ask: _Ask) -> list[float]:
        found = []
        for index in ask.at:
            reply = self._post(server, "/classify", {"input_ids": ask.tokens[: index + 1]})
            found.append(_probability(reply.get("embedding"), server))
        return found

    def _at_once(self, server: _Server, ask: _Ask) -> list[float]:
        reply = self._post(server, "/classify", {"input_ids": ask.tokens, "token_indices_to_pool": ask.at})
        found = reply.get("embedding")
        rows = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
        if len(rows) != len(ask.at):
            raise ValueError(
                f"scorer {server.endpoint.urls}: {len(rows)} score for {len(ask.at)} steps from {server.what}, which "
                "ignores positions; required: start it with its radix cache on, then they are asked for one by one"
            )
        return [_probability(row, server) for row in rows]

    def _of_two_answers(self, server: _Server, ask: _Ask) -> list[float]:
        """P(good) of the two: what the model would write behind each place."""
        assert self._writer.pair is not None
        body = {
            "input_ids": [*ask.tokens, ask.tokens[-1]],  # entry i is of token i after those before it
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": ask.at[0],
            "token_ids_logprob": [*self._writer.pair],
        }
        found = self._post(server, "/generate", body)["meta_info"].get("input_token_ids_logprobs") or []
        if len(found) != len(ask.tokens) + 1 - ask.at[0]:
            raise ValueError(
                f"scorer {server.endpoint.urls}: {len(found)} log-probabilities from {server.what}, required "
                f"{len(ask.tokens) + 1 - ask.at[0]}"
            )
        good, bad = self._writer.pair
        rows = [{token: logp for logp, token, *_ in found[index + 1 - ask.at[0]] or []} for index in ask.at]
        return [_probability([row.get(bad), row.get(good)], server) for row in rows]

    def _post(self, server: _Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = server.endpoint.post(path, body)
        if not isinstance(reply, dict) or not isinstance(reply.get("meta_info"), dict):
            raise ValueError(f"scorer {server.endpoint.urls}: found {reply!r:.80}, required a reply of {path}")
        info = reply["meta_info"]
        cached = 0 if server.way == "at once" else info.get("cached_tokens")
        with self._counting:
            if self.tokens_run is not None:
                self.tokens_run = None if cached is None else self.tokens_run + len(body["input_ids"]) - cached
        return reply


def _probability(logits: Any, server: _Server) -> float:
    """Sigmoid of one label; of two the softmax's second, "right" or "good".

    Raises:
        ValueError: it is not one or two finite numbers.
    """
    if isinstance(logits, list) and len(logits) == 1 and isinstance(logits[0], list):
        [logits] = logits
    is_known = isinstance(logits, list) and len(logits) in (1, 2) and all(isinstance(z, float | int) for z in logits)
    if not is_known or not all(map(math.isfinite, logits)):
        raise ValueError(
            f"scorer {server.endpoint.urls}: found {logits!r:.60} from {server.what}, required 1 or 2 finite numbers"
        )
    z = logits[0] if len(logits) == 1 else logits[1] - logits[0]
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
