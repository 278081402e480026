"""`r1engine iterate`: the pipeline that a file stands for, and the table of its rounds."""

import json
import random

import pytest

from r1engine.config import ConfigError
from r1engine.config.iterate import load_rounds
from r1engine.demo.tiny_chain import Chain, save_tokenizer, trained_tokenizer
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.sampling.round_values import (
    Followed,
    area_of_steps,
    error_to_rollouts,
    followed_steps,
    siblings_told_apart,
)
from r1engine.sampling.rounds import _process_right, write_rounds

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


# A question's samples, two of them equal, and a search: 5 6 8 is right, 5 6 9 and 5 7 are wrong, 4 is undecided.
END = {"parent": 0, "finish": "stop"}
SAMPLES = {
    "search": "best_of_8",
    "id": 0,
    "question": "What is 1+1?",
    "nodes": [
        END | {"node": 1, "tokens": [[5], [6], [8, 1]], "scores": [0.5, 0.375, 1.0], "verdict": "right", "samples": 2},
        END | {"node": 2, "tokens": [[5], [7, 1]], "scores": [0.5, 1.0], "verdict": "wrong"},
        END | {"node": 3, "tokens": [[4, 1]], "scores": [0.75], "verdict": "undecided"},
    ],
}
TREE = SAMPLES | {
    "search": "mcts_8",
    "nodes": [
        {"node": 1, "parent": 0, "tokens": [[5]], "scores": [0.5], "finish": ""},
        {"node": 2, "parent": 1, "tokens": [[6]], "scores": [0.375], "finish": ""},
        END | {"node": 3, "parent": 2, "tokens": [[9, 1]], "scores": [0.25], "verdict": "wrong"},
    ],
}


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
    for key, value in (("method", "beam"), ("use_rule", "true"), ("curve", "[4]")):
        with pytest.raises(ConfigError, match=rf"search\.{key}: found .*, required none: the rounds set it"):
            load_rounds(path, [f"search.{key}={value}"])
    load_rounds(path, ["search.method=mcts"])
    with pytest.raises(ConfigError, match=r"stage test_0: .*unknown key search.widht"):
        load_rounds(path, ["search={widht: 4}"])


def test_the_table_of_the_rounds_by_hand(tmp_path):
    def put(name, rows=(), **searches):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"searches": searches}))
        (tmp_path / name / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for number, (share, found) in enumerate([(0.25, 0.5), (0.5, 0.625)]):
        rows = [SAMPLES, TREE] if number else []
        put(f"test_{number}", rows, best_of_8={"pass_at_1": share}, mcts_8={"accuracy": found})
    for number in (1, 2):
        put(f"search_{number}", mcts={"drawn": 10.0, "questions": 30, "any_right": 0.9})
    put("reject_1", best_of={"drawn": 11.0, "questions": 30, "any_right": 0.8})
    put("reject_test_1", best_of_8={"pass_at_1": 0.375}, mcts_8={"accuracy": None})
    text = write_rounds(tmp_path, 3, tmp_path)  # the second round is not tested yet
    assert text.splitlines()[2:] == [
        "| 0 | - | 0.250 | - | 0.500 | 0.250 | - | - | - | - | 0 |",
        "| 1 | search | 0.500 | - | 0.625 | 0.125 | 0.500 (2) | 0.636 | 0.320 | 0.900 | 300 |",
        "| 1 | rejection | 0.375 | - | - | - | - | - | - | 0.800 | 330 |",
    ]
    page = (tmp_path / "rounds.html").read_text()
    assert "Rounds: " in page and page.count("0.500 (2)") == 1 and "process right: share of samples" in page


def test_a_step_is_worth_what_completions_through_it_come_to_by_hand():
    steps = followed_steps([SAMPLES, TREE])
    assert {prefix: (one.value, one.right, one.decided) for (_, prefix), one in steps.items()} == {
        ((5,),): (0.5, 2, 4),
        ((5,), (6,)): (0.375, 2, 3),  # two equal samples, and a wrong end of the search
        ((5,), (6,), (8, 1)): (1.0, 2, 2),
        ((5,), (6,), (9, 1)): (0.25, 0, 1),
        ((5,), (7, 1)): (1.0, 0, 1),
    }  # (4,) is undecided: not 0, but not known
    # 6 leads to more than 7 and has the lower value; 8 has the higher one of 8 and 9.
    assert siblings_told_apart(steps) == (0.5, 2)
    assert siblings_told_apart(followed_steps([SAMPLES, TREE, TREE | {"id": 1}])) == (0.5, 2)  # questions are apart
    # By value .25 .375 .5 1: right 0 2/3 1/2 1, wrong 1 1/3 1/2 1; so (2/3 7/6 + 1/2 19/12 + 7/3) of 13/6 17/6.
    assert area_of_steps(steps.values()) == pytest.approx((7 / 9 + 19 / 24 + 7 / 3) / (13 / 6 * 17 / 6))
    # Of the samples: (1/2 - 2/3)^2 - (2/9) / 2, (3/8 - 1)^2 and 0; 7 has one sample.
    rollouts = followed_steps([SAMPLES])
    assert error_to_rollouts(rollouts.values()) == pytest.approx(((1 / 36 - 1 / 9 + 25 / 64) / 3) ** 0.5)
    assert error_to_rollouts([Followed(0.5, 2, 4)]) == 0.0  # less than nothing
    assert (siblings_told_apart({}), area_of_steps([]), error_to_rollouts([])) == ((None, 0), None, None)
    assert area_of_steps([Followed(0.5, 2, 2)]) is None and error_to_rollouts([Followed(0.9, 1, 1)]) is None


def test_the_error_to_rollouts_does_not_count_their_noise():
    rng = random.Random(0)
    chances = [rng.random() for _ in range(20_000)]
    steps = [Followed(0.2 + 0.5 * p, sum(rng.random() < p for _ in range(3)), 3) for p in chances]
    true = (sum((one.value - p) ** 2 for one, p in zip(steps, chances, strict=True)) / len(steps)) ** 0.5
    assert error_to_rollouts(steps) == pytest.approx(true, abs=0.01)  # with the noise it is .29 in place of .16


def test_steps_of_known_truth_tell_how_many_processes_are_right(tmp_path):
    save_tokenizer(tmp_path / "model", trained_tokenizer(["5a+2=7;7b*4=8;<think></think>0123456789abcde+*"] * 3, 300))
    tokenizer = load_tokenizer(tmp_path / "model")
    chain = Chain(5, (("+", 2), ("*", 4), ("*", 3), ("+", 5), ("*", 2)))
    wrong = [*chain.steps[:2], "8c*3=5", *chain.steps[3:]]
    nodes = []
    for steps in (chain.steps, wrong):
        texts = ["<think>" + steps[0] + ";", *(f"{step};" for step in steps[1:-1]), f"{steps[-1]}</think>", "8"]
        nodes.append({"tokens": [tokenizer.encode(text).ids for text in texts]})
    row = {"question": chain.question, "nodes": nodes}
    assert _process_right(tmp_path / "model", [row]) == 0.5
    assert _process_right(tmp_path / "model", [row | {"question": "What is 1+1?"}]) is None
