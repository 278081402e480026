"""A policy as a run's configuration describes it."""

from r1engine.config import RlConfig
from r1engine.model.policy import Policy
from r1engine.ranks import World


def policy_of(cfg: RlConfig, world: World) -> Policy:
    """What the RL stage builds of it."""
    return Policy(cfg.model, cfg.parallel, cfg.optimizer, world, seed=cfg.seed, temperature=cfg.rollout.temperature)
