"""The Megatron policy on one rank, against transformers on the same weights."""

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from model_folders import save_model
from policies import policy_of
from safetensors.torch import load_file

from r1engine.batch import PackedBatch, RowShape, Sequence, pack
from r1engine.config import Grpo, RlConfig
from r1engine.grpo import objective, objective_of
from r1engine.model.policy import Policy
from r1engine.stages.sft import CROSS_ENTROPY, cross_entropy

FAMILIES = ["qwen2", "qwen2-tied", "qwen3", "llama", "qwen3-moe", "deepseek", "moonlight"]


def new_policy(world, folder, **sections) -> Policy:
    return policy_of(RlConfig(model={"path": folder}, **sections), world)


def sequences(count: int = 7, *, equal: bool = False) -> list[Sequence]:
    rng = random.Random(3)
    # From 2 on: transformers keeps the embedding of the padding token (0) at zero and without gradient.
    lengths = [12 if equal else rng.randint(2, 40) for _ in range(count)]
    tokens = [[rng.randrange(2, 96) for _ in range(n)] for n in lengths]
    return [Sequence(t, 1, rng.random() / count, advantage=1.0) for t in tokens]


def rows_of(items: list[Sequence], max_tokens: int = 512, multiple: int = 1) -> list[PackedBatch]:
    return pack(items, RowShape(max_tokens=max_tokens, multiple=multiple))[0]


def unpacked(rows: list[PackedBatch], values: list[torch.Tensor]) -> dict[tuple, torch.Tensor]:
    """{tokens of a sequence: its values}, whatever row it is in."""
    out = {}
    for row, value in zip(rows, values, strict=True):
        ends = row.cu_seqlens.tolist()
        for a, b in itertools.pairwise(ends):
            out[tuple(row.tokens[a:b].tolist())] = value[a:b]
    return out


def hf_logp(model, tokens: list[int]) -> torch.Tensor:
    """[T], entry t belongs to tokens[t]; the first is 0."""
    x = torch.tensor([tokens])
    logp = torch.log_softmax(model(x).logits[0].double(), -1)[:-1].gather(1, x[0, 1:, None])[:, 0]
    return torch.cat([logp.new_zeros(1), logp])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("equal", [False, True], ids=["ragged", "equal-lengths"])
def test_logprobs_match_transformers(world, folders, family, equal):
    folder, model = folders[family]
    policy = new_policy(world, folder)
    items = sequences(equal=equal)
    rows = rows_of(items, max_tokens=80)
    assert len(rows) > 1
    found = unpacked(rows, policy.logprobs(rows))
    with torch.no_grad():
        for item in items:
            torch.testing.assert_close(
                found[tuple(item.tokens)].double(), hf_logp(model, item.tokens), atol=1e-5, rtol=0
            )


STRETCHED = {
    "qwen3": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "qwen2": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.8},
    "qwen3-moe": {"rope_type": "linear", "factor": 4.0},
    "llama": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("family", STRETCHED)
def test_logprobs_past_the_original_context_match_transformers(world, tmp_path, family):
    model = save_model(tmp_path, family, rope_parameters=STRETCHED[family] | {"rope_theta": 500.0})
    policy = new_policy(world, tmp_path)
    items = sequences(3)
    items.append(Sequence([2 + i % 94 for i in range(120)], 1, 1.0))
    rows = rows_of(items)
    found = unpacked(rows, policy.logprobs(rows))
    with torch.no_grad():
        for item in items:
            wanted = hf_logp(model, item.tokens)
            torch.testing.assert_close(found[tuple(item.tokens)].double(), wanted, atol=1e-5, rtol=0)


def test_temperature_divides_the_logits(world, folders):
    folder, model = folders["qwen2"]
    policy = new_policy(world, folder, rollout={"temperature": 0.7})
    row = rows_of([Sequence([5, 6, 7, 8], 1, 1.0)])[0]
    with torch.no_grad():
        logits = model(row.tokens[None]).logits[0, :-1].double() / 0.7
    expected = torch.log_softmax(logits, -1).gather(1, row.tokens[1:, None])[:, 0]
    torch.testing.assert_close(policy.logprobs([row])[0][1:].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_match_transformers_with_adamw(world, folders, family, tmp_path):
    folder, _ = folders[family]
    model = type(folders[family][1]).from_pretrained(folder, dtype=torch.float32)
    policy = new_policy(world, folder, optimizer={"clip_grad": 0.5, "eps": 1e-3})  # eps: Adam's sign(g) hides errors
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    items = sequences()
    for _ in range(2):
        stats = policy.update(rows_of(items, max_tokens=80), cross_entropy, 1e-2).metrics
        loss = -sum((s.weight * hf_logp(model, s.tokens)[1:]).sum() for s in items)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    model.save_pretrained(tmp_path)  # in memory transformers fuses the experts
    expected = load_file(tmp_path / "model.safetensors")
    for name, tensor in policy.weights():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-5)


R1 = Grpo(kl_coef=0.1, clip_eps=0.2)
CISPO = Grpo(kl_coef=0.1, kl_grad="k2", loss="cispo", tis="truncate", tis_high=1.1)


@pytest.mark.parametrize(
    ("family", "cfg", "old"),
    [("qwen2", R1, "own"), ("qwen2-tied", CISPO, "known"), ("qwen2", CISPO, "stale"), ("qwen2", None, "own")],
)
def test_a_loss_with_the_output_layer_is_the_loss_by_itself(world, folders, family, cfg, old):
    """`cfg` None: of texts."""

    def with_logps(policy: Policy, row: PackedBatch) -> PackedBatch:
        (logp,) = policy.logprobs([row])
        stale = torch.arange(len(logp)) % 3 == 0 if old == "stale" else None
        old_logp = None if old == "own" else logp + 0.1
        return replace(row, ref_logp=logp - 0.1, rollout_logp=logp + 0.05, old_logp=old_logp, stale=stale)

    loss, of_head = (partial(objective, cfg=cfg), objective_of(cfg)) if cfg else (cross_entropy, CROSS_ENTROPY)
    results = []
    for with_head in (of_head, None):
        policy = new_policy(world, folders[family][0], optimizer={"eps": 1e-3}, rollout={"temperature": 0.9})
        rows = [with_logps(policy, row) for row in rows_of(sequences(), max_tokens=80, multiple=8)]
        done = policy.update(rows, loss, 1e-3, with_head)
        logp = [values[row.loss_weight != 0] for values, row in zip(done.logp, rows, strict=True)]
        results.append((done.metrics, logp, dict(policy.weights())))
    (metrics, logp, weights), (others_metrics, others_logp, others) = results
    assert metrics == pytest.approx(others_metrics, rel=1e-5, abs=1e-7)
    torch.testing.assert_close((logp, weights), (others_logp, others), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("multiple", [1, 8])
def test_loss_and_gradients_do_not_depend_on_packing(world, folders, multiple):
    folder, _ = folders["qwen3"]
    results = []
    for max_tokens in (48, 512):
        policy = new_policy(world, folder, optimizer={"eps": 1e-3})  # as above
        stats = policy.update(rows_of(sequences(), max_tokens, multiple), cross_entropy, 1e-3).metrics
        results.append((stats, {name: tensor.clone() for name, tensor in policy.weights()}))
    (a, weights_a), (b, weights_b) = results
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for name in weights_a:
        torch.testing.assert_close(weights_a[name], weights_b[name], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "deepseek"])
@pytest.mark.parametrize("recompute", [True, "selective"])
def test_recompute_changes_nothing(world, folders, family, recompute):
    results = []
    for choice in (False, recompute):
        model = {"path": folders[family][0], "recompute": choice}
        policy = policy_of(RlConfig(model=model, optimizer={"eps": 1e-3}), world)
        stats = policy.update(rows_of(sequences()), cross_entropy, 1e-3).metrics
        results.append((stats, {name: tensor.clone() for name, tensor in policy.weights()}))
    (expected, weights), (found, others) = results
    assert found == pytest.approx(expected, rel=1e-6)
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_bit_identical_to_what_was_imported(world, folders, family, tmp_path):
    folder, _ = folders[family]
    new_policy(world, folder).export(tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    if family.endswith("tied"):
        before.pop("lm_head.weight", None)  # the same tensor under another name
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_reference_logprobs_leave_the_policy_alone(world, folders):
    policy = new_policy(world, folders["qwen2"][0])
    rows = rows_of(sequences())
    start = policy.logprobs(rows)[0]
    snapshot = policy.snapshot()
    policy.update(rows, cross_entropy, 1e-2)
    moved = policy.logprobs(rows)[0]
    assert not torch.equal(start, moved)
    assert torch.equal(policy.reference_logprobs(snapshot, rows)[0], start)
    assert torch.equal(policy.logprobs(rows)[0], moved)


def test_checkpoint_restores_weights_optimizer_and_reference(world, folders, tmp_path):
    policy = new_policy(world, folders["qwen2-tied"][0])
    rows = rows_of(sequences())
    snapshot = policy.snapshot()
    policy.update(rows, cross_entropy, 1e-2)
    policy.save(tmp_path, snapshot)
    policy.update(rows, cross_entropy, 1e-2)
    expected = {name: tensor.clone() for name, tensor in policy.weights()}

    other = new_policy(world, folders["qwen2-tied"][0])
    reference = other.load(tmp_path, has_snapshot=True)
    other.update(rows, cross_entropy, 1e-2)  # equal only if Adam's moments and step count came back
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.weights())
    assert all(torch.equal(reference[name], snapshot[name]) for name in snapshot)


def test_nan_in_the_gradient_stops_the_run(world, folders):
    policy = new_policy(world, folders["qwen2"][0])
    before = {name: tensor.clone() for name, tensor in policy.weights()}

    def broken(outputs, row):
        return (outputs.logp * torch.nan).sum(), {}

    with pytest.raises(RuntimeError, match="found NaN"):
        policy.update(rows_of(sequences()), broken, 1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.weights())
