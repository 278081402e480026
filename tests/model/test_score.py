"""A policy with a score: transformers' sequence classification on the same weights, packed or alone, in any layout."""

import itertools
import json
import random
from functools import cache

import pytest
import torch
from model_folders import save_model
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from score_updates import ScoreCase, pairs, rows_of_pairs, rows_of_steps, steps, train_scores
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from r1engine.batch import RowShape, Sequence, pack
from r1engine.config import Model, Optimizer, Parallel
from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import Folder
from r1engine.model.policy import Policy
from r1engine.stages.process_loss import cross_entropy_of_steps
from r1engine.stages.reward_loss import pairwise

FAMILIES = ["qwen2-tied", "qwen3", "llama", "qwen3-moe", "deepseek", "deepseek-mtp"]


def scored(world, folder, **settings) -> Policy:
    return Policy(Model(path=folder), Parallel(), Optimizer(eps=1e-3), world, head="score", **settings)


def texts(count: int = 7) -> list[list[int]]:
    rng = random.Random(4)
    return [[rng.randrange(2, 96) for _ in range(rng.randint(2, 40))] + [1] for _ in range(count)]


def scores_of(policy: Policy, items: list[list[int]], max_tokens: int = 80) -> dict[tuple, torch.Tensor]:
    """{tokens of a text: the score of each of them}."""
    rows, found = pack([Sequence(t, 0, 0.0) for t in items], RowShape(max_tokens))[0], {}
    for row, values in zip(rows, policy.scores(rows), strict=True):
        for a, b in itertools.pairwise(row.cu_seqlens.tolist()):
            found[tuple(row.tokens[a:b].tolist())] = values[a:b]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_match_transformers_on_the_exported_folder(world, folders, family, tmp_path):
    policy, items = scored(world, folders[family][0]), texts()
    found = scores_of(policy, items)
    policy.export(tmp_path / "out")
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "mismatched_keys")), loading
    is_biased = family in ("qwen2-tied", "qwen3")  # of 0: SGLang's classes have one, and begin it at random
    assert {*loading["unexpected_keys"]} == ({"score.bias"} if is_biased else set())
    assert model.config.num_labels == 1 and "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        for item in items:
            wanted = model.score(model.model(torch.tensor([item])).last_hidden_state)[0, :, 0]
            torch.testing.assert_close(found[tuple(item)], wanted, atol=1e-5, rtol=0)
            assert model(torch.tensor([item])).logits.item() == pytest.approx(found[tuple(item)][-1].item(), abs=1e-5)
        # A batch that is filled up, as transformers' users have it.
        pad, longest = model.config.pad_token_id, max(map(len, items))
        batch = torch.tensor([item + [pad] * (longest - len(item)) for item in items])
        logits = model(batch, attention_mask=(torch.arange(longest) < torch.tensor([[len(i)] for i in items])).int())
    wanted = torch.stack([found[tuple(item)][-1] for item in items])
    torch.testing.assert_close(logits.logits[:, 0], wanted, atol=1e-5, rtol=0)
    alone = torch.stack([scores_of(policy, [item])[tuple(item)][-1] for item in items])
    torch.testing.assert_close(wanted, alone, atol=2e-6, rtol=0)


def test_a_reward_model_goes_on_with_its_score_and_an_exported_one_is_the_same_bytes(world, folders, tmp_path):
    first = scored(world, folders["qwen3"][0], seed=3)
    first.export(tmp_path / "a")
    again = scored(world, tmp_path / "a", seed=4)
    items = texts(3)
    for item in items:
        assert torch.equal(scores_of(first, [item])[tuple(item)], scores_of(again, [item])[tuple(item)])
    again.export(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    scored(world, folders["qwen3"][0], seed=5).export(tmp_path / "c")
    heads = [load_file(tmp_path / name / "model.safetensors")["score.weight"] for name in "ac"]
    assert not torch.equal(*heads) and all(0.05 < head.std() < 0.4 for head in heads)  # of 1 / sqrt(33)


def test_a_bias_that_says_something_is_refused(world, folders, tmp_path):
    scored(world, folders["qwen2"][0]).export(tmp_path / "rm")
    weights = load_file(tmp_path / "rm" / "model.safetensors")
    assert not weights["score.bias"].any()
    save_file(weights | {"score.bias": torch.ones(1)}, tmp_path / "rm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"score.bias is \[1.0\], required is 0 or none"):
        scored(world, tmp_path / "rm")


@pytest.mark.parametrize("ends", [0, [0, 1], [1, 0, 2]])
def test_the_padding_of_an_exported_folder_is_no_end_of_a_text(world, folders, tmp_path, ends):
    save_model(tmp_path / "base", "qwen2")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends, "pad_token_id": 0}))
    scored(world, tmp_path / "base").export(tmp_path / "out")
    pad = json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"]
    assert pad not in (ends if isinstance(ends, list) else [ends])
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["pad_token"] == f"w{pad}"


def test_heads_that_do_not_fit_are_refused(world, folders, tmp_path):
    scored(world, folders["qwen2"][0]).export(tmp_path / "rm")
    with pytest.raises(ValueError, match="rm is a reward model, required is a language model"):
        Policy(Model(path=tmp_path / "rm"), Parallel(), Optimizer(), world)
    with pytest.raises(ValueError, match=r"mtp_loss_weight: found 0\.1, required 0: a reward model has no MTP"):
        model = Model(path=folders["deepseek-mtp"][0], mtp_loss_weight=0.1)
        Policy(model, Parallel(), Optimizer(), world, head="score")
    config = tmp_path / "rm" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_labels": 2}))
    with pytest.raises(ValueError, match="Qwen2ForSequenceClassification has 2 labels, required is 1"):
        read_architecture(tmp_path / "rm")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ValueError, match="'BertForSequenceClassification', required is one of Qwen2ForCausalLM"):
        read_architecture(tmp_path / "rm")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ValueError, match=r"1 missing \(lm_head.weight\); 2 unexpected \(score.bias, score.weight\)"):
        Folder(tmp_path / "rm", read_architecture(tmp_path / "rm"))


# ------------------------------------------------------------------ updates


def test_an_update_matches_transformers_with_adamw(world, folders, tmp_path):
    policy = scored(world, folders["deepseek"][0])
    policy.export(tmp_path / "start")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    for _ in range(2):
        stats = policy.update(rows_of_pairs(policy)[0], pairwise, 1e-2).metrics
        both = [[model(torch.tensor([text])).logits[0, 0] for text in pair] for pair in pairs()]
        loss = torch.stack([-torch.nn.functional.logsigmoid(chosen - rejected) for chosen, rejected in both]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    policy.export(tmp_path / "ours")
    for name, tensor in load_file(tmp_path / "ours" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-6, rtol=1e-5)


def test_scores_and_updates_of_steps_match_transformers_token_classification(world, folders, tmp_path):
    policy = scored(world, folders["qwen3"][0])
    policy.export(tmp_path / "start")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "start", dtype=torch.float32, num_labels=1)
    assert model.score.weight.shape == (1, 32) and not model.score.bias.any()
    trained = [p for name, p in model.named_parameters() if name != "score.bias"]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    ours = scores_of(policy, [text for text, _ in steps()])
    for _ in range(2):
        z = {tuple(text): model(torch.tensor([text])).logits[0, :, 0] for text, _ in steps()}
        if ours:
            for text, values in z.items():  # at every token
                torch.testing.assert_close(ours[text], values, atol=1e-5, rtol=0)
            ours = {}
        at = [(z[tuple(text)][index], label) for text, targets in steps() for index, label in targets]
        labels = torch.tensor([label for _, label in at])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.stack([value for value, _ in at]), labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        stats = policy.update(rows_of_steps(policy)[0], cross_entropy_of_steps, 1e-2).metrics
        assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert stats["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    expected = {name.removeprefix("model."): p for name, p in model.named_parameters()}
    policy.export(tmp_path / "ours")
    for name, tensor in load_file(tmp_path / "ours" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name.removeprefix("model.")].detach(), atol=2e-6, rtol=1e-5)


LAYOUTS = {
    "tp2": ("qwen2-tied", {"tensor": 2}),
    "tp2-plain": ("qwen3", {"tensor": 2, "sequence": False}),
    "pp2": ("llama", {"pipeline": 2}),
    "cp2": ("qwen2-tied", {"context": 2}),
    "ep2": ("deepseek", {"expert": 2}),
    "dp2": ("qwen3", {"data": 2}),
    "tp2-ep2": ("qwen3-moe", {"tensor": 2, "expert": 2}),
    "pp2-vp2": ("deepseek-mtp", {"pipeline": 2, "virtual": 2}),
    "cp2-ep2": ("qwen3-moe", {"context": 2, "expert": 2}),
}
EVERY_DAY = ("tp2", "pp2", "cp2")


@pytest.fixture(scope="module")
def layouts(request, folders, tmp_path_factory):
    """ranks -> name -> what train_scores found of the layouts that this session tests, at the first call."""
    root, out = folders["qwen2"][0].parent, tmp_path_factory.mktemp("scores")
    items = [i for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    names = {i.callspec.params["layout"] for i in items if "layout" in i.callspec.params}

    @cache
    def of(ranks: int) -> dict:
        cases = {name: ScoreCase(LAYOUTS[name][0], LAYOUTS[name][1] if ranks > 1 else {}) for name in names}
        return on_ranks(ranks, train_scores, cases, root, out / str(ranks))[0]

    return of


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in EVERY_DAY else [pytest.mark.rotating]) for name in LAYOUTS]
)
def test_every_layout_equals_one_rank(layouts, layout):
    found, expected = layouts(2)[layout], layouts(1)[layout]
    assert found.scores.keys() == expected.scores.keys()
    for text, score in expected.scores.items():
        assert found.scores[text] == pytest.approx(score, abs=1e-5)
    for a, b in zip(found.stats, expected.stats, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    weights = load_file(expected.exported / "model.safetensors")
    for name, tensor in load_file(found.exported / "model.safetensors").items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-5)
