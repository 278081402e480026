"""A supervised step on conversations in every layout: the loss and each gradient are those of transformers' float64
cross-entropy. One start a number of ranks: importing Megatron costs more than a case."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from chat_folders import KINDS, save_tokenizer
from model_folders import save_model
from ranks import on_ranks
from sft_updates import Step, steps
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

RANDOM = random.Random(3)


def words(count: int) -> str:
    return " ".join("".join(RANDOM.choices("abcdefgh", k=4)) for _ in range(count))


def turns(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


DATA = {
    # Seven texts, each longer than half of a row: five of one turn, one of two.
    "seven": [turns(words(4), words(16 + i)) for i in range(5)] + [turns(words(2), words(14), words(1), words(6))],
    # On two ranks: one has two trained tokens, the other three hundred.
    "uneven": [turns(words(20), "a"), turns("b", words(36))],
}
CASES: dict[str, tuple[int, str, str, dict]] = {  # name -> (ranks, family, data, settings)
    "one-row": (1, "qwen2-tied", "seven", {"rows": 2048}),
    "seven-rows": (1, "qwen2-tied", "seven", {"rows": 256}),
    "dp2-uneven": (2, "qwen2-tied", "uneven", {"parallel": {"data": 2}}),
    "tp2": (2, "qwen3", "seven", {"parallel": {"tensor": 2}}),
    "cp2": (2, "llama", "seven", {"parallel": {"context": 2}}),
    "cp2-uneven": (2, "qwen2-tied", "uneven", {"parallel": {"context": 2}, "rows": 256}),
    "dp2-sharded": (2, "llama", "seven", {"parallel": {"data": 2, "distributed_optimizer": True}}),
    "pp2": (2, "qwen2-tied", "seven", {"parallel": {"pipeline": 2}}),
    "pp2-vp2": (2, "qwen2-tied", "seven", {"parallel": {"pipeline": 2, "virtual": 2}, "rows": 256}),
    "ep2": (2, "qwen3-moe", "seven", {"parallel": {"expert": 2}}),
    "tp2-ep2": (2, "deepseek", "seven", {"parallel": {"tensor": 2, "expert": 2}}),
    "pp2-mtp": (2, "deepseek-mtp", "seven", {"parallel": {"pipeline": 2}, "model": {"mtp_loss_weight": 0.3}}),
}
ALWAYS = ("seven-rows", "dp2-uneven", "tp2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the models and the conversations, as they are asked for."""
    folder = tmp_path_factory.mktemp("sft_layouts")
    for name, rows in DATA.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def models(place):
    """family -> (folder with a chat template, transformers' model in float64)."""

    @cache
    def of(family: str) -> tuple[Path, torch.nn.Module]:
        folder = place / family
        save_model(folder, family, vocab_size=304, max_position_embeddings=512, eos_token_id=300)
        save_tokenizer(folder, KINDS["chatml"])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        model.set_experts_implementation("eager")  # grouped products take no float64
        return folder, model

    return of


@pytest.fixture(scope="module")
def results(request, models, place):
    """ranks -> the steps of the cases of so many ranks that this session tests; run at the first call."""
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]

    @cache
    def of(ranks: int) -> dict[str, Step]:
        chosen = {name: CASES[name] for name in names if CASES[name][0] == ranks}
        jobs = {
            name: (models(family)[0], place / f"{data}.jsonl", settings)
            for name, (_, family, data, settings) in chosen.items()
        }
        return on_ranks(ranks, steps, jobs)[0]

    return of


def expected(folder: Path, model: torch.nn.Module, rows: list[dict]) -> tuple[float, dict[str, torch.Tensor], int]:
    """Mean cross-entropy of what the assistant says, its gradient, and of how many tokens; all by transformers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    losses = []
    for messages in (row["messages"] for row in rows):
        for end in range(2, len(messages) + 1, 2):
            prompt = tokenizer.apply_chat_template(messages[: end - 1], add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(messages[:end], tokenize=False).removesuffix("\n")
            parts = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, whole.removeprefix(prompt))]
            tokens = torch.tensor([*parts[0], *parts[1]])
            logits = model(tokens[None], use_cache=False).logits[0, len(parts[0]) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[len(parts[0]) :], reduction="none"))
    model.zero_grad()
    loss = torch.cat(losses).mean()
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), by_expert(gradient), sum(map(len, losses))


def by_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With one name an expert, as in a folder; transformers stacks them."""
    found = {}
    for name, stacked in tensors.items():
        place, _, kind = name.rpartition(".experts.")
        for index, tensor in enumerate(stacked) if place else ():
            parts = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True))
            for part, matrix in (parts if kind == "gate_up_proj" else {kind: tensor}).items():
                found[f"{place}.experts.{index}.{part}.weight"] = matrix
        if not place:
            found[name] = stacked
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.rotating]) for name in CASES]
)
def test_a_step_is_that_of_transformers(results, models, name):
    ranks, family, data, settings = CASES[name]
    found = results(ranks)[name]
    loss, gradient, num_trained = expected(*models(family), DATA[data])
    assert found.metrics["tokens_trained"] == num_trained
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert found.heldout == {"eval/loss": pytest.approx(loss, rel=1e-6)}
    largest = max(float(g.abs().max()) for g in gradient.values())
    for parameter, wanted in gradient.items():
        assert (found.gradient[parameter] - wanted).abs().max() < 1e-6 * largest, parameter
    norm = torch.sqrt(sum(g.square().sum() for g in gradient.values())).item()
    if "model" not in settings:  # the MTP modules' is in it
        assert found.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert (found.metrics["padding_share"] > 0) == (name in ("tp2", "cp2", "cp2-uneven", "pp2-vp2", "tp2-ep2"))
