"""What the miniature of search knows exactly, by hand."""

import json

import pytest

from r1engine.demo.tiny_chain import Chain, exact_value, right_solution, save_tokenizer, trained_tokenizer
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.sampling.chain_truth import label_quality, of_trees, process_right, trained

CHAIN = Chain(7, (("+", 5), ("*", 3), ("*", 4), ("+", 2), ("*", 5)))
RIGHT = ["<think>7a+5=2;", "2b*3=6;", "6c*4=4;", "4d+2=6;", "6e*5=0</think>", "<answer>0</answer>"]
LUCKY = ["<think>7a+5=2;", "2b*3=5;", "5c*4=0;", "0d+2=2;", "2e*5=0</think>", "<answer>0</answer>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, trained_tokenizer([right_solution(CHAIN)], 300))
    return load_tokenizer(folder)


def test_labels_against_truth_and_value(tmp_path):
    row = {"question": CHAIN.question, "steps": LUCKY, "labels": [0.5, 0.25, 0.0, None, 1.0, 1.0]}
    (tmp_path / "steps.jsonl").write_text(json.dumps(row) + "\n")
    found = label_quality(tmp_path / "steps.jsonl")  # the first step is right; of the wrong ones two are called right
    assert found["label accuracy"] == 2 / 4
    assert (found["wrong called right"], found["right called wrong"]) == (2 / 3, 0)
    values = [exact_value(CHAIN, *at) for at in ((1, 2), (2, 5), (3, 0), (5, 0))]
    errors = [label - value for label, value in zip((0.5, 0.25, 0.0, 1.0), values, strict=True)]
    assert found["soft label: rmse to value"] == pytest.approx((sum(e * e for e in errors) / 4) ** 0.5)


def test_right_and_wrong_steps_of_a_tree(tokenizer):
    def node(number, parent, text, score, finish=""):
        tokens = [tokenizer.encode(text).ids]
        return {"node": number, "parent": parent, "tokens": tokens, "scores": [score], "finish": finish}

    nodes = [
        node(1, 0, RIGHT[0], 0.5),
        node(2, 0, "<think>7a+5=3;", 0.5),  # a tie
        node(3, 1, RIGHT[1], 0.75),
        node(4, 1, LUCKY[1], 0.25),
        node(5, 2, "3b*3=9;", 0.125),  # behind a wrong step: no pair
        node(6, 2, "2b*3=6;", 0.25),
    ]
    found = of_trees([{"question": CHAIN.question, "nodes": nodes}], tokenizer)
    assert (found["right sibling above wrong"], found["pairs"]) == (0.75, 2)
    # Right: 0.5, 0.75; wrong: 0.5, 0.25, 0.125, 0.25.
    assert found["AUC of steps"] == pytest.approx(7.5 / 8)
    whole = [{"tokens": [tokenizer.encode(step).ids for step in steps]} for steps in (RIGHT, LUCKY, RIGHT[:3])]
    assert process_right([{"question": CHAIN.question, "nodes": whole}], tokenizer) == pytest.approx(1 / 3)


def test_where_a_policy_is_lost(tmp_path):
    rows = [
        {"step": step, "reward/accuracy": accuracy, "process/steps": step + 5.0, "completion/length_mean": 30.0}
        | ({"alarm/process": 1.0} if step == 3 else {})
        for step, accuracy in enumerate([0.25, 0.5, 0.0625] + [0.0] * 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {
        "accuracy first": 0.25,
        "accuracy best": 0.5,
        "accuracy last": 0.00625,  # of the last ten rollouts
        "tokens first": 30.0,
        "tokens last": 30.0,
        "steps first": 5.0,
        "steps last": 11.5,
        "lost from step": 2,
        "alarm at step": 3,
    }
    assert trained(tmp_path) == found
    wrote = [(0, RIGHT), (0, ["0", RIGHT[-1]]), (0, RIGHT[:5]), (0, LUCKY), (-10, RIGHT)]  # the last is before the end
    samples = [{"step": 11 + step, "question": CHAIN.question, "completion": "".join(text)} for step, text in wrote]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    assert trained(tmp_path) == found | {"all steps right last": 1 / 4}
