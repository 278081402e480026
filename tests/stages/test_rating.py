"""Reward models that the policy's modules run: the scores of the exported folder, and what each sees."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from transformers import AutoModelForSequenceClassification

from r1engine.batch import Completion, Prompt
from r1engine.config import ConfigError, Model, Optimizer, Parallel, Rewards, RlConfig
from r1engine.data.question import Question
from r1engine.data.questions import read_questions
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.model.parallel import join, leave
from r1engine.model.policy import Policy
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.rewards import Score
from r1engine.rewards.rated import rendered
from r1engine.stages import make_stage
from r1engine.stages.check import check_data, check_start
from r1engine.stages.homes import everyones_graded
from r1engine.stages.rating import make_raters, rated

TEMPLATE = "<|pad|>{prompt} is asked. {response}<|end|>"
NAMES = ("helpfulness", "harmlessness")


@pytest.fixture(scope="module")
def places(tiny_base, tmp_path_factory, world) -> tuple[Path, Path]:
    """A policy's folder, and that of a reward model of its architecture with a score of a size that can be told."""
    base, model = tiny_base / "base" / "model", tmp_path_factory.mktemp("rated") / "rm"
    policy = Policy(Model(path=base), Parallel(), Optimizer(), world, head="score")
    policy._weights.local["score.weight"].data.mul_(5.0)
    policy.export(model)
    (model / "rated_template.txt").write_text(TEMPLATE)
    return base, model


def rewards_with(model: Path, *names: str, **more: object) -> Rewards:
    found = {f"{name}_model": {"path": model} for name in names} | dict.fromkeys(names, 1.0)
    return Rewards(**found | {"workers": 1} | more)


def transformers_score(model: Path, text: str) -> float:
    theirs = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return theirs(torch.tensor([load_tokenizer(model).encode(text).ids])).logits.item()


def graded(*rows: tuple[str, str, str]) -> list[tuple[Completion, Score]]:
    """(reward, rated_by, completion) each."""
    made = []
    for number, (reward, rated_by, text) in enumerate(rows):
        prompt = Prompt(number, [1], "12+34?", Question("12+34?", reward=reward, rated_by=rated_by))
        made.append((Completion(prompt, 0, [1], [0.0], text, False), Score("right", {"format": 1.0}, "well-formed")))
    return made


def test_ratings_are_the_folder_s_and_leave_the_policy_as_it_is(places, world):
    base, model = places
    policy = Policy(Model(path=base), Parallel(), Optimizer(), world)
    raters = make_raters(rewards_with(model, *NAMES), policy)
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    text = "<think>1+3=4</think> <answer>46</answer>"
    rows = graded(
        ("preference", "", text),
        ("preference", "helpfulness", text),
        ("preference", "harmlessness", text),
        ("math", "", text),
        ("preference", "helpfulness", "46 <|end|>"),
        ("preference", "harmlessness", "4" * 4000),
    )
    found = [score for _, score in rated(rows, raters, policy, world, row_tokens=64)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.weights())
    helpful = transformers_score(model, rendered(TEMPLATE, "12+34?", "46"))  # the summary alone
    harmless = transformers_score(model, rendered(TEMPLATE, "12+34?", text))
    assert abs(helpful - harmless) > 0.01
    assert found[0].components == {"format": 1.0} | {
        "helpfulness": pytest.approx(helpful, abs=1e-5),
        "harmlessness": pytest.approx(harmless, abs=1e-5),
    }
    assert found[1].components.keys() == {"format", "helpfulness"}
    assert found[2].components.keys() == {"format", "harmlessness"}
    assert found[3].components.keys() == {"format"}
    assert found[4].verdict == "undecided" and "helpfulness: the text holds <|end|>" in found[4].reason
    assert found[5].verdict == "undecided" and "positions" in found[5].reason
    assert [score.verdict for score in found[:4]] == ["right"] * 4


def of_ranks(base: Path, model: Path, rows: list, sizes: dict) -> list[Score]:
    """The scores that a rank knows when each question's completion is whole on one of the ranks alone."""
    world = join(Parallel(**sizes))
    policy = Policy(Model(path=base), Parallel(**sizes), Optimizer(), world)
    raters = make_raters(rewards_with(model, *NAMES), policy)
    own = [[row] for row in rows[world.rank :: world.size]]
    known = everyones_graded(own, lambda number: rows[number][0].prompt, world)
    assert sum(isinstance(completion, Completion) for completion, _ in known) == len(own)
    found = [score for _, score in rated(known, raters, policy, world, row_tokens=64)]
    leave()
    return found


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}])
def test_completions_of_other_ranks_are_rated_as_one_s_own(places, world, sizes):
    base, model = places
    texts = ["<think>1+3=4</think> <answer>46</answer>", "46", "46 <|end|>", "4" * 4000]
    rows = graded(*(("preference", NAMES[i % 2], f"{texts[i % 4]}{i}") for i in range(8)))
    policy = Policy(Model(path=base), Parallel(), Optimizer(), world)
    wanted = [s for _, s in rated(rows, make_raters(rewards_with(model, *NAMES), policy), policy, world, row_tokens=64)]
    assert {score.verdict for score in wanted} == {"right", "undecided"}
    for found in on_ranks(2, of_ranks, base, model, rows, sizes):
        assert [score.reason for score in found] == [score.reason for score in wanted]
        for score, alone in zip(found, wanted, strict=True):
            assert score.components == pytest.approx(alone.components, abs=1e-5)


def configured(base: Path, folder: Path, rewards: dict, rows: list[dict]) -> RlConfig:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RlConfig(
        model={"path": base},
        run_dir=folder / "run",
        data={"train": folder / "train.jsonl", "max_prompt_tokens": 120, "template": "none"},
        grpo={"questions": 4, "group_size": 2, "minibatches": 1, "kl_coef": 0.0},
        rollout={"max_tokens": 16},
        rewards={"workers": 1} | rewards,
        steps=1,
    )


ROWS = [{"question": f"{i}+1?", "reward": "preference", "rated_by": NAMES[i % 2]} for i in range(4)]


def test_an_iteration_is_rewarded_with_the_folder_s_scores(places, world, tmp_path):
    base, model = places
    named = {f"{name}_model": {"path": model} for name in NAMES} | {"helpfulness": 1.0, "harmlessness": {0: 1.0}}
    cfg = configured(base, tmp_path, named, ROWS)
    assert set(cfg.inputs()) >= {f"rewards.{name}_model.path" for name in NAMES}
    check_start(cfg, 1)
    stage = make_stage(cfg, world, Phases(), Progress("rated", enabled=False))
    try:
        stage.begin([])
        done = stage.advance(0)
    finally:
        stage.close()
    assert len(done.samples) == 8
    for row in done.samples:
        name = NAMES[int(row["question"][0]) % 2]
        seen = row["completion"]
        if name == "helpfulness":
            from r1engine.rewards.servers.preference import summary

            seen = summary(seen)
        wanted = transformers_score(model, rendered(TEMPLATE, row["question"], seen))
        assert row[f"reward/{name}"] == pytest.approx(wanted, abs=1e-5)
        assert not {f"reward/{other}" for other in NAMES if other != name} & row.keys()
    assert {"reward/helpfulness", "reward/harmlessness"} <= done.metrics.keys()


def test_what_cannot_rate_is_refused_before_a_run(places, folders, world, tmp_path):
    base, model = places
    cfg = configured(base, tmp_path, {"helpfulness": 1.0, "helpfulness_model": {"path": base}}, ROWS)
    with pytest.raises(
        ConfigError, match=r"rewards\.helpfulness_model\.path: .* is a language model, required \.\.\.For"
    ):
        check_start(cfg, 1)
    other = tmp_path / "other"
    Policy(Model(path=folders["qwen2"][0]), Parallel(), Optimizer(), world, head="score").export(other)
    (other / "rated_template.txt").write_text(TEMPLATE)
    cfg = configured(base, tmp_path, {"helpfulness": 1.0, "helpfulness_model": {"path": other}}, ROWS)
    with pytest.raises(
        ConfigError, match=r"other has 4 layers of 32 and 96 tokens, the policy .* give `urls` of a server"
    ):
        check_start(cfg, 1)
    bare = shutil.copytree(model, tmp_path / "bare", ignore=lambda *_: ["rated_template.txt"])
    cfg = configured(base, tmp_path, {"helpfulness": 1.0, "helpfulness_model": {"path": bare}}, ROWS)
    with pytest.raises(ConfigError, match=r"rated_template\.txt: no such file, required is the text as"):
        check_start(cfg, 1)
    settings = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(settings | {"pad_token_id": settings["eos_token_id"]}))
    (bare / "rated_template.txt").write_text(TEMPLATE)
    with pytest.raises(ConfigError, match="is the token that ends a response, required is another"):
        check_start(cfg, 1)
    cfg = configured(base, tmp_path, {"helpfulness": 1.0, "helpfulness_model": {"path": model}}, ROWS)
    with pytest.raises(
        ConfigError, match=r"train\.jsonl:2: rated_by is 'harmlessness', required rewards\.harmlessness_m"
    ):
        check_data(cfg)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "path and urls: found neither, required one of them"),
        ({"path": "/rm", "urls": ["http://a"]}, "path and urls: found both"),
        ({"urls": ["http://a"], "template": "{prompt}{response}"}, "model: found none, required the model's name"),
        ({"urls": ["http://a"], "model": "m"}, "template: found none, required the conversation"),
        ({"path": "/rm", "template": "{prompt}"}, "template: found '{prompt}', required one {prompt}, one {response}"),
    ],
)
def test_a_reward_model_is_a_folder_or_servers(model, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        RlConfig(rewards={"helpfulness": 1.0, "helpfulness_model": model})


@pytest.mark.parametrize("row", [{"rated_by": "both"}, {"rated_by": 1}, {"rated_by": "helpfulness", "reward": "math"}])
def test_a_question_names_a_reward_model_that_there_can_be(tmp_path, row):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "1+1?", "answer": "2", "reward": "preference"} | row))
    with pytest.raises(
        ValueError, match=r"q\.jsonl:1: rated_by is .*, required a text|required helpfulness or harmless"
    ):
        read_questions(path)
