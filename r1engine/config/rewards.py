"""What completions are rewarded for, and the servers that some rewards ask."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1engine.config.addresses import address_problem
from r1engine.config.section import LocalPath, Positive, Section

PLAIN_REWARDS = ("accuracy", "format", "language", "length", "overlong", "repetition")  # whose weight is a number
RESERVED = ("mean", "std", "undecided")  # of the metrics reward/...
RATED_REWARDS = ("helpfulness", "harmlessness")  # whose weight may change with the step


class GradingServer(Section):
    """Servers of one model that grades; a request that fails at one goes to the next."""

    urls: Annotated[list[str], Field(min_length=1)]
    """http://host:port of each; of the judge http://host:port/v1."""
    model: str
    """The model's name there."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds of one try."""
    tries: Positive = 3
    """Tries of one request, each at the next server."""
    parallel: Positive = 16
    """Requests at once, of each rank."""
    key_variable: str = ""
    """Environment variable that holds the API key; "": none is sent."""


class JudgeServer(GradingServer):
    """A language model behind an OpenAI-compatible endpoint that compares answer and reference (section 2.3.3)."""

    max_tokens: Positive = 2048
    """Tokens of a reply; a reasoning model thinks before its word."""
    canaries: Positive = 2
    """Surely wrong answers among 64; if one is taken, none of these verdicts counts."""


class ChatServer(GradingServer):
    """A language model behind an OpenAI-compatible endpoint that writes texts."""

    max_tokens: Positive = 8192
    """Tokens of a reply; one that is cut off there does not count. Ours."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the replies. Ours."""


class RewardModelServer(GradingServer):
    """A reward model (section 2.3.4): a folder that the trainer runs itself, or servers with SGLang's /classify."""

    path: LocalPath | None = None
    """Folder of a reward model of the policy's architecture, as `stage: reward_model` makes it; null: servers."""
    urls: list[str] = Field(default_factory=list)
    """http://host:port of each server; none with `path`."""
    model: str = ""
    """The model's name at the servers."""
    template: str = ""
    """The conversation as the model was trained on it, with {prompt} and {response}; "": that in the folder."""
    batch_size: Positive = 32
    """Texts of a request."""
    probe_score: float | None = None
    """`probe_score` of the model's summary.json: servers that give another score to the same text, which normalize it,
    say, or hold another model, are refused at the start; null: any score is taken."""

    @model_validator(mode="after")
    def _one_way(self) -> RewardModelServer:
        if self.path is not None and self.probe_score is not None:
            raise ValueError("probe_score: found a number, required null with path: there is no server to ask")
        if (self.path is None) == (not self.urls):
            found = "both" if self.urls else "neither"
            raise ValueError(f"path and urls: found {found}, required one of them")
        if self.urls and not self.model:
            raise ValueError("model: found none, required the model's name at the servers")
        if self.urls and not self.template:
            raise ValueError("template: found none, required the conversation with {prompt} and {response}")
        return self


class Rewards(Section):
    """Weights of the reward's components, and how they are computed."""

    accuracy: float = 1.0
    """Weight of the right answer. v2: accuracy and format "combined with the same weight"."""
    format: float = 1.0
    """Weight of the kept format."""
    language: float = 0.0
    """Weight of the target language's share; 1 after the cold start: "directly summing them" (section 2.3.2)."""
    length: float = 0.0
    """Weight of Kimi k1.5's length reward; not in the paper."""
    overlong: float = 0.0
    """Weight of DAPO's soft overlong punishment; not in the paper."""
    repetition: float = 0.0
    """Weight of minus the share of repeated n-grams; not in the paper."""
    helpfulness: float | dict[int, float] = 0.0
    """Weight of a reward model that sees the summary of the records of reward "preference": a number, or weights from
    optimizer steps on. v2 adds it "only in the final 400 training steps" of 1,700: {0: 0.0, 1300: 1.0}."""
    harmlessness: float | dict[int, float] = 0.0
    """The same of a reward model that sees the whole response."""
    process: float = 0.0
    """Weight of a process reward model's scores of the steps. The paper left it: "once a model-based PRM is introduced,
    it inevitably leads to reward hacking" (section 4.2)."""
    process_model: LocalPath | None = None
    """Its folder, of the policy's architecture, as `stage: process_reward` makes it."""
    process_credit: Literal["last", "min", "mean", "prod", "sum", "deepseekmath", "pure"] = "min"
    """What the scores of a completion's steps become: one number, rewarded with what else is; or credit of each token,
    added to the advantage: DeepSeekMath's (4.1.3) or PURE's. sum and deepseekmath pay for length."""
    judge: JudgeServer | None = None
    """For records of reward "judge"."""
    helpfulness_model: RewardModelServer | None = None
    harmlessness_model: RewardModelServer | None = None
    functions: dict[str, str] = Field(default_factory=dict)
    """The user's own, each a component: {name: path.py:function}; docs/own-rewards.md."""
    function_weights: dict[str, float | dict[int, float]] = Field(default_factory=dict)
    """Their weights, a number or weights from optimizer steps on; 1 where there is none."""
    function_deadline_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds of a call of one; after them it is undecided."""
    function_memory_gb: Annotated[float, Field(gt=0)] = 16.0
    """Address space of a process that calls one (GiB)."""
    function_variables: list[str] = Field(default_factory=list)
    """Environment variables that they see, such as an API key."""
    alarm_window: Annotated[int, Field(ge=8)] = 40
    """Rollouts compared to tell that a reward model is being hacked."""
    format_rule: Literal["r1_zero", "readable"] = "r1_zero"
    """r1_zero: Table 1; readable: thoughts, then a summary, as the cold start has it (section 2.3.1)."""
    blank_think_allowed: bool = False
    """Whether a blank think block keeps the format."""
    percent_may_be_missing: bool = False
    """Whether 10% and 10 are the same answer; else undecided."""
    interval_may_be_inequality: bool = False
    """Whether (3, oo) and x > 3 are the same answer; else undecided."""
    language_detector: Literal["py3langid", "lingua"] = "py3langid"
    """What tells Latin-script languages apart."""
    overlong_margin: Positive = 4096
    """The punishment grows over so many tokens before the limit."""
    repetition_ngram: Positive = 20
    """Words of an n-gram."""
    workers: Positive | None = None
    """Grading processes of each rank; null: cores / ranks on this machine."""
    deadline_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds to grade one completion; after them it is undecided."""
    code_deadline_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for all tests of one program."""
    unsafe: bool = False
    """Run model-written code even without namespaces or Landlock."""

    def weights_at(self, step: int) -> dict[str, float]:
        """Weight of each component of the reward at an optimizer step."""
        given: dict[str, float | dict[int, float]] = {
            name: getattr(self, name) for name in (*PLAIN_REWARDS, *RATED_REWARDS)
        }
        if self.process_model is not None:  # credit of tokens is no part of the total
            given["process"] = 0.0 if self.process_credit in ("deepseekmath", "pure") else self.process
        given |= {name: self.function_weights.get(name, 1.0) for name in self.functions}
        weights = {}
        for name, weight in given.items():
            weights[name] = weight[max(s for s in weight if s <= step)] if isinstance(weight, dict) else weight
        return weights

    @property
    def reward_models(self) -> dict[str, RewardModelServer]:
        """The reward models there are, by the component that they give."""
        models = {name: getattr(self, f"{name}_model") for name in RATED_REWARDS}
        return {name: model for name, model in models.items() if model is not None}

    def is_rated_at(self, step: int) -> bool:
        """Whether a reward model counts at an optimizer step; it is not asked where not."""
        weights = self.weights_at(step)
        return any(weights[name] for name in RATED_REWARDS)

    def problems(self) -> list[str]:
        """What does not fit together."""
        problems = []
        for name in RATED_REWARDS:
            weight = getattr(self, name)
            if isinstance(weight, dict) and (0 not in weight or min(weight) < 0):
                return [f"rewards.{name}: found the steps {sorted(weight)}, required 0 and any later ones"]
            is_used = any(weight.values()) if isinstance(weight, dict) else weight != 0
            if is_used and name not in self.reward_models:
                problems.append(
                    f"rewards.{name}_model: found null, required a reward model, as rewards.{name} is not 0"
                )
            if not is_used and name in self.reward_models:
                problems.append(f"rewards.{name}: found 0 at every step, required another weight, as it has a model")
        problems += self.server_problems() + self.function_problems()
        weights = self.weights_at(0)
        if (self.process != 0) != (self.process_model is not None):
            found = f"found {self.process:g} and process_model {self.process_model or 'null'}"
            problems.append(f"rewards.process: {found}, required a weight and a model, or neither")
        if not any(weights.values()) and not self.reward_models and not self.process:
            problems.append(f"rewards: all of {', '.join(weights)} weigh 0, required one other than 0")
        return problems

    def function_problems(self) -> list[str]:
        """What is wrong with how the user's functions are named."""
        problems = []
        for name, where in self.functions.items():
            path, _, function = where.rpartition(":")
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                problems.append(f"rewards.functions: found the name {name!r:.40}, required small letters, digits and _")
            if name in (*PLAIN_REWARDS, *RATED_REWARDS, *RESERVED, "process"):
                problems.append(f"rewards.functions.{name}: found a name of the engine's own, required another")
            if not path.endswith(".py") or not function.isidentifier():
                problems.append(f"rewards.functions.{name}: found {where!r:.80}, required PATH.py:FUNCTION")
        for name, weight in self.function_weights.items():
            key = f"rewards.function_weights.{name}"
            if name not in self.functions:
                problems.append(f"{key}: found no such function in rewards.functions, only {[*self.functions]}")
            if isinstance(weight, dict) and (0 not in weight or min(weight) < 0):
                problems.append(f"{key}: found the steps {sorted(weight)}, required 0 and any later ones")
        return problems

    def server_problems(self) -> list[str]:
        """What is wrong with the servers that are named."""
        problems = []
        servers = self.reward_models | ({"judge": self.judge} if self.judge is not None else {})
        for name, server in servers.items():
            key = "rewards.judge" if name == "judge" else f"rewards.{name}_model"
            wrong = [(url, problem) for url in server.urls if (problem := address_problem(url))]
            problems += [f"{key}.urls: found {url}, required {problem}" for url, problem in wrong]
            template = getattr(server, "template", "") or "{prompt}{response}"
            if any(template.count(part) != 1 for part in ("{prompt}", "{response}")):
                problems.append(f"{key}.template: found {template!r:.60}, required one {{prompt}}, one {{response}}")
        return problems
