"""The stage `label` on a tiny model: a line a solution, undecided is null, a killed one goes on to the same file."""

import json
from types import SimpleNamespace

import pytest
import torch

from r1engine.batch import Prompt
from r1engine.config import LabelConfig, StepMarking, TinyChainConfig
from r1engine.data.question import Question
from r1engine.data.steps import read_steps
from r1engine.demo import tiny_chain as demo
from r1engine.observe.progress import Progress
from r1engine.ranks import World
from r1engine.sampling.labelling import _labelled, _Labelling, label
from r1engine.search.label import RolloutAsk

ALONE = World(0, 1, torch.device("cpu"))
DIGESTS = {"model.path": "m", "questions": "q"}


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    cfg = TinyChainConfig(
        run_dir=tmp_path_factory.mktemp("chains"), texts=1, train=5, heldout=1, hidden_size=32, layers=1
    )
    demo.write_world(cfg)
    return cfg.run_dir


def settings(chains, run_dir, **of_label):
    return LabelConfig(
        run_dir=run_dir,
        model={"path": chains / "model"},
        questions=chains / "train.jsonl",
        template="r1_zero",
        questions_at_once=2,
        steps={"marks": demo.MARKS, "max_step_tokens": 5},
        label={"solutions": 2, "rollouts": 2} | of_label,
        rollout={"max_tokens": 12, "slots": 16},
        rewards={"workers": 1},
    )


def test_labels_of_a_run_and_of_one_that_was_killed_are_the_same(chains, tmp_path):
    found = label(settings(chains, tmp_path / "a"), ALONE, DIGESTS)
    file = tmp_path / "a" / "steps.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()][1:]
    assert [row["id"] for row in rows] == [f"{q}/{n}" for q in range(5) for n in range(2)]
    assert found["solutions"] == 10 and found["steps"] == sum(len(row["steps"]) for row in rows)
    for row, read in zip(rows, read_steps(file), strict=True):
        assert max(len(step) for step in row["tokens"]) <= 5 and read.is_of_rollouts
        assert len(row["labels"]) == len(row["right"]) == len(row["decided"]) == len(row["steps"])
        for value, right, decided in zip(row["labels"][:-1], row["right"], row["decided"], strict=False):
            assert value == (float(right > 0) if decided else None) and (decided in (0, 1, 2))
    # Killed inside the third question's lines, and one inside a line.
    lines = file.read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "steps.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    label(settings(chains, tmp_path / "b"), ALONE, DIGESTS)
    assert (tmp_path / "b" / "steps.jsonl").read_text() == file.read_text()
    with pytest.raises(ValueError, match=r"steps\.jsonl: made with other policy; choose another run_dir, or remove it"):
        label(settings(chains, tmp_path / "a"), ALONE, DIGESTS | {"model.path": "other"})


def test_questions_of_which_nothing_is_decided_are_named(tmp_path, capsys):
    of_questions = {3: [[None, None], [None]], 5: [[None, 0.0]], 9: [[None]]}
    rows = [
        [{"id": f"{q}/{i}", "labels": labels} for i, labels in enumerate(found)] for q, found in of_questions.items()
    ]
    crew = SimpleNamespace(label=lambda prompts: rows, away=[])  # a model and a grader outside of this test
    asked = [Prompt(number, [1], "", Question("")) for number in (2, 3, 5, 9)]
    with Progress("run", enabled=True) as progress:
        found = _labelled(crew, tmp_path, ALONE, asked, progress)
    assert [row["labels"] for row in found] == [[None, None], [None], [None, 0.0], [None]]  # unknown is not 0
    said = capsys.readouterr().out
    assert "no step is labelled of 3 solutions (questions 3, 9): nothing is decided" in said
    assert "nothing is written of 1 questions (questions 2): no solution is decided" in said  # as a tree leaves it


def test_marks_that_the_policy_does_not_write_are_refused(chains, tmp_path, monkeypatch, capsys):
    few = settings(chains, tmp_path / "few").model_copy(update={"steps": StepMarking(marks=["</step>"])})
    label(few, ALONE, DIGESTS)
    assert "steps.marks: found '</step>', which no solution of 5 questions has" in capsys.readouterr().out
    monkeypatch.setattr("r1engine.sampling.labelling.MARKED", 4)
    cfg = settings(chains, tmp_path).model_copy(update={"steps": StepMarking(marks=["</step>"])})
    with pytest.raises(ValueError, match=r"steps\.marks: found '</step>', required a mark that occurs in completions"):
        label(cfg, ALONE, DIGESTS)


def test_no_two_rollouts_of_a_question_have_one_stream(monkeypatch):
    monkeypatch.setattr("r1engine.sampling.labelling.DRAWS", 4)
    one = _Labelling(Prompt(0, [1], "", Question("")), [])
    prefixes = [((5,),), ((6,),), ((5,),), ((5,),), ((6,),)]  # solutions share prefixes
    streams = [stream for prefix in prefixes for stream in one.streams(RolloutAsk(prefix, 3))]
    assert len({*streams}) == 15
    assert streams[:6] == [1_000_000 + i for i in (0, 1, 2, 4, 5, 6)]


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"label\.kind: found soft, required hard with label\.method bisect"):
        LabelConfig(label={"method": "bisect", "kind": "soft"})
    with pytest.raises(ValueError, match=r"label\.rollouts: found 5000, required at most 4096 draws from one step"):
        LabelConfig(label={"rollouts": 5000})
    assert LabelConfig().source_problems()[0].startswith("model.path: found null")
