"""The stage that trains a process reward model, from a file of steps to a folder: what it logs, keeps and exports."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from model_folders import save_model
from safetensors.torch import load_file

from r1engine.config import ProcessRewardConfig
from r1engine.data.step_table import learned
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.search.scored_folder import NAME, read_scored_folder
from r1engine.stages import make_stage

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"


def solutions(path: Path, count: int, seed: int, **more) -> Path:
    """Steps of one word and a mark (w9), of which those are wrong that begin with a word from 50 on."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        words = [rng.choice([*range(10, 14), *range(50, 54)]) for _ in range(rng.randint(1, 4))]
        tokens = [[word, rng.randrange(20, 30), 9] for word in words]
        steps = [" ".join(f"w{token}" for token in step) for step in tokens]
        first = next((at for at, word in enumerate(words) if word >= 50), len(words))
        labels = [1.0 if at < first else 0.0 if at == first else None for at in range(len(words))]
        rows.append({"id": str(number), "question": f"w{5 + number % 3}", "steps": steps, "labels": labels} | more)
        rows[-1]["tokens"] = tokens
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"steps_file": 1}, *rows]))
    return path


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("process")
    save_model(root / "model", "qwen3")
    cfg = ProcessRewardConfig(
        model={"path": root / "model"},
        run_dir=root / "run",
        data={
            "train": solutions(root / "train.jsonl", 48, 1, source="rollouts/each"),
            "heldout": solutions(root / "heldout.jsonl", 24, 2),
            "template": "none",
            "max_tokens": 20,
        },
        steps={"marks": ["w9"], "max_step_tokens": 7},
        process={"epochs": 8, "batch_size": 24},
        optimizer={"lr": 3e-2, "weight_decay": 0.0},
        max_row_tokens=128,
    )
    stage = make_stage(cfg, world, Phases(), Progress("", enabled=False))
    before = stage.evaluate(0).metrics
    rows = [{"step": 0} | before]
    stage.begin([])
    for step in range(stage.steps):
        rows.append({"step": step + 1} | stage.advance(step).metrics)
    rows.append({"step": stage.steps} | stage.evaluate(stage.steps).metrics)
    stage.policy.export(root / "out")
    return cfg, stage, rows, root


def test_a_run_learns_which_steps_are_wrong(trained):
    _, stage, rows, _ = trained
    assert stage.steps == 16
    found = stage.summary(rows)
    assert found["accuracy_after"] > 0.9 and found["f1_after"] > 0.9 > 0.5 > found["f1_before"]
    assert found["auc_after"] > 0.95 and found["loss_last"] < rows[1]["loss"] / 2
    assert rows[-2]["score_right"] > 0.7 and rows[-2]["score_wrong"] < 0.3
    counts = [len(learned(stage.train.at(i).labels, "drop")) for i in stage.batches.at(0)]
    assert rows[1]["labelled_steps"] == sum(counts)


def test_every_key_is_documented(trained):
    _, _, rows, _ = trained
    text = METRICS.read_text()
    section = text.partition("\n## Process reward model\n")[2].partition("\n## ")[0]
    of_every_stage = text.partition("\n## Every stage\n")[2].partition("\n## ")[0]
    keys = {key for row in rows for key in row}
    documented = {*re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)}
    others = {*re.findall(r"^\| `([^`]+)` \|", of_every_stage, re.MULTILINE)}
    assert keys - others == documented


def test_a_checkpoint_gives_the_same_scores_and_the_folder_says_what_they_mean(trained, world, tmp_path):
    cfg, stage, _, root = trained
    (tmp_path / "model").mkdir()
    stage.save(tmp_path)
    again = make_stage(cfg, world, Phases(), Progress("", enabled=False))
    fresh = again.scores(again.heldout)
    again.load(tmp_path, {})
    assert again.scores(again.heldout) == stage.scores(stage.heldout) != fresh
    assert again.identity() == stage.identity()
    about = read_scored_folder(root / "out")
    assert about == (("w9",), 7, "value")  # of rollouts
    assert read_scored_folder(root / "model") is None
    assert load_file(root / "out" / "model.safetensors")["score.weight"].dtype == torch.float32
    (root / "out" / NAME).write_text('{"marks": ["w9"], "max_step_tokens": null, "means": "luck"}')
    with pytest.raises(ValueError, match=rf"{NAME}: means is 'luck', required correctness or value"):
        read_scored_folder(root / "out")


def test_scores_are_of_the_prefix_with_the_token(trained):
    _, stage, _, root = trained
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(root / "out", dtype=torch.float32, num_labels=1)
    found = stage.scores(stage.heldout)
    for index in range(6):
        solution = stage.heldout.at(index)
        with torch.no_grad():
            theirs = model(torch.tensor([solution.tokens])).logits[0, :, 0].sigmoid()
        assert found[index] == pytest.approx(theirs[solution.last].tolist(), abs=1e-5)
