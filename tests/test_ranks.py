"""What ranks tell each other."""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks

from r1engine import ranks as r
from r1engine.config import ConfigError


def exchange() -> None:
    world = r.start()
    assert world.from_first(lambda: world.rank) == 0
    assert world.everyones(world.rank * 10) == [0, 10]
    assert r.spread(list("abcde"), world, lambda own: [f"{item}{world.rank}" for item in own]) == [
        "a0",
        "b1",
        "c0",
        "d1",
        "e0",
    ]
    with pytest.raises(ConfigError, match="only the first knows"):
        world.from_first(refuse)
    world.wait()
    r.stop()


def refuse() -> None:
    raise ConfigError(["only the first knows"])


def test_ranks_share_what_one_knows_and_what_each_has():
    on_ranks(2, exchange)


def test_a_single_rank_needs_no_process_group():
    world = r.World(0, 1, torch.device("cpu"))
    assert world.from_first(lambda: 3) == 3
    assert world.everyones(4) == [4]
    world.wait()
    with pytest.raises(ConfigError):
        world.from_first(refuse)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_interleaving_undoes_the_shares(size, count):
    items = list(range(count))
    assert r.interleaved([items[rank::size] for rank in range(size)]) == items
