"""What each rank knows of the completions of a rollout: its own whole, the others' in outline.

The rank that drew a completion is its home. Decisions are made on every rank, from outlines and scores; so these are
all that is told to everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from r1engine.batch import Away, Completion, Outline, Prompt, name_of
from r1engine.batch import Sequence as Text
from r1engine.ranks import World, interleaved
from r1engine.rewards import Score

Graded = tuple[Completion | Outline, Score]
Found = TypeVar("Found")


def everyones_graded(
    own: list[list[tuple[Completion, Score]]], prompt_of: Callable[[int], Prompt], world: World
) -> list[Graded]:
    """The graded completions of all ranks, group after group; this rank's own are whole. Collective.

    Args:
        own:       of each of this rank's questions, which are every size-th.
        prompt_of: prompt id -> the prompt, which every rank has.
        world:     the ranks.
    """
    told = [(group[0][0].prompt.id, [_told(*graded) for graded in group]) for group in own]
    found: list[Graded] = []
    for number, (prompt_id, group) in enumerate(interleaved(world.everyones(told))):
        home = number % world.size
        if home == world.rank:
            found += own[number // world.size]
        else:
            prompt = prompt_of(prompt_id)
            found += [(Outline(home, prompt, *facts), score) for *facts, score in group]
    return found


def _told(completion: Completion, score: Score) -> tuple:
    """The fields of `Outline` behind the prompt, and the score."""
    experts = None if completion.experts is None else tuple(completion.experts.shape)
    return completion.sample, completion.num_tokens, completion.truncated, completion.versions, experts, score


def of_each(graded: Sequence[Graded], world: World, work: Callable[[list[Completion]], Sequence[Found]]) -> list[Found]:
    """What the home of each completion finds of it, in their order, on every rank. Collective.

    Args:
        graded: as `everyones_graded` returns them, or some of these, the same on every rank.
        world:  the ranks.
        work:   called once with the completions that are whole here; returns one result each.

    Raises:
        RuntimeError: no rank has a completion.
    """
    whole = {i: completion for i, (completion, _) in enumerate(graded) if isinstance(completion, Completion)}
    own = dict(zip(whole, work(list(whole.values())), strict=True))
    found = {i: one for part in world.everyones(own) for i, one in part.items()}
    if lost := [completion for i, (completion, _) in enumerate(graded) if i not in found]:
        raise RuntimeError(f"rollout: no rank has {name_of(lost[0])}, required is its home")
    return [found[i] for i in range(len(graded))]


def texts_of_each(
    graded: Sequence[Graded], world: World, tokens_of: Callable[[list[Completion]], Sequence[list[int]]]
) -> list[Text]:
    """The tokens that the home of each completion makes of it, whole at home. Arguments and errors as of `of_each`."""
    whole = iter(made := tokens_of([completion for completion, _ in graded if isinstance(completion, Completion)]))
    sizes = of_each(graded, world, lambda _: [len(tokens) for tokens in made])
    return [
        Text(next(whole), 0, 1.0, home=world.rank)
        if isinstance(completion, Completion)
        else Text(Away(name_of(completion), size), 0, 1.0, home=completion.home)
        for (completion, _), size in zip(graded, sizes, strict=True)
    ]
