"""The supervised stage: its loss is transformers' cross-entropy, at temperature 1, over the tokens of completions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from r1engine.config import ConfigError, SftConfig, load
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.plan.utilization import training_flops
from r1engine.stages import make_stage
from r1engine.stages.sft import SftStage


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_base) -> Path:
    """Ten texts of the tiny world, of different lengths."""
    folder = tmp_path_factory.mktemp("sft")
    lines = (tiny_base / "tiny" / "texts.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:10]))
    domains = [{"domain": name} if name else {} for name in ("sums", "", "sums", "code", "code", "sums", "")]
    heldout = [json.loads(line) | domain for line, domain in zip(lines[10:17], domains, strict=True)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
    return folder


def stage(tiny_base: Path, data: Path, world, **sections) -> SftStage:
    cfg = SftConfig(
        model={"path": tiny_base / "tiny" / "model"},
        data={
            "train": data / "train.jsonl",
            "heldout": data / "heldout.jsonl",
            "template": "r1_zero",
            "max_tokens": 64,
        },
        run_dir=data / "run",
        **{"sft": {"epochs": 1, "batch_size": 10}, "max_row_tokens": 128} | sections,
    )
    return make_stage(cfg, world, Phases(), Progress("", enabled=False))


def losses(tiny_base: Path, texts, indices) -> tuple[torch.Tensor, torch.nn.Module]:
    """Mean cross-entropy of the completion tokens by transformers in float64, and the model, with its gradients."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base / "tiny" / "model", dtype=torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, num_prompt in (texts.at(index) for index in indices):
        labels = torch.tensor([-100] * num_prompt + tokens[num_prompt:])[None]
        logits = model(torch.tensor(tokens)[None]).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        count += len(tokens) - num_prompt
    mean = total / count
    mean.backward()
    return mean.detach(), model


def test_loss_and_gradient_are_those_of_transformers(tiny_base, data, world):
    found = stage(tiny_base, data, world, optimizer={"lr": 1e-3, "clip_grad": 0.0})
    expected, model = losses(tiny_base, found.train, range(10))
    done = found.advance(0)
    assert done.metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters())).item()
    assert done.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    lengths = [len(found.train.at(index)[0]) for index in range(10)]
    assert done.tokens == done.metrics["tokens"] == sum(lengths) and done.metrics["texts"] == 10
    trained = sum(len(tokens) - num_prompt for tokens, num_prompt in map(found.train.at, range(10)))
    assert done.metrics["tokens_trained"] == trained and done.metrics["padding_share"] == 0
    assert done.flops == training_flops(found.policy.shape, lengths)


def test_heldout_loss_is_that_of_transformers_and_moves_nothing(tiny_base, data, world):
    found = stage(tiny_base, data, world)
    before = {name: tensor.clone() for name, tensor in found.policy.weights()}
    texts = {"eval/loss": range(7), "eval/loss/sums": (0, 2, 5), "eval/loss/code": (3, 4)}
    expected = {key: losses(tiny_base, found.heldout, indices)[0].item() for key, indices in texts.items()}
    assert found.evaluate(0).metrics == pytest.approx(expected, rel=1e-6)
    batches_of_two = stage(tiny_base, data, world, sft={"epochs": 1, "batch_size": 2})
    assert batches_of_two.evaluate(0).metrics == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.policy.weights())


def test_the_rows_do_not_matter(tiny_base, data, world):
    norms = [
        stage(tiny_base, data, world, max_row_tokens=size).advance(0).metrics["grad_norm"] for size in (64, 96, 4096)
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_the_steps_are_known_before_the_start(tiny_base, data, world):
    found = stage(tiny_base, data, world, sft={"epochs": 3, "batch_size": 4})
    assert found.steps == 9  # 4 + 4 + 2 texts, three times
    done = [found.advance(step) for step in range(found.steps)]
    assert [one.metrics["texts"] for one in done] == [4, 4, 2] * 3 and done[-1].metrics["epoch"] == 3.0
    assert sum(one.tokens for one in done) == 3 * found.train.num_tokens
    assert sum(one.metrics["tokens_trained"] for one in done) == 3 * found.train.num_trained


def test_what_is_trained_on_is_told_in_texts_and_their_lengths_are_kept_for_the_report(tiny_base, data, world):
    found, out = stage(tiny_base, data, world, sft={"epochs": 2, "batch_size": 4}), io.StringIO()
    found._progress = Progress("", enabled=True, console=Console(file=out, width=200))
    found.begin([])
    table = found.train
    wanted = (
        f"10 texts, {table.num_tokens:,} tokens of which {table.num_trained:,} are trained on: 6 steps of 4 texts, 2 ep"
    )
    assert wanted in out.getvalue()
    lengths = json.loads((data / "run" / "lengths.json").read_text())
    assert sum(lengths["texts"]) == 10 and lengths["row_tokens"] == 128
    low, high = lengths["edges"][0], lengths["edges"][-1]
    assert (
        low <= table.lengths().min()
        and table.lengths().max() <= high
        and len(lengths["edges"]) == len(lengths["texts"]) + 1
    )


def test_there_is_no_temperature(tiny_base, data, tmp_path):
    (tmp_path / "sft.yaml").write_text(
        f"stage: sft\nmodel: {{path: {tiny_base}}}\ndata: {{train: {data}/train.jsonl}}\n"
    )
    with pytest.raises(ConfigError, match=r"rollout"):
        load(tmp_path / "sft.yaml", ["rollout.temperature=0.7"])


def test_a_warmup_longer_than_the_run_is_refused(tiny_base, data, world):
    with pytest.raises(
        ValueError, match="warmup_steps: found 4, required <= 3 steps = 3 epochs of 10 texts in batches"
    ):
        stage(tiny_base, data, world, sft={"epochs": 3, "batch_size": 10}, optimizer={"warmup_steps": 4})


def test_a_folder_without_an_end_token_is_refused(tiny_base, data, world, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_base / "tiny", tmp_path / "tiny") / "model"
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        settings = json.loads((folder / name).read_text())
        settings = {k: v for k, v in settings.items() if k not in ("eos_token", "eos_token_id")}
        (folder / name).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no eos_token_id"):
        stage(tmp_path, data, world)
