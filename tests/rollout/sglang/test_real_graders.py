"""The reward model and the judge of `r1engine.rewards` behind real SGLang servers: what is asked and what comes."""

from __future__ import annotations

from pathlib import Path

import pytest
import real
import torch
import transformers
from model_folders import SIZES, save_model
from safetensors.torch import load_file, save_file

from r1engine.rewards.servers.endpoint import ModelServers
from r1engine.rewards.servers.judge import GenerativeJudge, Pair
from r1engine.rewards.servers.reward_model import RewardModel

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


MODEL = SIZES | {"vocab_size": len(real.BYTES), "max_position_embeddings": 2048}


def save_reward_model(folder: Path) -> torch.nn.Module:
    config = transformers.Qwen2Config(**MODEL, num_labels=1)
    torch.manual_seed(0)
    model = transformers.Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["score.bias"] = torch.zeros(1)  # SGLang's head has one, transformers' has not
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


def test_a_reward_models_scores_are_transformers(tmp_path):
    model = save_reward_model(tmp_path / "model")
    tokenizer = real.add_tokenizer(tmp_path / "model")
    pairs = [("1 + 1?", "2"), ("Hello!", "Hello, what can I do?"), ("1 + 1?", "It is 3.")]
    with real.serving(tmp_path / "model", tmp_path / "server.log", "--is-embedding") as url:
        rater = RewardModel(ModelServers(url), "tiny", "U: {prompt} A: {response}.", batch_size=2)
        rater.check()
        ratings = rater.rate(pairs)
    assert not any(problem for _, problem in ratings)
    for (score, _), (prompt, response) in zip(ratings, pairs, strict=True):
        with torch.no_grad():
            tokens = tokenizer.encode(f"U: {prompt} A: {response}.").ids
            assert score == pytest.approx(float(model(torch.tensor([tokens])).logits), abs=1e-4)


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
