"""What the stages share that train on files of texts: the tokens of a file, and a policy that stays on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from r1engine.config import ProcessRewardConfig, RewardModelConfig, SftConfig
from r1engine.data.token_files import TokenFiles
from r1engine.hf.architecture import Head
from r1engine.model.policy import Policy
from r1engine.observe.progress import Progress
from r1engine.ranks import World

Table = TypeVar("Table", bound=TokenFiles)


def policy_of(cfg: SftConfig | RewardModelConfig | ProcessRewardConfig, world: World, head: Head) -> Policy:
    """The policy to train, never offloaded: nothing else wants the device's memory."""
    layout = cfg.parallel.model_copy(update={"offload": False})
    return Policy(cfg.model, layout, cfg.optimizer, world, seed=cfg.seed, head=head)


def read_once(
    table: Callable[[Path], Table], key_of: Callable[[], str], write: Callable[[str], Path], world: World, say: Progress
) -> tuple[Table, str]:
    """The tokens of a file, which the first rank writes, and the digest of all that they depend on. Collective.

    Args:
        table:  opens what was written.
        key_of: that digest.
        write:  writes the tokens for a digest, if they are not there, and tells where.
        world:  the ranks.
        say:    gets the notes on what was left out.

    Raises:
        ValueError: see `write`.
    """
    key = world.from_first(key_of)
    found = table(world.from_first(lambda: write(key)))
    for note in found.notes:
        say.note(note)
    return found, key
