"""The kind of stage `pairs`: two answers to a question, judged several times in both orders (v2, section 3.1 and B.2).

Every reply is a line of judgements.jsonl under the digest of what was asked, so a stage that was killed asks only for
the others, and for those that the server refused. The texts of all answers are in memory.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import fmean
from typing import Any

from r1engine.config import ConfigError
from r1engine.config.pairs import PairsConfig
from r1engine.data.chat import Message
from r1engine.data.contamination import units
from r1engine.data.duplicates import rank
from r1engine.data.examples import Example, read_unit, units_of
from r1engine.observe.progress import Progress
from r1engine.observe.put import put_json
from r1engine.pipeline.curate_output import DroppedRow, write_dropped
from r1engine.pipeline.replies import NO_REPLY, KeptChat, Replies, prompt_text
from r1engine.rewards.servers.endpoint import ModelServersError
from r1engine.rewards.servers.preference import summary
from r1engine.rewards.thoughts import split_thoughts

CACHE = "judgements.jsonl"
POINTS = {"A>>B": 2, "A>B": 1, "A=B": 0, "B>A": -1, "B>>A": -2}
_VERDICT = re.compile(r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]")
_MARKER = re.compile(r"<\|(User Prompt|The (Start|End) of Assistant [AB]'s Answer)\|>")


@dataclass(frozen=True)
class CandidateAnswer:
    """An answer."""

    source: str
    prompt: list[Message]  # ends with the user
    answer: str  # whole
    shown: str  # what the judge sees of it
    domain: str


@dataclass(frozen=True)
class JudgedPair:
    """Two answers, and what the judge says of them."""

    first: CandidateAnswer
    second: CandidateAnswer
    order: list[bool]  # of each judgement: the first one is A
    judgements: list[int | None]  # -2 to 2, > 0: the first one is better; None: the reply has no verdict
    tokens: int = 0  # of all requests and replies, as the server counts
    lost: str = ""  # why the servers gave no reply

    @property
    def name(self) -> str:
        """Unlike that of any other pair."""
        return f"{self.first.source} | {self.second.source}"

    @property
    def verdicts(self) -> list[tuple[bool, int]]:
        """(the first one is A, points) of the judgements that are verdicts; none of a lost pair."""
        both = zip(self.order, self.judgements, strict=not self.lost)
        return [(is_a, points) for is_a, points in both if points is not None]

    @property
    def delta(self) -> float:
        """Mean of the judgements: how much better the first one is."""
        return fmean(points for _, points in self.verdicts) if self.verdicts else 0.0

    @property
    def sides(self) -> tuple[CandidateAnswer, CandidateAnswer]:
        """The chosen and the rejected answer."""
        return (self.first, self.second) if self.delta > 0 else (self.second, self.first)

    @property
    def words(self) -> tuple[int, int]:
        """Of what the judge saw of the chosen and of the rejected answer."""
        chosen, rejected = self.sides
        return len(units(chosen.shown)), len(units(rejected.shown))

    @property
    def is_turned_by_order(self) -> bool:
        """Whether the answer that is shown first wins in both orders, or the one that is shown second."""
        by_order: dict[bool, list[int]] = {True: [], False: []}
        for is_a, points in self.verdicts:
            by_order[is_a].append(points)
        return all(by_order.values()) and sum(by_order[True]) * sum(by_order[False]) < 0


def candidates_of(cfg: PairsConfig, dropped: list[DroppedRow]) -> dict[str, list[CandidateAnswer]]:
    """Prompt -> its different answers, in an order that depends on the seed and on each answer alone.

    Raises:
        ValueError: an input is damaged or holds no answers; it is named.
    """
    found: dict[str, dict[str, CandidateAnswer]] = defaultdict(dict)
    rows = (row for unit in units_of(cfg.candidates, None, 1) for row in read_unit(unit, {}))
    for row in sorted(rows, key=lambda row: (rank(cfg.seed, row.source), row.source)):
        answer = row.messages[-1]["content"]
        shown = summary(answer) if cfg.sees == "summary" else answer.strip()
        candidate = CandidateAnswer(row.source, row.messages[:-1], answer, shown, row.domain)
        of_prompt = found[json.dumps(candidate.prompt)]
        if reason := _unfit(row, shown) or ("same answer" if shown in of_prompt else ""):
            dropped.append(DroppedRow(row.source, reason, "", row.domain))
        else:
            of_prompt[shown] = candidate
    return {prompt: [*answers.values()] for prompt, answers in sorted(found.items())}


def _unfit(row: Example, shown: str) -> str:
    """Why an answer cannot be compared, or ""."""
    if row.finish == "length":
        return "truncated"
    if not shown:
        return "no summary"
    return "marker of the judge's prompt" if _MARKER.search(_asked(row.messages[:-1]) + shown) else ""


def _asked(prompt: list[Message]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def to_judge(cfg: PairsConfig, dropped: list[DroppedRow]) -> list[JudgedPair]:
    """The pairs, not judged yet.

    Raises:
        ValueError: an input is damaged, or no question has two different answers.
    """
    pairs: list[JudgedPair] = []
    for answers in candidates_of(cfg, dropped).values():
        taken = answers[: 2 * min(len(answers) // 2, cfg.pairs_per_question or len(answers))]
        dropped += [DroppedRow(alone.source, "no partner", "", alone.domain) for alone in answers[len(taken) :]]
        for first, second in zip(taken[::2], taken[1::2], strict=True):
            order = [True, False] * (cfg.judgements // 2)
            random.Random(f"{cfg.seed} {first.source} {second.source}").shuffle(order)
            pairs.append(JudgedPair(first, second, order, []))
    if not pairs:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in Counter(row.reason for row in dropped).items())
        raise ValueError(f"candidates: no question has two different answers ({reasons or 'no rows'})")
    return pairs


def judged(pair: JudgedPair, cfg: PairsConfig, judge: KeptChat) -> JudgedPair:
    """The pair with its judgements; `lost` if the servers do not reply."""
    judgements: list[int | None] = []
    tokens = 0
    for number, is_a in enumerate(pair.order):
        a, b = (pair.first, pair.second) if is_a else (pair.second, pair.first)
        text = _shown(_asked(a.prompt), a.shown, b.shown)
        messages = [
            {"role": "system", "content": prompt_text("arena_hard").rstrip()},
            {"role": "user", "content": text},
        ]
        try:
            found = judge.ask(messages, [cfg.seed, number, text], {"pair": pair.name})
        except ModelServersError as error:
            if not error.is_refusal:
                return replace(pair, lost=str(error))
            judgements.append(None)
            continue
        tokens += found["tokens"] or 0
        points = points_of(found["content"]) if found["finish"] != "length" else None
        judgements.append(points if is_a or points is None else -points)
    return replace(pair, judgements=judgements, tokens=tokens)


def _shown(question: str, a: str, b: str) -> str:
    answers = (
        f"<|The Start of Assistant {name}'s Answer|>\n{text}\n<|The End of Assistant {name}'s Answer|>"
        for name, text in (("A", a), ("B", b))
    )
    return "\n\n".join([f"<|User Prompt|>\n{question}", *answers])


def points_of(reply: str) -> int | None:
    """What a reply says of answer A, by its last verdict after its thoughts; None: it has none."""
    verdicts = _VERDICT.findall(split_thoughts(reply).rest)
    return POINTS[verdicts[-1]] if verdicts else None


def _all_judged(pairs: list[JudgedPair], cfg: PairsConfig, progress: Progress) -> Iterator[JudgedPair]:
    """
    Raises:
        RuntimeError: the judge is gone; what it has said is kept.
        ValueError: judgements.jsonl is broken.
    """
    assert cfg.judge is not None
    replies, silent = Replies(cfg.run_dir / CACHE), 0
    try:
        with ThreadPool(cfg.judge.parallel) as threads:
            one = partial(judged, cfg=cfg, judge=KeptChat(cfg.judge, replies))
            for pair in threads.imap(one, pairs):
                progress.advance()
                silent = silent + 1 if pair.lost else 0
                if silent >= min(NO_REPLY, len(pairs)):
                    raise RuntimeError(
                        f"pairs: {silent} pairs without a reply, the last: {pair.lost}; start it again later"
                    )
                yield pair
    finally:
        replies.close()


def left_out(pairs: list[JudgedPair], cfg: PairsConfig) -> dict[str, tuple[str, str]]:
    """Name of a pair that leaves -> reason and detail."""
    found: dict[str, tuple[str, str]] = {}
    for pair in pairs:
        if pair.lost:
            found[pair.name] = "no reply", pair.lost
        elif len(pair.verdicts) < cfg.min_judgements:
            found[pair.name] = "too few judgements", f"{len(pair.verdicts)} of {cfg.judgements}"
        elif abs(pair.delta) <= cfg.min_delta:
            found[pair.name] = "not clearly better", f"delta {pair.delta:+.2f}"
    left = sorted((pair for pair in pairs if pair.name not in found), key=lambda pair: rank(cfg.seed, pair.name))
    for pair in unbalanced(left, cfg.length_balance):
        found[pair.name] = "length balance", "{} words chosen, {} rejected".format(*pair.words)
    return found


def unbalanced(pairs: list[JudgedPair], bound: float) -> list[JudgedPair]:
    """The pairs that leave so that the chosen answers are at most `bound` longer, or shorter, than the rejected ones:
    of those that lean to the longer side the ones with the largest difference."""
    words = [pair.words for pair in pairs]
    chosen, rejected = sum(c for c, _ in words), sum(r for _, r in words)
    sign = 1 if chosen > rejected else -1
    leaving = []
    for i in sorted(range(len(pairs)), key=lambda i: sign * (words[i][1] - words[i][0])):
        if sign * (chosen - rejected) <= bound * rejected:
            break
        chosen, rejected = chosen - words[i][0], rejected - words[i][1]
        leaving.append(pairs[i])
    return leaving


def make_pairs(cfg: PairsConfig) -> dict[str, Any]:
    """Judge the pairs and write what stays.

    Returns:
        counts.json.

    Raises:
        ValueError: an input is damaged, or no pair is left.
        RuntimeError: the judge is gone; the stage goes on from judgements.jsonl.
    """
    dropped: list[DroppedRow] = []
    with Progress(f"pairs {cfg.run_dir.name}", enabled=True) as progress:
        pairs = to_judge(cfg, dropped)
        progress.phase("judge", len(pairs))
        done = [*_all_judged(pairs, cfg, progress)]
    leaving = left_out(done, cfg)
    dropped += [DroppedRow(pair.name, *leaving[pair.name], pair.first.domain) for pair in done if pair.name in leaving]
    kept = [pair for pair in done if pair.name not in leaving]
    counts = _counts(done, kept, dropped)
    if not kept:
        raise ValueError(f"{cfg.run_dir.name}: 0 of {len(done):,} pairs are left ({_listed(counts['dropped'])})")
    kept.sort(key=lambda pair: (rank(cfg.seed, pair.name), pair.name))
    _write(kept, cfg.run_dir / ".pairs.parquet")
    write_dropped(cfg.run_dir / "dropped.parquet", dropped)
    put_json(cfg.run_dir / "counts.json", counts)
    os.replace(cfg.run_dir / ".pairs.parquet", cfg.run_dir / "pairs.parquet")
    return counts


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in reasons.items())


def _counts(done: list[JudgedPair], kept: list[JudgedPair], dropped: list[DroppedRow]) -> dict[str, Any]:
    judgements = [points for pair in done for points in pair.judgements]
    words = [pair.words for pair in kept]
    as_a = [points if is_a else -points for pair in done for is_a, points in pair.verdicts]
    return {
        "kept": len(kept),
        "pairs": len(done),
        "judgements": len(judgements),
        "without_verdict": judgements.count(None),
        "turned_by_order": fmean(pair.is_turned_by_order for pair in done),
        "mean_for_a": fmean(as_a) if as_a else None,  # 0: the judge does not mind which answer is shown first
        "chosen_words": fmean(chosen for chosen, _ in words) if words else None,
        "rejected_words": fmean(rejected for _, rejected in words) if words else None,
        "tokens": sum(pair.tokens for pair in done),
        "dropped": dict(sorted(Counter(row.reason for row in dropped).items())),
    }


def _write(pairs: list[JudgedPair], path: Path) -> None:
    """A file that `stage: reward_model` reads; its judgements are of the chosen answer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for pair in pairs:
        chosen, rejected = pair.sides
        sign = 1 if pair.delta > 0 else -1
        rows.append(
            {
                "prompt": chosen.prompt,
                "chosen": chosen.answer,
                "rejected": rejected.answer,
                "delta": abs(pair.delta),
                "judgements": [sign * points for _, points in pair.verdicts],
                "chosen_is_a": [is_a == (sign > 0) for is_a, _ in pair.verdicts],
                "chosen_words": pair.words[0],
                "rejected_words": pair.words[1],
                "domain": chosen.domain,
                "source": f"{chosen.source} > {rejected.source}",
            }
        )
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns: list[tuple[str, Any]] = [
        *(("prompt", pa.list_(message)), ("chosen", pa.string()), ("rejected", pa.string()), ("delta", pa.float64())),
        *(("judgements", pa.list_(pa.int8())), ("chosen_is_a", pa.list_(pa.bool_()))),
        *(("chosen_words", pa.int32()), ("rejected_words", pa.int32()), ("domain", pa.string())),
        ("source", pa.string()),
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), path, compression="zstd")


def check(cfg: PairsConfig) -> list[str]:
    """What a dry run can say: every row is read. Returns notes.

    Raises:
        ConfigError: an input cannot be used.
    """
    dropped: list[DroppedRow] = []
    try:
        pairs = to_judge(cfg, dropped)
    except (ValueError, OSError) as error:
        raise ConfigError.of(error) from error
    return [f"{len(pairs):,} pairs, {len(pairs) * cfg.judgements:,} judgements; {len(dropped):,} answers in no pair"]
