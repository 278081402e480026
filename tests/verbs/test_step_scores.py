"""`r1engine evaluate steps`: the measures are those of transformers' scores at the ends of the steps."""

import json

import pytest
import torch
from model_folders import save_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from r1engine.cli import app
from r1engine.evaluation.steps import step_measures
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.search.scored_folder import NAME, ScoredFolder

MARK = "w9"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with a score, and what gives the probability at each token."""
    folder = tmp_path_factory.mktemp("model")
    model = save_model(folder, "qwen2")
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != "lm_head.weight"}
    weights["score.weight"] = torch.randn(1, 32, generator=torch.Generator().manual_seed(2))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / NAME).write_text(ScoredFolder((MARK,), None, "correctness").to_text())

    @torch.no_grad()
    def of(tokens):
        return torch.sigmoid(model.model(torch.tensor([tokens])).last_hidden_state[0] @ weights["score.weight"][0])

    return folder, of


def test_two_files_and_their_mean(scored, tmp_path):
    folder, of = scored
    tokenizer, texts = load_tokenizer(folder), [f"w{n}" for n in range(10, 60)]
    names, tables = [], []
    for number, count in enumerate((12, 9)):
        rows, scores, labels = [], [], []
        for i in range(count):
            problem, steps, first = texts[i], [texts[i + 7], f"{texts[2 * i]} {texts[3 * i]}", texts[i + 1]], i % 4 - 1
            rows.append({"problem": problem, "steps": steps, "label": first})
            tokens, at = list(tokenizer.encode(problem).ids), []
            for index, step in enumerate(steps):
                marked = step if index == 2 else step + MARK
                tokens += tokenizer.encode_continuations([marked])[0].ids
                at.append(len(tokens) - 1)
            scores.append(of(tokens)[at].tolist())
            labels.append([1.0 if n < first or first < 0 else 0.0 if n == first else None for n in range(3)])
        names.append(tmp_path / f"{number}.jsonl")
        names[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        tables.append(step_measures(scores, labels))
    arguments = ["evaluate", "steps", *map(str, names), f"path={folder}", "--template", "none"]
    told = CliRunner().invoke(app, arguments).output.splitlines()
    for line, count, found in zip(told[2:], (12, 9), tables, strict=False):
        assert line.split(" | ")[1:5] == [str(count), *(f"{100 * found[key]:.1f}" for key in
                                                         ("f1", "error_accuracy", "correct_accuracy"))]  # fmt: skip
    assert told[4].startswith(f"| mean | - | {50 * (tables[0]['f1'] + tables[1]['f1']):.1f} |")


def test_what_cannot_be_measured_is_named(scored, tmp_path):
    folder, _ = scored
    for arguments, problem in (
        ([f"path={folder}"], "found no file, required labelled steps"),
        (["a.jsonl", f"path={folder}", "--template", "x"], "template: found 'x', required one of chat, r1, plain"),
        (["a.jsonl", f"path={folder}", "urls=[ftp://x]"], "scorer.urls: found ftp://x, required http://host:port"),
    ):
        result = CliRunner().invoke(app, ["evaluate", "steps", *arguments])
        assert result.exit_code == 2 and problem in result.output.replace("\n", " "), result.output
