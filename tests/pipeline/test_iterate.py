"""`r1engine iterate`: the pipeline that a file stands for, and the table of its rounds."""

import json

import pytest

from r1engine.config import ConfigError
from r1engine.config.iterate import load_rounds
from r1engine.sampling.rounds import write_rounds

FILE = """
run_dir: RUN
model: { path: BASE }
value: { path: BASE }
questions: [a.jsonl, b.jsonl]
heldout: h.jsonl
steps: { marks: [";"] }
iterate: { rounds: 3 }
common: { template: r1_zero, rollout: { max_tokens: 48 } }
search: { width: 2, simulations: 4 }
actor_training: { sft: { epochs: 2 }, data: { max_tokens: 96 } }
value_training: { process: { epochs: 3 } }
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    path = tmp_path / "rounds.yaml"
    path.write_text(FILE.replace("RUN", str(tmp_path / "run")).replace("BASE", str(tmp_path / "base")))
    return path


def test_a_round_is_made_from_the_round_before(path):
    pipeline, _ = load_rounds(path, ["iterate.rounds=2"])
    needs = {stage.name: {*stage.needs.values()} for stage in pipeline.stages}
    assert needs == {
        "test_0": set(),
        "search_1": set(),
        "data_1": {"search_1"},
        "actor_1": {"data_1"},
        "value_1": {"data_1"},
        "test_1": {"actor_1", "value_1"},
        "reject_1": {"search_1"},
        "reject_data_1": {"reject_1"},
        "reject_actor_1": {"reject_data_1"},
        "reject_test_1": {"reject_actor_1"},
        "search_2": {"actor_1", "value_1"},
        "data_2": {"search_1", "search_2"},
        "actor_2": {"actor_1", "data_2"},
        "value_2": {"value_1", "data_2"},
        "test_2": {"actor_2", "value_2"},
        "reject_2": {"reject_actor_1", "search_2"},
        "reject_data_2": {"reject_1", "reject_2"},
        "reject_actor_2": {"reject_actor_1", "reject_data_2"},
        "reject_test_2": {"reject_actor_2"},
    }
    of = {stage.name: stage.cfg for stage in pipeline.stages}
    assert of["search_2"].search.use_rule and not of["test_2"].search.use_rule  # a test must not know its answers
    assert (of["search_2"].questions.name, of["search_1"].questions.name) == ("b.jsonl", "a.jsonl")
    assert of["value_1"].process.after_error == "keep" and of["value_1"].process.means == "value"
    assert of["actor_1"].data.template == of["value_1"].data.template == of["test_1"].template == "r1_zero"


def test_choices_and_what_is_missing(path):
    pipeline, _ = load_rounds(path, ["iterate.actor_from=base", "iterate.window=1", "iterate.baseline=false"])
    needs = {stage.name: {*stage.needs.values()} for stage in pipeline.stages}
    assert needs["actor_3"] == {"data_3"} and needs["data_3"] == {"search_3"} and "reject_1" not in needs
    with pytest.raises(ConfigError, match="heldout: found null, required a path"):
        load_rounds(path, ["heldout=null"])
    with pytest.raises(ConfigError, match=r"stage test_0: .*unknown key search.widht"):
        load_rounds(path, ["search={widht: 4}"])


def test_the_table_of_the_rounds_by_hand(tmp_path):
    def put(name, **searches):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"searches": searches}))

    for number, (share, found) in enumerate([(0.25, 0.5), (0.5, 0.625)]):
        put(f"test_{number}", best_of_8={"pass_at_1": share}, mcts_8={"accuracy": found, "auc": 0.75})
    for number in (1, 2):
        put(f"search_{number}", mcts={"drawn": 10.0, "questions": 30, "any_right": 0.9})
    put("reject_1", best_of={"drawn": 11.0, "questions": 30, "any_right": 0.8})
    put("reject_test_1", best_of_8={"pass_at_1": 0.375}, mcts_8={"accuracy": None, "auc": None})
    text = write_rounds(tmp_path, 3)  # the second round is not tested yet
    assert text.splitlines()[2:] == [
        "| 0 | 0.250 | 0.500 | 0.250 | 0.750 | - | - | - | - |",
        "| 1 | 0.500 | 0.625 | 0.125 | 0.750 | 300 | 0.900 | 0.375 | 330 |",
    ]
