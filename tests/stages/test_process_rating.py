"""The steps of completions as a reward: scores of the exported folder, credit of tokens, and an iteration with it."""

import itertools
import json

import pytest
import torch
from ranks import on_ranks
from transformers import AutoModelForTokenClassification

from r1engine.batch import Completion, Prompt, RowShape, Sample, pack, per_token, to_sequences
from r1engine.config import ConfigError, Model, Optimizer, Parallel, Rewards, RlConfig, StepMarking, TinyChainConfig
from r1engine.data.question import Question
from r1engine.demo import tiny_chain as demo
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.model.parallel import join, leave
from r1engine.model.policy import Policy
from r1engine.observe.hacking_alarm import Alarms
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.rewards import Score
from r1engine.search.scored_folder import NAME, ScoredFolder
from r1engine.stages import make_stage
from r1engine.stages.homes import everyones_graded
from r1engine.stages.process_rating import (
    make_step_rater,
    process_metrics,
    step_rated,
    warning_of,
    with_step_credit,
)


@pytest.fixture(scope="module")
def places(tmp_path_factory, world):
    """A chain world with a random model, and a process reward model of its architecture."""
    root = tmp_path_factory.mktemp("steps")
    demo.write_world(TinyChainConfig(run_dir=root, texts=1, train=8, heldout=1, hidden_size=32, layers=1))
    policy = Policy(Model(path=root / "model"), Parallel(), Optimizer(), world, head="score")
    policy._weights.local["score.weight"].data.mul_(3.0)
    policy.export(root / "prm")
    (root / "prm" / NAME).write_text(ScoredFolder.of(StepMarking(marks=demo.MARKS), "correctness").to_text())
    return root


def completion(root, number, text, *, stop=True, truncated=False):
    tokenizer = load_tokenizer(root / "model")
    asked = tokenizer.encode("What is 7?").ids
    tokens = tokenizer.encode_continuations([text])[0].ids + ([1] if stop else [])
    prompt = Prompt(number, asked, "What is 7?", Question("What is 7?", "7"))
    return Completion(prompt, 0, tokens, [0.0] * len(tokens), text, truncated), Score("right", {"accuracy": 1.0}, "")


def rewards_of(root, **more):
    return Rewards(**{"process": 0.5, "process_model": root / "prm", "workers": 1} | more)


def test_scores_of_steps_are_the_folder_s_and_leave_the_policy_as_it_is(places, world):
    policy = Policy(Model(path=places / "model"), Parallel(), Optimizer(), world)
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    rater = make_step_rater(rewards_of(places), policy)
    rows = [
        completion(places, 0, "1a+2=3;3b*2=6</think>6"),
        completion(places, 1, ""),
        completion(places, 2, "3;" * 400),
    ]
    found = [score for _, score in step_rated(rows, rater, policy, world, row_tokens=64)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.weights())
    model = AutoModelForTokenClassification.from_pretrained(places / "prm", dtype=torch.float32, num_labels=1)
    text = rows[0][0].prompt.tokens + rows[0][0].tokens
    with torch.no_grad():
        theirs = model(torch.tensor([text])).logits[0, :, 0].sigmoid().tolist()
    ends = [end for end, _ in found[0].steps]
    assert len(ends) == 3 and ends[-1] == len(rows[0][0].tokens) - 1  # the stop token is of no step
    wanted = [theirs[len(rows[0][0].prompt.tokens) + end - 1] for end in ends]
    assert [value for _, value in found[0].steps] == pytest.approx(wanted, abs=1e-5)
    assert found[0].components == {"accuracy": 1.0, "process": pytest.approx(min(wanted), abs=1e-5)}
    assert [score.verdict for score in found] == ["right", "undecided", "undecided"]  # no step; too long
    metrics = process_metrics([(c, s) for (c, _), s in zip(rows, found, strict=True)])
    assert metrics["process/steps"] == 3 and metrics["process/score_min"] == pytest.approx(min(wanted), abs=1e-5)


def of_ranks(places, rows: list, sizes: dict) -> list[Score]:
    """The scores that a rank knows when each question's completion is whole on one of the ranks alone."""
    world = join(Parallel(**sizes))
    policy = Policy(Model(path=places / "model"), Parallel(**sizes), Optimizer(), world)
    own = [[row] for row in rows[world.rank :: world.size]]
    known = everyones_graded(own, lambda number: rows[number][0].prompt, world)
    found = step_rated(known, make_step_rater(rewards_of(places), policy), policy, world, row_tokens=64)
    leave()
    return [score for _, score in found]


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}])
def test_steps_of_other_ranks_are_scored_as_one_s_own(places, world, sizes):
    texts = ["1a+2=3;3b*2=6</think>6", "", "1a+2=3;3b*2=6;6c-2=4</think>4", "3;" * 400, "1a+2=3</think>3"]
    rows = [completion(places, number, text) for number, text in enumerate(texts)]
    policy = Policy(Model(path=places / "model"), Parallel(), Optimizer(), world)
    wanted = step_rated(rows, make_step_rater(rewards_of(places), policy), policy, world, row_tokens=64)
    for found in on_ranks(2, of_ranks, places, rows, sizes):
        for score, (_, alone) in zip(found, wanted, strict=True):
            assert (score.verdict, [end for end, _ in score.steps]) == (alone.verdict, [end for end, _ in alone.steps])
            assert [v for _, v in score.steps] == pytest.approx([v for _, v in alone.steps], abs=1e-5)


def test_credit_of_tokens_is_added_to_the_advantage_and_reaches_the_row(places):
    values = [((2, 1.0), (4, 0.0)), ((1, 1.0), (3, 1.0)), ((2, 0.9),)]
    graded = []
    for number, steps in enumerate(values):
        prompt = Prompt(0, [7], "q", Question("q"))
        count = steps[-1][0] + 1
        made = Completion(prompt, number, [9] * count, [0.0] * count, "", number == 2)
        graded.append((made, Score("right", {}, "", steps=steps)))
    samples = [Sample(c, 0.25) for c, _ in graded]
    rewards = Rewards(process=2.0, process_model=places, process_credit="deepseekmath")
    found = with_step_credit(samples, graded, rewards, 3)
    assert per_token(found[0].advantage).tolist() == [0.25 - 2, 0.25 - 2, 0.25 - 3, 0.25 - 3, 0.25 - 3]  # -1, -1.5
    assert per_token(found[1].advantage).tolist() == [0.25 + 2, 0.25 + 1, 0.25 + 1, 0.25 + 1]
    assert found[2].advantage == 0.25  # cut off: no credit
    row = pack(to_sequences(found), RowShape(32))[0][0]
    starts = row.cu_seqlens.tolist()
    rows = {tuple(row.advantage[a:b].tolist()) for a, b in itertools.pairwise(starts)}
    assert (0.0, -1.75, -1.75, -2.75, -2.75, -2.75) in rows and (0.0, 0.25, 0.25, 0.25) in rows
    zero = [Sample(graded[0][0], ((5, 0.0),)), Sample(graded[1][0], ((3, 0.0), (4, 1.0)))]
    assert len(to_sequences(zero, skip_zero_advantage=True)) == 1
    assert with_step_credit(samples, graded, rewards.model_copy(update={"process_credit": "min"}), 3) is samples


def test_an_iteration_with_credit_of_steps(places, world, tmp_path):
    notes = []
    cfg = RlConfig(
        run_dir=tmp_path,
        steps=2,
        model={"path": places / "model"},
        data={"train": places / "train.jsonl", "template": "r1_zero", "max_prompt_tokens": 40},
        rollout={"max_tokens": 24, "slots": 16},
        grpo={"questions": 2, "group_size": 4, "minibatches": 1, "kl_coef": 0.0, "truncated": "mask"},
        rewards=rewards_of(places, process_credit="deepseekmath").model_dump(),
        max_row_tokens=512,
    )
    progress = Progress("", enabled=False)
    progress.note = notes.append
    stage = make_stage(cfg, world, Phases(), progress)
    try:
        stage.begin([])
        done = stage.advance(0)
    finally:
        stage.close()
    assert any("deepseekmath pays for steps, so for length" in note for note in notes)
    assert done.metrics["process/steps"] >= 1 and 0 < done.metrics["process/score_min"] < 1
    assert done.metrics["reward/process"] == pytest.approx(done.metrics["process/score_min"])
    assert done.metrics["alarm/process"] == 0.0 and "loss" in done.metrics
    assert json.dumps(done.samples)


def test_what_does_not_fit_is_refused(places, tmp_path):
    assert warning_of(rewards_of(places)) == ""
    found = Rewards(process=1.0).problems() + Rewards(process_model=places).problems()
    assert found == [
        "rewards.process: found 1 and process_model null, required a weight and a model, or neither",
        f"rewards.process: found 0 and process_model {places}, required a weight and a model, or neither",
    ]
    assert rewards_of(places, process_credit="pure").weights_at(0)["process"] == 0.0
    assert rewards_of(places).weights_at(0)["process"] == 0.5


def test_a_folder_without_steps_is_refused(places, world):
    policy = Policy(Model(path=places / "model"), Parallel(), Optimizer(), world)
    with pytest.raises(ConfigError, match=rf"rewards\.process_model: found no {NAME}"):
        make_step_rater(rewards_of(places, process_model=places / "model"), policy)


def test_the_alarm_of_steps_looks_at_a_short_window_too():
    steps = [{"reward/process": 0.1 * i, "reward/accuracy": 1 - 0.03 * i} for i in range(20)]
    quick, slow = Alarms(["process"], window=40, quick=["process"]), Alarms(["process"], window=40)
    assert [bool(quick.update(step)) for step in steps].index(True) == 15
    assert not any(slow.update(step) for step in steps)
