"""The scorer that section `rewards` of a run's configuration describes, and whether its servers are there."""

from __future__ import annotations

from r1engine.config import ConfigError, GradingServer, Rewards
from r1engine.rewards.math.decision import MathPolicy
from r1engine.rewards.scorer import Scorer
from r1engine.rewards.servers.endpoint import ModelServers
from r1engine.rewards.servers.judge import GenerativeJudge
from r1engine.rewards.servers.reward_model import RewardModel
from r1engine.rewards.settings import ScorerSettings


def make_scorer(rewards: Rewards, *, workers: int | None = None) -> Scorer:
    """A scorer with these settings; none of its servers is asked anything here.

    Args:
        rewards: section `rewards`.
        workers: grading processes where `rewards.workers` is null; None: one a usable core.

    Raises:
        ValueError: a detector is not installed, an API key is not set, or a URL is none.
    """
    judge, models = None, {}
    if (server := rewards.judge) is not None:
        judge = GenerativeJudge(
            _endpoint(server),
            server.model,
            parallel=server.parallel,
            canaries=server.canaries,
            max_tokens=server.max_tokens,
        )
    for name, server in rewards.reward_models.items():
        models[name] = RewardModel(
            _endpoint(server), server.model, server.template, batch_size=server.batch_size, parallel=server.parallel
        )
    settings = ScorerSettings(
        workers=rewards.workers or workers,
        deadline_seconds=rewards.deadline_seconds,
        code_deadline_seconds=rewards.code_deadline_seconds,
        with_language=rewards.language != 0,
        detector=rewards.language_detector,
        blank_think_allowed=rewards.blank_think_allowed,
        policy=MathPolicy(rewards.percent_may_be_missing, rewards.interval_may_be_inequality),
        unsafe=rewards.unsafe,
        judge=judge,
        reward_models=models,
    )
    return Scorer(settings)


def check_rewards(rewards: Rewards) -> None:
    """Makes the scorer and asks its servers something simple, before anything takes long; loads no torch.

    Raises:
        ConfigError: a detector or an API key is missing, or a server does not answer as it should.
    """
    try:
        with make_scorer(rewards) as scorer:
            scorer.check_servers()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"rewards: {error}") from error


def _endpoint(server: GradingServer) -> ModelServers:
    return ModelServers(
        *server.urls, timeout_seconds=server.timeout_seconds, tries=server.tries, key_variable=server.key_variable
    )
