"""The reward model and the judge of `r1engine.rewards` behind real SGLang servers: what is asked and what comes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import real
import torch
import transformers
from model_folders import SIZES, save_model

from r1engine.batch import Sequence, pack
from r1engine.config import Model, Optimizer, Parallel
from r1engine.model.policy import Policy
from r1engine.rewards.rated import PROBE
from r1engine.rewards.servers.endpoint import ModelServers
from r1engine.rewards.servers.judge import GenerativeJudge, Pair
from r1engine.rewards.servers.reward_model import RewardModel

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


MODEL = SIZES | {"vocab_size": len(real.BYTES), "max_position_embeddings": 2048}


def trained_scores(policy: Policy, texts: list[list[int]]) -> list[float]:
    """Of the last token of each text, as the trainer rates it."""
    rows = pack([Sequence(text, 0, 0.0) for text in texts], policy.row_shape(256))[0]
    found = {}
    for row, values in zip(rows, policy.scores(rows), strict=True):
        for start, end in pairwise(row.cu_seqlens.tolist()):
            found[tuple(row.tokens[start:end].tolist())] = float(values[end - 1])
    return [found[tuple(text)] for text in texts]


def test_scores_in_the_trainer_of_its_export_and_behind_a_server_are_the_same(tmp_path, world):
    save_model(tmp_path / "base", "qwen2", **MODEL)
    tokenizer = real.add_tokenizer(tmp_path / "base")
    policy = Policy(Model(path=tmp_path / "base"), Parallel(), Optimizer(), world, seed=3, head="score")
    policy.export(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    pairs = [("1 + 1?", "2"), ("Hello!", "Hello, what can I do?"), ("1 + 1?", "It is 3.")]
    with real.serving(tmp_path / "model", tmp_path / "server.log", "--is-embedding") as url:
        (probe,) = trained_scores(policy, [tokenizer.encode("U: {} A: {}.".format(*PROBE)).ids])
        rater = RewardModel(ModelServers(url), "tiny", "U: {prompt} A: {response}.", batch_size=2, probe_score=probe)
        rater.check()
        ratings = rater.rate(pairs)
    assert not any(problem for _, problem in ratings)
    texts = [tokenizer.encode(f"U: {prompt} A: {response}.").ids for prompt, response in pairs]
    for (score, _), text, trained in zip(ratings, texts, trained_scores(policy, texts), strict=True):
        with torch.no_grad():
            exported = float(model(torch.tensor([text])).logits)
        assert score == pytest.approx(exported, abs=1e-4) and trained == pytest.approx(exported, abs=1e-5)


def test_a_judge_that_talks_nonsense_decides_nothing(tmp_path):
    save_model(tmp_path / "model", "qwen2", **MODEL)
    real.add_tokenizer(tmp_path / "model")
    with real.serving(tmp_path / "model", tmp_path / "server.log") as url:
        judge = GenerativeJudge(ModelServers(f"{url}/v1"), "tiny", max_tokens=4)
        verdicts = judge.judge([Pair("1/2", "0.5"), Pair("3", "4")])
        with pytest.raises(RuntimeError, match=r"judge tiny at .* found undecided \(the judge replied"):
            judge.check()
    assert [verdict for verdict, _ in verdicts] == ["undecided"] * 2
    assert all("the judge replied" in reason and "required SAME or DIFFERENT" in reason for _, reason in verdicts)
