"""Ways of training. run.py owns time (ranks, resume, checkpoints, logs); a stage owns what one stride is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1engine.config import ProcessRewardConfig, RewardModelConfig, RlConfig, SftConfig, StageConfig
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.stages.stage import Advance, Evaluated, Stage

if TYPE_CHECKING:
    from r1engine.ranks import World

__all__ = ["Advance", "Evaluated", "Stage", "make_stage"]


def make_stage(cfg: StageConfig, world: World, phases: Phases | None = None, progress: Progress | None = None) -> Stage:
    """Build the stage that a configuration describes, with its model and its data.

    Args:
        cfg:      of the stage.
        world:    this rank among all; `model.parallel.join` makes it.
        phases:   where the stage counts its seconds; None: for itself.
        progress: what it tells of how far it is; None: nothing.

    Raises:
        ValueError: the model, the data or a server of the rewards does not fit the configuration.
    """
    phases, progress = phases or Phases(), progress or Progress("", enabled=False)
    if isinstance(cfg, RlConfig):
        from r1engine.stages.rl import RlStage

        return RlStage(cfg, world, phases, progress)
    if isinstance(cfg, SftConfig):
        from r1engine.stages.sft import SftStage

        return SftStage(cfg, world, phases, progress)
    if isinstance(cfg, RewardModelConfig):
        from r1engine.stages.reward_model import RewardModelStage

        return RewardModelStage(cfg, world, phases, progress)
    if isinstance(cfg, ProcessRewardConfig):
        from r1engine.stages.process_reward import ProcessRewardStage

        return ProcessRewardStage(cfg, world, phases, progress)
    raise TypeError(f"make_stage: found a {type(cfg).__name__}, required a configuration that trains")
