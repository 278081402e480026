"""Rounds of search and training: "use the resulting question-answer pairs to train both the actor model and the value
model, thereby iteratively improving the process" (section 4.2). A short file that stands for a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from r1engine.config.drawing import SampledModel
from r1engine.config.pipeline import Pipeline, PipelineFile, plan
from r1engine.config.process import StepMarking
from r1engine.config.searching import SearchConfig
from r1engine.config.section import Count, LocalPath, Positive, Section
from r1engine.config.source import ConfigError, Source, read_source, validate

SAMPLES = 1024  # more than a budget pays for
OWN = ("method", "use_rule", "curve", "difficulty", "tokens_of")  # keys of section search that the rounds set


class Rounds(Section):
    """What a round takes from those before. The paper gives no numbers."""

    rounds: Positive = 3
    """Rounds of search, actor and value model."""
    actor_from: Literal["last", "base"] = "last"
    """What the actor is trained from: the last round's, or the model of the beginning."""
    window: Positive = 2
    """Rounds whose searches are trained on, the present one included."""
    texts: Positive = 2
    """Right completions of a question that the actor is trained on, the most visited ones."""
    min_visits: Positive = 2
    """Visits from which on a step's mean value is a label of the value model."""
    samples: Positive = 8
    """Samples of a held-out question for pass@1; mcts beside them gets twice as many simulations."""
    baseline: bool = True
    """Rejection sampling beside it: as many tokens, the same training. Without it no gain should be claimed."""


class IterateFile(Section):
    """The keys of a file of `r1engine iterate`."""

    run_dir: LocalPath = Path("runs/iterate")
    """Folder of the rounds: that of a pipeline."""
    seed: Count = 0
    """Seed of every stage."""
    model: SampledModel = SampledModel()
    value: SampledModel = SampledModel()
    questions: list[LocalPath] = Field(default=[])
    """Files of questions, the next one each round, and from the first on again."""
    heldout: LocalPath | None = None
    """Questions that every actor is tested on."""
    steps: StepMarking = StepMarking()
    iterate: Rounds = Rounds()
    common: dict[str, Any] = Field(default={})
    """Further keys of every search: template, system, rollout, rewards, threads."""
    search: dict[str, Any] = Field(default={})
    """Section `search` of every search, but for what the rounds set: method mcts, with `use_rule` where its trees
    are trained on."""
    actor_training: dict[str, Any] = Field(default={})
    """Further keys of `stage: sft`: sft, optimizer, data.max_tokens, parallel, ..."""
    value_training: dict[str, Any] = Field(default={})
    """Further keys of `stage: process_reward`, which trains the value model: process, optimizer, ..."""

    def problems(self) -> list[str]:
        """What is missing."""
        given = {"model.path": self.model.path, "value.path": self.value.path, "heldout": self.heldout}
        missing = [f"{key}: found null, required a path" for key, path in given.items() if path is None]
        missing += [] if self.questions else ["questions: found none, required a file for each round"]
        own = [key for key in self.search if key in OWN and (key, self.search[key]) != ("method", "mcts")]
        return missing + [f"search.{key}: found {self.search[key]}, required none: the rounds set it" for key in own]


def load_rounds(path: Path, overrides: list[str]) -> tuple[Pipeline, IterateFile]:
    """The pipeline that a file of `r1engine iterate` stands for.

    Raises:
        ConfigError: a key or value is wrong; of a stage it is named with its stage.
    """
    file = validate(IterateFile, read_source(path, overrides))
    if problems := file.problems():
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    stages = stages_of(file)
    whole = {"run_dir": str(file.run_dir), "seed": file.seed, "stages": stages}
    source = Source(whole, {})
    return plan(validate(PipelineFile, source), source), file


def stages_of(file: IterateFile) -> dict[str, dict[str, Any]]:
    """Name -> stage, in the order in which they run."""
    first = str(file.model.path), str(file.value.path)
    stages = {"test_0": _test(file, *first)}
    actor, value = first
    rejecting = first[0]
    for number in range(1, file.iterate.rounds + 1):
        recent = range(max(1, number - file.iterate.window + 1), number + 1)
        base = actor if file.iterate.actor_from == "last" else first[0]
        stages[f"search_{number}"] = _search(file, number, actor, value)
        stages[f"data_{number}"] = _data(file, [f"search_{i}" for i in recent])
        stages[f"actor_{number}"] = _actor(file, base, f"data_{number}")
        stages[f"value_{number}"] = _value(file, value, f"data_{number}/steps.jsonl")
        actor, value = f"actor_{number}", f"value_{number}"
        stages[f"test_{number}"] = _test(file, actor, value)
        if file.iterate.baseline:
            base = rejecting if file.iterate.actor_from == "last" else first[0]
            stages[f"reject_{number}"] = _reject(file, number, rejecting)
            stages[f"reject_data_{number}"] = _data(file, [f"reject_{i}" for i in recent])
            stages[f"reject_actor_{number}"] = _actor(file, base, f"reject_data_{number}")
            rejecting = f"reject_actor_{number}"
            stages[f"reject_test_{number}"] = _test(file, rejecting, first[1])
    return stages


def _drawing(file: IterateFile, model: str, questions: Path | None) -> dict[str, Any]:
    steps = file.steps.model_dump(mode="json")
    return file.common | {"stage": "search", "model": {"path": model}, "questions": str(questions), "steps": steps}


def _questions(file: IterateFile, number: int) -> Path:
    return file.questions[(number - 1) % len(file.questions)]


def _search(file: IterateFile, number: int, actor: str, value: str) -> dict[str, Any]:
    search = file.search | {"method": "mcts", "use_rule": True}
    return _drawing(file, actor, _questions(file, number)) | {"scorer": {"path": value}, "search": search}


def _reject(file: IterateFile, number: int, actor: str) -> dict[str, Any]:
    """Completions until the tokens of the search beside it are drawn."""
    search = {"method": "best_of", "choose": "majority", "n": SAMPLES, "width": 1, "tokens_of": f"search_{number}"}
    return _drawing(file, actor, _questions(file, number)) | {"search": search}


def _test(file: IterateFile, actor: str, value: str) -> dict[str, Any]:
    """pass@1, and what a search without the rule adds."""
    search = file.search | {"curve": [file.iterate.samples], "difficulty": 0}
    return _drawing(file, actor, file.heldout) | {
        "scorer": {"path": value},
        "compare": ["best_of", "mcts"],
        "search": search,
    }


def _data(file: IterateFile, searches: list[str]) -> dict[str, Any]:
    return {
        "stage": "search_data",
        "model": {"path": str(file.model.path)},
        "searches": searches,
        "texts": file.iterate.texts,
        "min_visits": file.iterate.min_visits,
    }


def _template(file: IterateFile) -> dict[str, Any]:
    """How the searches ask, and so what is trained on."""
    return {"template": file.common.get("template", SearchConfig.model_fields["template"].default)}


def _actor(file: IterateFile, base: str, data: str) -> dict[str, Any]:
    own = file.actor_training | {"stage": "sft", "model": file.actor_training.get("model", {}) | {"path": base}}
    return own | {"data": _template(file) | file.actor_training.get("data", {}) | {"train": data}}


def _value(file: IterateFile, base: str, data: str) -> dict[str, Any]:
    own = file.value_training | {
        "stage": "process_reward",
        "model": file.value_training.get("model", {}) | {"path": base},
    }
    own |= {"steps": file.steps.model_dump(mode="json"), "data": _template(file) | file.value_training.get("data", {})}
    process = {"after_error": "keep", "means": "value"} | file.value_training.get("process", {})
    return own | {"data": own["data"] | {"train": data}, "process": process}
