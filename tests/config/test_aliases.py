"""Names that people bring from other projects are answered with ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1engine.config import ConfigError, RlConfig, load
from r1engine.config.aliases import ALIASES, answer_to
from r1engine.config.words import section_of

ROOT = Path(__file__).resolve().parents[2]


def is_key(path: str) -> bool:
    section = RlConfig
    *sections, last = path.split(".")
    for name in sections:
        section = section_of(section.model_fields[name])
    return last in section.model_fields


def test_every_alias_leads_to_a_key_and_stands_on_the_page():
    assert [alias.key for alias in ALIASES if not is_key(alias.key)] == []
    page = (ROOT / "docs" / "coming-from.md").read_text()
    for alias in ALIASES:
        rows = page.partition(f"\n## {alias.project}\n")[2].partition("\n## ")[0]
        assert f"\n| `{alias.name}` | `{alias.key}` | {alias.note} |\n" in rows, alias
    assert len({(alias.project, alias.name) for alias in ALIASES}) == len(ALIASES) == page.count("\n| `")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learning_rate=1e-6", "unknown key learning_rate; what TRL calls learning_rate is optimizer.lr here"),
        ("grpo.epsilon=0.2", "unknown key grpo.epsilon; what TRL calls epsilon is grpo.clip_eps here"),
        ("grpo.beta=0.1", "what TRL calls beta is grpo.kl_coef here"),
        ("num_generations=8", "is grpo.group_size here"),
        ("per_device_train_batch_size=8", r"grpo.questions here \(in all, on all ranks: .*grpo.group_size\)"),
        ("actor_rollout_ref.rollout.n=8", "unknown key actor_rollout_ref; what verl calls n is grpo.group_size here"),
        ("algorithm.adv_estimator=grpo", "unknown key algorithm; what verl calls adv_estimator is grpo.advantage here"),
        ("actor.lr=1", "unknown key actor; "),
        ("kl-loss-coef=1", "what verl calls kl-loss-coef is grpo.kl_coef here"),
        ("rollout.n=8", "what verl calls n is grpo.group_size here"),
        ("grpo.groupsize=8", "did you mean 'group_size'"),
    ],
)
def test_a_foreign_name_is_answered_with_ours(setting, words):
    with pytest.raises(ConfigError, match=words):
        load(ROOT / "configs" / "r1_zero.yaml", [setting])


def test_a_name_of_nobody_has_no_answer():
    assert answer_to("no_such_thing") == ""
