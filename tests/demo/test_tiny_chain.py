"""The chains: exact truth, the exact value against what is drawn, and tokens that end steps."""

import json
import random

import pytest

from r1engine.config import TinyChainConfig, TinyChainTruthConfig
from r1engine.data.steps import read_steps
from r1engine.demo import tiny_chain as demo
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens
from r1engine.search.steps import StepMarks

CHAIN = demo.Chain(7, (("+", 5), ("*", 3), ("*", 4), ("+", 2), ("*", 5)))
RIGHT = "<think>7a+5=2;2b*3=6;6c*4=4;4d+2=6;6e*5=0</think><answer>0</answer>"


def test_a_chain_by_hand():
    assert CHAIN.question == "What is 7a+5b*3c*4d+2e*5, last digit only?" and CHAIN.answer == 0
    assert demo.right_solution(CHAIN) == RIGHT and demo.chain_of(CHAIN.question) == CHAIN
    for bad in ("What is 7a+5?", "What is xa+5b*3c*4d+2e*5, last digit only?", ""):
        with pytest.raises(ValueError, match="required a question of tiny_chain"):
            demo.chain_of(bad)


def test_truth_of_steps_by_hand():
    right = ["<think>7a+5=2;", "2b*3=6;", "6c*4=4;", "4d+2=6;", "6e*5=0</think>", "<answer>0</answer>"]
    assert demo.step_truth(CHAIN, right) == [1.0] * 6
    # A wrong step that leads to the right answer, because *5 forgets.
    lucky = ["<think>7a+5=2;", "2b*3=5;", "5c*4=0;", "0d+2=2;", "2e*5=0</think>", "<answer>0</answer>"]
    assert demo.step_truth(CHAIN, lucky) == [1.0, 0, 0, 0, 0, 0]
    assert demo.step_truth(CHAIN, right[:2] + right[:1]) == [1.0, 1.0, 0.0]
    assert demo.step_truth(CHAIN, [*right, "more"])[-1] == 0.0


def test_solutions_get_exact_labels_in_place_of_their_own(tmp_path):
    lucky = ["<think>7a+5=2;", "2b*3=5;", "5c*4=0;", "0d+2=2;", "2e*5=0</think>", "<answer>0</answer>"]
    row = {
        "id": "0/0",
        "question": CHAIN.question,
        "steps": lucky,
        "labels": [1] * 6,
        "tokens": [[n] for n in range(6)],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps({"steps_file": 1}) + "\n" + json.dumps(row) + "\n")
    cfg = TinyChainTruthConfig(run_dir=tmp_path, steps=tmp_path / "in.jsonl")
    demo.write_truth(cfg)
    [found] = read_steps(tmp_path / "steps.jsonl")
    assert found.labels == (1.0, 0.0, None, None, None, None) and found.tokens == tuple((n,) for n in range(6))
    demo.write_truth(cfg.model_copy(update={"labels": "value"}))
    [found] = read_steps(tmp_path / "steps.jsonl")
    assert found.is_of_rollouts and found.labels[-2:] == (1.0, 1.0)
    assert found.labels[1] == demo.exact_value(CHAIN, 2, 5) and demo.step_values(CHAIN, ["none"]) == [0.0]


def test_the_exact_value_is_that_of_drawn_solutions():
    assert demo.exact_value(CHAIN, 5, 0) == 1.0 and demo.exact_value(CHAIN, 5, 3) == 0.0
    # One step is left, 6e*5: right (0) with 0.94 if read well, else 6+5=1 and a slip to 0.
    assert demo.exact_value(CHAIN, 4, 6) == pytest.approx(0.6 * 0.94 + 0.4 * 0.06 / 9)
    rng, count = random.Random(3), 4000
    hits = sum(f"<answer>{CHAIN.answer}<" in demo.slipped_solution(CHAIN, rng) for _ in range(count))
    value = demo.exact_value(CHAIN, 0, CHAIN.first)
    assert abs(hits / count - value) < 4 * (value * (1 - value) / count) ** 0.5


def test_the_world_is_written_alike_and_its_steps_end_with_tokens(tmp_path):
    cfg = TinyChainConfig(run_dir=tmp_path / "a", texts=20, train=30, heldout=10, tests=5)
    files = ("train.jsonl", "more.jsonl", "heldout.jsonl", "tests.jsonl")
    demo.write_world(cfg)
    demo.write_world(cfg.model_copy(update={"run_dir": tmp_path / "b"}))
    for name in ("clean.jsonl", "texts.jsonl", *files, "model/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    lines = [(tmp_path / "a" / name).read_text().splitlines() for name in files]
    assert [*map(len, lines)] == [30, 400, 10, 5] and len({line for file in lines for line in file}) == 445
    tokenizer = load_tokenizer(tmp_path / "a" / "model")
    tokens = tokenizer.encode(RIGHT).ids
    ends = StepMarks(tokenizer, demo.MARKS).ends(tokens, stop_tokens(tmp_path / "a" / "model", tokenizer))
    texts = [tokenizer.decode(tokens[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert len(texts) == 6 and demo.step_truth(CHAIN, texts) == [1.0] * 6
