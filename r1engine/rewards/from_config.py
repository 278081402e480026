"""The scorer that section `rewards` of a run's configuration describes, and whether its servers are there."""

from __future__ import annotations

from r1engine.config import ConfigError, GradingServer, Rewards
from r1engine.rewards.functions import FunctionSettings
from r1engine.rewards.math.decision import MathPolicy
from r1engine.rewards.rules import rule_of
from r1engine.rewards.sandbox import probe
from r1engine.rewards.scorer import Scorer
from r1engine.rewards.servers.endpoint import ModelServers
from r1engine.rewards.servers.judge import GenerativeJudge
from r1engine.rewards.servers.reward_model import RewardModel
from r1engine.rewards.settings import ScorerSettings


def make_scorer(rewards: Rewards, *, workers: int | None = None) -> Scorer:
    """A scorer with these settings; none of its servers is asked anything here.

    Args:
        rewards: section `rewards`.
        workers: grading processes where `rewards.workers` is null; None: one a core of this rank.

    Raises:
        ValueError: a detector, a file of functions or an API key is not there, or a URL is none.
    """
    judge: GenerativeJudge | None = None
    if (server := rewards.judge) is not None:
        judge = GenerativeJudge(
            servers_of(server),
            server.model,
            parallel=server.parallel,
            canaries=server.canaries,
            max_tokens=server.max_tokens,
        )
    models = {
        name: RewardModel(servers_of(s), s.model, s.template, s.batch_size, s.parallel, s.probe_score)
        for name, s in rewards.reward_models.items()
        if s.path is None
    }
    settings = ScorerSettings(
        workers=rewards.workers or workers,
        deadline_seconds=rewards.deadline_seconds,
        code_deadline_seconds=rewards.code_deadline_seconds,
        with_language=rewards.language != 0,
        detector=rewards.language_detector,
        blank_think_allowed=rewards.blank_think_allowed,
        format_rule=rewards.format_rule,
        policy=MathPolicy(rewards.percent_may_be_missing, rewards.interval_may_be_inequality),
        unsafe=rewards.unsafe,
        judge=judge,
        reward_models=models,
        rated_in_trainer=any(model.path is not None for model in rewards.reward_models.values()),
        functions=_functions(rewards),
    )
    return Scorer(settings)


def _functions(rewards: Rewards) -> FunctionSettings:
    variables = tuple(rewards.function_variables)
    return FunctionSettings(rewards.functions, rewards.function_deadline_seconds, rewards.function_memory_gb, variables)


def check_named(rewards: Rewards, named: set[str]) -> list[str]:
    """What to tell the user about the rewards that the questions of a run name.

    Args:
        rewards: section `rewards`.
        named:   rewards of the questions.

    Raises:
        ConfigError: one needs a server that is not configured, or a reward model has no questions.
    """
    notes = []
    if "judge" in named and rewards.judge is None:
        raise ConfigError("rewards.judge: found null, required by the questions of reward 'judge'")
    if "preference" in named and not rewards.reward_models:
        raise ConfigError(
            "rewards.helpfulness_model or rewards.harmlessness_model: found null, required by the questions of reward "
            "'preference'"
        )
    if "functions" in named and not rewards.functions:
        raise ConfigError("rewards.functions: found none, required by the questions of reward 'functions'")
    if rewards.reward_models:
        if "preference" not in named:
            raise ConfigError("rewards: found a reward model, required questions of reward 'preference' for it")
        if named <= {"preference", "format", "language"}:
            notes.append("no question has a verifiable reward: nothing tells if a reward model is hacked")
    return notes


def check_sandbox(rewards: Rewards, named: set[str]) -> list[str]:
    """What to tell the user about the sandbox of this machine, if rewards of these names run code.

    Raises:
        ConfigError: too little protects from the code.
    """
    if not any(rule_of(reward, "data").runs_code for reward in named):
        return []
    try:
        probe().require(unsafe=rewards.unsafe)
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    return ["\n  ".join(["code rewards run in a sandbox of:", *probe().describe()])]


def check_servers(rewards: Rewards) -> None:
    """Asks the servers that the rewards name something simple; loads no torch.

    Raises:
        ConfigError: a server does not answer as it should.
    """
    try:
        with make_scorer(rewards) as scorer:
            scorer.check_servers()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"rewards: {error}") from error


def servers_of(server: GradingServer) -> ModelServers:
    """
    Raises:
        ValueError: a URL is none, or the variable of the key is not set.
    """
    return ModelServers(
        *server.urls, timeout_seconds=server.timeout_seconds, tries=server.tries, key_variable=server.key_variable
    )
