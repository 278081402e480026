"""`r1engine iterate` that runs: a round beside rejection sampling, and one that was killed ends the same."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from ranks import forked
from safetensors.torch import load_file, save_file

from r1engine.search.scored_folder import NAME, ScoredFolder

DRIVER = Path(__file__).resolve().parents[1] / "killed.py"
TRAINING = "threads: 1, max_row_tokens: 1024, log: {tensorboard: false}, optimizer: {lr: 1e-2, beta2: 0.98}"
DATA = "template: r1_zero, max_tokens: 64"
WORLD = f"""
run_dir: WORLD
stages:
  tiny: {{stage: tiny, hidden_size: 32, layers: 1, intermediate_size: 64, texts: 1, heldout: 4}}
  base: # answers 1 as often as 2
    {{stage: sft, model: {{path: tiny}}, data: {{train: WORLD/texts.jsonl, {DATA}}},
      sft: {{epochs: 1, batch_size: 32}}, {TRAINING}}}
"""
ROUNDS = f"""
run_dir: RUN
model: {{path: WORLD/base/model}}
value: {{path: WORLD/value}}
questions: [WORLD/questions.jsonl]
heldout: WORLD/questions.jsonl
steps: {{marks: [";"]}}
iterate: {{rounds: 1, min_visits: 1}}
common: {{template: r1_zero, threads: 1, rollout: {{max_tokens: 24}}, rewards: {{workers: 1}}}}
search: {{width: 2, simulations: 8}}
actor_training: {{data: {{max_tokens: 64}}, sft: {{epochs: 6, batch_size: 12}}, checkpoint: {{every: 2}}, {TRAINING}}}
value_training: {{data: {{max_tokens: 64}}, process: {{batch_size: 32}}, {TRAINING}}}
"""


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Questions whose answer is 1, a base that guesses it, and a value model that knows nothing."""
    folder = tmp_path_factory.mktemp("world")
    asked = [f"What is {number}+{number}?" for number in range(10, 22)]
    said = [f"<think>{n % 3};{n % 5};</think><answer>{1 + n % 2}</answer>" for n in range(220)]
    write(folder / "texts.jsonl", [{"question": q, "completion": text} for text in said for q in asked])
    write(folder / "questions.jsonl", [{"question": q, "answer": "1"} for q in asked])
    (folder / "world.yaml").write_text(WORLD.replace("WORLD", str(folder)))
    done = forked(1, DRIVER, 0, 0, "pipeline", folder / "world.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    value = shutil.copytree(folder / "base" / "model", folder / "value")
    weights = load_file(value / "model.safetensors")
    weights["score.weight"] = torch.zeros(1, 32)  # every step is worth a half
    save_file(weights, value / "model.safetensors", {"format": "pt"})
    config = json.loads((value / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1, "tie_word_embeddings": False}
    (value / "config.json").write_text(json.dumps(config))
    (value / NAME).write_text(ScoredFolder((";",), None, "value").to_text())
    return folder


def run(world: Path, folder: Path, kill: int = 0, at: int = 0) -> subprocess.CompletedProcess:
    """A round in `folder`."""
    file = folder.with_suffix(".yaml")
    file.write_text(ROUNDS.replace("WORLD", str(world)).replace("RUN", str(folder)))
    return forked(1, DRIVER, kill, at, "iterate", file)


@pytest.mark.turn(0)
def test_an_actor_learns_beside_rejection_sampling_and_a_killed_round_ends_the_same(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(world, whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith((whole / "rounds.md").read_text())
    before, after, rejected = json.loads((whole / "rounds.json").read_text())
    assert (after["trained on"], rejected["trained on"]) == ("search", "rejection")
    assert 0.2 < before["pass@1"] < 0.8
    assert min(after["pass@1"], rejected["pass@1"]) > before["pass@1"] + 0.1
    assert 1 <= rejected["tokens"] / after["tokens"] < 1.5
    assert before["siblings"] == before["AUC"] == 0.5 and before["pairs"] > 0  # to this model all steps are equal
    assert 0 <= before["RMSE"] < 0.5 and before["process right"] is None  # nobody knows the truth of these steps

    assert run(world, killed, signal.SIGKILL, at=7).returncode != 0  # in actor_1, behind a checkpoint
    assert (killed / "search_1" / "stage.json").exists() and not (killed / "actor_1" / "stage.json").exists()
    again = run(world, killed)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed from step_00000006" in again.stdout and "search_1 (search)" not in again.stdout
    same = [
        "rounds.json",
        "search_1/search.jsonl",
        "data_1/steps.jsonl",
        "reject_1/search.jsonl",
        "test_1/search.jsonl",
    ]
    same += [f"{stage}/model/model.safetensors" for stage in ("actor_1", "value_1", "reject_actor_1")]
    for name in same:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
