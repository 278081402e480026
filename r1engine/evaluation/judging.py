"""Asks a language model what a benchmark's own prompt for a judge asks. No torch.

Every batch holds prompts for answers that cannot be right. A judge that takes one, as one does that always says yes,
has its whole batch undecided; so is what it does not reply to, or replies nonsense to.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool  # its threads are daemons: no silent server delays the end of the program

from r1engine.evaluation.benchmark import Judged, Marked
from r1engine.rewards.servers.endpoint import ModelServersError
from r1engine.rewards.servers.judge import GenerativeJudge


def ask_judge(judge: GenerativeJudge, asked: Sequence[Judged]) -> list[Marked]:
    """What the judge says to each prompt, in their order.

    Args:
        judge: its server, the requests at once, the prompts of a batch and the canaries among them.
        asked: the prompts.
    """
    found: list[Marked] = []
    with ThreadPool(judge.parallel) as threads:
        for start in range(0, len(asked), judge.batch_size):
            batch = asked[start : start + judge.batch_size]
            canaries = _canaries(batch, judge.canaries)
            marks = threads.map(lambda one: _mark(judge, one), [*batch, *canaries], chunksize=1)
            found += _believed(marks[: len(batch)], marks[len(batch) :])
    return found


def _canaries(batch: Sequence[Judged], number: int) -> list[Judged]:
    """The first canary of the first question, the second of the second, and so on."""
    with_some = [one for one in batch if one.canaries]
    pairs = itertools.islice(enumerate(itertools.cycle(with_some)), number)
    return [Judged(one.canaries[place % len(one.canaries)], one.conclude) for place, one in pairs]


def _believed(marks: list[Marked], canaries: list[Marked]) -> list[Marked]:
    if all(mark.verdict != "right" for mark in canaries):
        return marks
    told = "the judge takes an answer that cannot be right"
    return [
        mark if mark.verdict == "undecided" else replace(mark, verdict="undecided", score=None, reason=told, parts={})
        for mark in marks
    ]


def _mark(judge: GenerativeJudge, one: Judged) -> Marked:
    """The conclusion from a reply; nonsense is asked about once more."""
    body = {
        "model": judge.model,
        "messages": [{"role": "user", "content": one.prompt}],
        "temperature": 0,
        "max_tokens": judge.max_tokens,
    }
    found = Marked("undecided", None, None, "the judge was not asked")
    for _ in range(2):
        try:
            reply = judge.endpoint.post("/chat/completions", body)
            content = reply["choices"][0]["message"]["content"]
        except ModelServersError as error:
            return Marked("undecided", None, None, f"no reply from {error}")
        except (KeyError, IndexError, TypeError):
            content = None
        if isinstance(content, str):
            found = one.conclude(content)
        else:
            found = Marked("undecided", None, None, "the reply has no choices[0].message.content")
        if found.verdict != "undecided":
            break
    return found
