"""Scores of steps behind real SGLang servers: transformers' on whole prefixes, whichever way a server can be asked."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import real
import torch
import transformers
from model_folders import SIZES, save_model

from r1engine.batch import Prompt
from r1engine.config import StepScorerSection
from r1engine.data.question import Question
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.search.scored_folder import NAME, ScoredFolder
from r1engine.search.servers import TRIAL, ServerScorer
from r1engine.search.tree import StepPath

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

MODEL = SIZES | {"vocab_size": len(real.BYTES), "max_position_embeddings": 512}
# Without chunks a CPU server of 0.5.23 finds a share of the memory below 0; so it is told one.
AT_ONCE = ("--is-embedding", "--disable-radix-cache", "--chunked-prefill-size", "-1", "--mem-fraction-static", "0.5")


def save_scorer(folder: Path, family: str) -> torch.nn.Module:
    """A folder as `stage: process_reward` exports it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**MODEL, num_labels=1)
    model = getattr(transformers, f"{family}ForTokenClassification")(config).eval()
    if family != "Llama":  # exported as 0: SGLang would begin it at random
        model.score.bias.data.zero_()
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["architectures"] = [f"{family}ForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / NAME).write_text(ScoredFolder(("\n",), None, "correctness").to_text())
    real.add_tokenizer(folder)
    return model


def paths() -> list[StepPath]:
    """Three questions, each with two ways on; some of the steps have scores already."""
    rng = random.Random(1)
    found = []
    for number in range(3):
        tokens = [rng.randrange(2, 200) for _ in range(5)]
        steps = [tuple(rng.randrange(2, 200) for _ in range(rng.randint(1, 6))) for _ in range(5)]
        prompt = Prompt(number, tokens, "", Question("", "", "math", "here"))
        found += [StepPath(prompt, (*steps[:3], steps[3]), 0), StepPath(prompt, (*steps[:3], steps[4]), 3)]
    return found


def tokens_of(path: StepPath) -> list[int]:
    return [*path.prompt.tokens, *(token for step in path.steps for token in step)]


@torch.no_grad()
def expected(model: torch.nn.Module, path: StepPath) -> list[float]:
    tokens, at = list(path.prompt.tokens), []
    for step in path.steps:
        tokens += step
        at.append(len(tokens) - 1)
    return torch.sigmoid(model(torch.tensor([tokens])).logits[0, at, 0]).tolist()[path.scored :]


@pytest.mark.parametrize(
    ("family", "flags"),
    [("Qwen2", ("--is-embedding",)), ("Qwen3", AT_ONCE), ("Llama", ("--is-embedding",))],
)
def test_scores_are_transformers_step_by_step_and_all_at_once(tmp_path, family, flags):
    model = save_scorer(tmp_path / "model", family)
    with real.serving(tmp_path / "model", tmp_path / "server.log", *flags) as url:
        cfg = StepScorerSection(path=tmp_path / "model", urls=[url], parallel=1)
        scorer = ServerScorer(cfg.path, "own", load_tokenizer(cfg.path), cfg)
        assert scorer.labels == "correctness"
        begun = len((tmp_path / "server.log").read_text())
        found = scorer.score(paths())
        for path, scores in zip(paths(), found, strict=True):
            assert scores == pytest.approx(expected(model, path), abs=1e-4)
        again = scorer.score([path._replace(scored=3) for path in paths()])
        assert again == [pytest.approx(scores[-1:], abs=1e-4) for scores in found]
        scorer.clear()
    texts = [tokens_of(path) for path in paths()]
    if flags == AT_ONCE:
        assert scorer.tokens_run == len(TRIAL) + 2 + len(TRIAL) + 2 * sum(map(len, texts))
    else:  # every token once, and for a path that the server has its last one again
        run = re.findall(r"#new-token: (\d+)", (tmp_path / "server.log").read_text()[begun:])
        different = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
        assert sum(map(int, run)) == len(different) + len(again) and scorer.tokens_run is None


def test_a_class_that_ignores_positions_is_refused(tmp_path):
    save_scorer(tmp_path / "model", "Llama")
    with real.serving(tmp_path / "model", tmp_path / "server.log", *AT_ONCE) as url:
        cfg = StepScorerSection(path=tmp_path / "model", urls=[url])
        with pytest.raises(
            ValueError, match=r"1 score for 2 steps from LlamaForSequenceClassification \(sglang 0.5.23"
        ):
            ServerScorer(cfg.path, "own", load_tokenizer(cfg.path), cfg)


def test_a_language_model_of_two_answers_scores_as_transformers(tmp_path):
    model, folder = save_model(tmp_path / "model", "qwen2", **MODEL).eval(), tmp_path / "model"
    tokenizer = real.add_tokenizer(folder)
    good, bad, mark = (tokenizer.encode(text).ids[-1] for text in ("+", "-", " \u043a\u0438"))
    with real.serving(folder, tmp_path / "server.log") as url:
        cfg = StepScorerSection(path=folder, urls=[url])
        scorer = ServerScorer(folder, "math_shepherd", load_tokenizer(folder), cfg)
        steps = tuple(tuple(tokenizer.encode(text).ids) for text in ("Step 1: 1", "Step 2: 2"))
        path = StepPath(Prompt(0, [5], "", Question("1 + 1?", "2", "math", "here")), steps, 0)
        [found] = scorer.score([path])
        tokens = [*tokenizer.encode("1 + 1? ").ids, *steps[0], mark, *steps[1], mark]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        at = [index for index, token in enumerate(tokens) if token == mark]
        wanted = torch.softmax(logits[at][:, [good, bad]], -1)[:, 0].tolist()
        assert found == pytest.approx(wanted[-2:], abs=1e-4)
        with pytest.raises(
            ValueError, match=r"found Qwen2ForCausalLM \(sglang 0.5.23\), required a model with a score"
        ):
            ServerScorer(folder, "own", load_tokenizer(folder), cfg)
