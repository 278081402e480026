"""A completion stays with the rank that drew it: the rows of each rank, and what it receives and holds for them."""

import math
import os
import socket
import struct
from dataclasses import fields, replace
from typing import NamedTuple

import pytest
import torch
from ranks import on_ranks

from r1engine.batch import Completion, Outline, PackedBatch, Prompt, RowShape, Sample, Sequence, pack, to_sequences
from r1engine.data.question import Question
from r1engine.ranks import World, start, stop
from r1engine.rewards import Score
from r1engine.stages.homes import everyones_graded, of_each, texts_of_each
from r1engine.stages.rows import own_rows

GROUP = 4
OUTLINE = 100  # bytes of the outline and the score of a completion, at most
HEADERS = 500  # bytes that gloo adds to the three arrays of a sequence, at most


def graded(number: int, tokens: int, routing: tuple[int, int] | None) -> list[tuple[Completion, Score]]:
    """A question's completions of up to so many tokens, with the experts (layers, k) of each token."""
    drawn = torch.Generator().manual_seed(number)
    prompt, found = Prompt(number, [5, number % 7, 9], "", Question("")), []
    for sample in range(GROUP):
        count = tokens - int(torch.randint(tokens // 2, (), generator=drawn))
        ids = torch.randint(150_000, (count,), generator=drawn).tolist()
        logp = torch.rand(count, generator=drawn, dtype=torch.float64).neg().tolist()
        experts = None
        if routing and sample:  # of one none is known
            experts = torch.randint(256, (3 + count - 1, *routing), generator=drawn, dtype=torch.int16)
        made = Completion(prompt, sample, ids, logp, "word " * count, sample == 1, ((number % 3, count),), experts)
        found.append((made, Score("right", {"accuracy": 1.0, "format": float(sample)}, "found 3, required 3", 0.25)))
    return found


def rows_by_shards(pairs: list, shards: int, row_tokens: int, rank: int | None = None):
    samples = [Sample(completion, float(i % 5) - 2) for i, (completion, _) in enumerate(pairs)]
    return pack(to_sequences(samples, version=2, rank=rank), RowShape(row_tokens, shards=shards, multiple=4))


def received() -> int:
    """Bytes that this process has received over its TCP connections, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:
            continue  # no connection
        total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received
    return total


def kilobytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def size_of(text: Sequence) -> int:
    """Bytes of a sequence that another rank has: tokens and log-probabilities of 4 bytes, experts of 2."""
    return 4 * len(text.tokens) + 4 * (len(text.tokens) - text.num_prompt) + 2 * math.prod(text.tokens.experts or (0,))


class Job(NamedTuple):
    """Questions, with completions of up to so many tokens, in rows of so many; how many ranks share a shard."""

    questions: int
    tokens: int
    row_tokens: int
    of_shard: int = 1
    routing: tuple[int, int] | None = None


def travel(jobs: list[Job]) -> list[dict[str, int]]:
    """Each rank draws its questions and makes the rows of its shard; what it took."""
    world = start()
    found = [travel_once(world, *job) for job in jobs]
    stop()
    return found


def travel_once(world: World, questions: int, tokens: int, row_tokens: int, of_shard: int, routing) -> dict[str, int]:
    world = replace(world, dp_rank=world.rank // of_shard, dp_size=world.size // of_shard)
    own = [graded(number, tokens, routing) for number in range(world.rank, questions, world.size)]
    prompts = {number: Prompt(number, [5, number % 7, 9], "", Question("")) for number in range(questions)}
    world.everyones(None)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again
    before, held = received(), kilobytes("VmRSS")
    pairs = everyones_graded(own, prompts.__getitem__, world)
    shards = rows_by_shards(pairs, world.dp_size, row_tokens, world.rank)
    rows = own_rows(shards, world)
    found = {"bytes": received() - before, "peak": (kilobytes("VmHWM") - held) * 1024}
    lacking = [size_of(text) for row in shards.shards[world.dp_rank] for text in row if text.home != world.rank]
    experts = sum(row.experts.nbytes for row in rows if row.experts is not None)
    found |= {"lacking": sum(lacking), "sequences": len(lacking), "experts": experts}
    if tokens < 100:
        whole = [pair for number in range(questions) for pair in graded(number, tokens, routing)]
        assert [score for _, score in pairs] == [score for _, score in whole]
        facts = ("prompt", "sample", "num_tokens", "truncated", "versions")
        for (one, _), (other, _) in zip(pairs, whole, strict=True):
            assert [getattr(one, name) for name in facts] == [getattr(other, name) for name in facts]
        wanted = rows_by_shards(whole, world.dp_size, row_tokens)[world.dp_rank]
        assert len(rows) == len(wanted) > 1
        assert all(same(one, other) for one, other in zip(rows, wanted, strict=True))
    return found


def same(one: PackedBatch, other: PackedBatch) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(PackedBatch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_rows_are_those_of_a_rank_that_has_everything():
    on_ranks(4, travel, [Job(6, 30, 128, of_shard, routing) for of_shard in (1, 2, 4) for routing in (None, (3, 2))])


def test_a_rank_receives_its_shard_and_some_bytes_a_completion():
    jobs = [Job(questions, 200, 1024, of_shard, (6, 8)) for questions in (32, 64) for of_shard in (1, 2)]
    for of_rank in on_ranks(4, travel, jobs):
        for job, found in zip(jobs, of_rank, strict=True):
            assert found["lacking"] > 200_000
            told = OUTLINE * job.questions * GROUP
            assert 0.9 * found["lacking"] < found["bytes"] < found["lacking"] + HEADERS * found["sequences"] + told


def test_a_rank_holds_its_rows_and_one_of_them_twice():
    job = Job(questions=8, tokens=2400, row_tokens=4096, routing=(58, 8))  # 928 bytes a token: 53 MB on two ranks
    for (found,) in on_ranks(2, travel, [job]):
        assert found["experts"] > 20e6
        assert found["peak"] < 1.1 * found["experts"] + 2 * job.row_tokens * 928


def lengths_and_texts() -> tuple:
    world = start()
    own = [graded(world.rank, 20, None)]
    pairs = everyones_graded(own, lambda number: Prompt(number, [1], "", Question("")), world)
    lengths = of_each(pairs, world, lambda whole: [len(completion.tokens) for completion in whole])
    texts = texts_of_each(pairs, world, lambda whole: [completion.tokens[:2] for completion in whole])
    lost = [(Outline(0, completion.prompt, 3, 5, truncated=False), score) for completion, score in pairs[:1]]
    with pytest.raises(RuntimeError) as no_rank:
        of_each(lost, world, lambda whole: [0 for _ in whole])
    stop()
    return lengths, [(text.home, len(text.tokens)) for text in texts], str(no_rank.value)


def test_homes_say_what_they_find_of_each():
    wanted = [completion.num_tokens for number in range(2) for completion, _ in graded(number, 20, None)]
    for lengths, texts, message in on_ranks(2, lengths_and_texts):
        assert lengths == wanted
        assert texts == [(number // GROUP, 2) for number in range(2 * GROUP)]
        assert message == "rollout: no rank has completion 3 of prompt 0, required is its home"


def test_a_sequence_that_is_not_here_is_named():
    outline = Outline(2, Prompt(17, [1, 2], "", Question("")), 3, 5, truncated=False)
    shards = pack(to_sequences([Sample(outline, 1.0)], rank=0), RowShape(16))
    message = "pack: found no tokens of completion 3 of prompt 17, required from its home, rank 2"
    with pytest.raises(RuntimeError, match=message):
        shards[0]


def lost_at_home() -> str:
    world = start()
    world = replace(world, dp_rank=world.rank, dp_size=2)
    outlines = [Outline(0, Prompt(n, [1, 2], "", Question("")), 3, 5, truncated=False) for n in (17, 18)]
    shards = pack(to_sequences([Sample(outline, 1.0) for outline in outlines], rank=world.rank), RowShape(16, shards=2))
    try:
        own_rows(shards, world)
    except RuntimeError as error:
        return str(error)
    finally:
        stop()
    return ""


def test_a_home_that_lacks_its_sequence_names_it():
    at_home, _ = on_ranks(2, lost_at_home)
    assert at_home == "rows: found no tokens of completion 3 of prompt 18 at its home, rank 0"
