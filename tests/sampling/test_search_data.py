"""The stage `search_data`: right completions and values of visited steps, by hand; and what it refuses."""

import json

import pytest

from r1engine.config import SearchDataConfig
from r1engine.data.steps import read_steps
from r1engine.demo.tiny_chain import save_tokenizer, trained_tokenizer
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.sampling.search_data import write_search_data

STOP = 1  # of the tiny tokenizers


def node(number, parent, tokens, visits=0, mean=0.5, **end):
    found = {"node": number, "parent": parent, "tokens": tokens, "finish": "", "visits": visits, "mean": mean}
    return found | end


@pytest.fixture
def cfg(tmp_path):
    save_tokenizer(tmp_path / "model", trained_tokenizer(["1;2;3;4;5"] * 3, 300))
    tokenizer = load_tokenizer(tmp_path / "model")
    [a, b, c, d] = [tokenizer.encode(text).ids for text in ("1;", "2;", "3", "4")]
    right = {"finish": "stop", "verdict": "right"}
    nodes = [
        node(1, 0, [a], 9, 0.75),
        node(2, 1, [b], 5, 0.5),
        node(3, 2, [[*c, STOP]], 2, 1.0, **right),
        node(4, 2, [[*d, STOP]], 3, 1.0, **right),
        node(5, 1, [c], 2, 0.25),
        node(6, 1, [d], 1, 0.125),  # visited too seldom
        node(7, 1, [[STOP]], 4, 0.0, finish="stop", verdict="wrong"),
        node(8, 0, [d], 0, lookahead=True),
        node(9, 1, [[*b, *c, STOP]], 2, 0.625, finish="stop", verdict="undecided"),  # the model's own value
    ]
    row = {"search": "mcts", "id": 3, "question": "Q", "nodes": nodes}
    best = {"search": "best_of", "id": 3, "question": "Q", "nodes": [node(1, 0, [a, [*c, STOP]], **right)]}
    (tmp_path / "search.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(best) + "\n")
    return SearchDataConfig(
        run_dir=tmp_path, model={"path": tmp_path / "model"}, searches=[tmp_path / "search.jsonl"], texts=1
    )


def test_texts_are_right_and_a_visited_step_is_labelled_once(cfg):
    told = write_search_data(cfg)
    texts = [json.loads(line) for line in (cfg.run_dir / "texts.jsonl").read_text().splitlines()]
    assert [(row["question"], row["completion"]) for row in texts] == [("Q", "1;2;4"), ("Q", "1;3")]
    found = [(row.steps, row.labels) for row in read_steps(cfg.run_dir / "steps.jsonl")]
    # The path to node 7 has no step of its own, and node 1 has its label already.
    assert found == [
        (("1;", "2;", "3"), (0.75, 0.5, 1.0)),
        (("1;", "2;", "4"), (None, None, 1.0)),
        (("1;", "3"), (None, 0.25)),
    ]
    assert all(row.is_of_rollouts and row.tokens is not None for row in read_steps(cfg.run_dir / "steps.jsonl"))
    assert told == {"questions": 2, "solved": 2, "texts": 2, "paths": 3, "values": 5}


def test_nothing_right_and_other_files_are_refused(cfg):
    path = cfg.searches[0]
    path.write_text(path.read_text().replace('"right"', '"wrong"'))
    with pytest.raises(ValueError, match="found no right completion of 2 questions, required one to train on"):
        write_search_data(cfg)
    path.write_text('{"question": "Q", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"search.jsonl:1: found question, answer, required a line of search.jsonl"):
        write_search_data(cfg)
