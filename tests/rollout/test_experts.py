"""Latent attention and routed experts in the embedded generator, against transformers and against the trainer."""

import itertools

import pytest
import torch
from model_folders import save_model
from policies import policy_of
from safetensors.torch import load_file

from r1engine import rollout
from r1engine.batch import Completion, Prompt, RowShape, Sample, pack, to_sequences
from r1engine.config import RlConfig
from r1engine.data.question import Question
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.stages.sft import cross_entropy

FAMILIES = ("deepseek", "moonlight", "qwen3-moe")


def generate(folder, weights, *, num_samples=2, slots=4, temperature=1.0) -> list[Completion]:
    generator = LocalGenerator(folder, seed=7, slots=slots, device=torch.device("cpu"), dtype=torch.float32)
    generator.load_weights(weights)
    prompts = [Prompt(i, [2 + (5 * i + j) % 90 for j in range(1 + 7 * i)], "", Question("")) for i in range(4)]
    return rollout.generate(
        generator, prompts, num_samples=num_samples, step=3, max_tokens=30, sampling=rollout.Sampling(temperature)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logp_agrees_with_transformers(tmp_path, family):
    model = save_model(tmp_path, family)
    completions = generate(tmp_path, load_file(tmp_path / "model.safetensors").items(), temperature=0.8)
    assert max(len(c.tokens) for c in completions) == 30
    with torch.no_grad():
        for c in completions:
            tokens = torch.tensor([c.prompt.tokens + c.tokens])
            logp = torch.log_softmax(model(tokens).logits[0] / 0.8, dim=-1)
            expected = logp[len(c.prompt.tokens) - 1 : -1].gather(1, torch.tensor(c.tokens)[:, None])[:, 0]
            assert (torch.tensor(c.logp) - expected).abs().max() < 1e-5


def rows_of(completions, *, replays_experts=True):
    samples = [Sample(c, 1.0) for c in completions]
    return pack(to_sequences(samples, replays_experts=replays_experts), RowShape(max_tokens=128))[0]


def distance(policy, rows) -> float:
    """Largest difference of the trainer's log-probabilities from the generator's."""
    pairs = zip(rows, policy.logprobs(rows), strict=True)
    return max((logp - row.rollout_logp)[row.loss_weight != 0].abs().max().item() for row, logp in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_generator_and_trainer_agree_on_logp_and_experts(world, folders, family):
    folder, _ = folders[family]
    policy = policy_of(RlConfig(model={"path": folder}), world)
    completions = generate(folder, policy.weights())
    for c in completions:
        assert c.experts.shape[0] == len(c.prompt.tokens) + len(c.tokens) - 1
    free, replayed = rows_of(completions, replays_experts=False), rows_of(completions)
    assert free[0].experts is None
    assert distance(policy, free) < 1e-5
    assert distance(policy, replayed) < 1e-5
    for row in replayed:  # the last token of a sequence was never run
        without = (row.experts[:, 0, 0] < 0).nonzero().flatten() + 1
        assert without.tolist() == row.cu_seqlens[1:].tolist()


@pytest.mark.parametrize("recompute", [False, True])
def test_replayed_experts_decide_where_the_trainer_would_choose_others(world, folders, recompute):
    folder, _ = folders["deepseek"]
    policy = policy_of(RlConfig(model={"path": folder, "recompute": recompute}), world)
    # The generator chooses with other biases, as if its rounding were coarse: the weights are the same.
    moved = ((n, -t if n.endswith("e_score_correction_bias") else t) for n, t in policy.weights())
    completions = generate(folder, moved)
    assert distance(policy, rows_of(completions, replays_experts=False)) > 1e-2
    rows = rows_of(completions)
    assert distance(policy, rows) < 1e-5
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    policy.update(rows, cross_entropy, 1e-3)
    gates = [name for name in before if name.endswith("mlp.gate.weight")]
    after = {name: tensor.clone() for name, tensor in policy.weights()}
    assert all(not torch.equal(before[name], after[name]) for name in gates)  # the router still learns


def test_replayed_gradient_is_that_of_the_replayed_choice(world, folders):
    # The choice of the trainer itself, recorded and replayed, gives the gradient of the free choice.
    folder, _ = folders["moonlight"]
    results = []
    for replays in (False, True):
        policy = policy_of(RlConfig(model={"path": folder}), world)
        rows = rows_of(generate(folder, policy.weights()), replays_experts=replays)
        results.append(policy.update(rows, cross_entropy, 1e-3).metrics)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_experts_survive_packing(folders):
    completions = generate(folders["qwen3-moe"][0], load_file(folders["qwen3-moe"][0] / "model.safetensors").items())
    by_tokens = {tuple(c.prompt.tokens + c.tokens): c.experts for c in completions}
    for row in rows_of(completions):
        for a, b in itertools.pairwise(row.cu_seqlens.tolist()):
            expected = by_tokens[tuple(row.tokens[a:b].tolist())]
            assert torch.equal(row.experts[a : b - 1], expected)
