"""Each row of CONTRIBUTING's "How do I ..." is complete: what it names is added here from outside, and the engine runs.

A patched name stands for the line that the row tells to write. A reward is added in tests/rewards/test_rules.py; what
an op needs is checked in tests/test_tree.py.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import model_folders
import pytest
import torch
from policies import policy_of
from ranks import on_ranks
from transformers import AutoModelForCausalLM

from r1engine import grpo
from r1engine.batch import PackedBatch, Prompt, RowShape, Sequence, TokenOutputs, pack
from r1engine.config import Grpo, RlConfig, StageConfig, TinyConfig
from r1engine.config.evaluation import BenchmarkSettings
from r1engine.data.question import Question
from r1engine.demo.tiny import write_model
from r1engine.evaluation import benchmarks, pass_at_1
from r1engine.evaluation.benchmark import Benchmark, Item, Reply
from r1engine.evaluation.files import object_rows
from r1engine.evaluation.own_questions import grade_question
from r1engine.hf import architecture
from r1engine.hf.tokenizer import end_token, load_tokenizer
from r1engine.model.policy import Policy
from r1engine.observe import summary
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.rewards import Scorer, ScorerSettings
from r1engine.rollout import draft, generate
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.stages import Advance, rl
from r1engine.stages.identity import model_identity
from r1engine.stages.sft import cross_entropy
from r1kernels import GrpoObjective, grpo_loss

CPU = torch.device("cpu")
TOKENS = list(range(2, 18))


def row_of(tokens: list[int], shape: RowShape) -> PackedBatch:
    """One sequence; all but its first token have a weight."""
    return pack([Sequence(tokens, 1, 1.0 / (len(tokens) - 1))], shape)[0][0]


# ---- a loss variant: a field of GrpoObjective and, of the same name, of section `grpo` -----------------------------


class WithTau(Grpo):
    sapo_tau: float = 1.0
    """An option that the op has and the section does not."""


def test_an_option_of_the_loss_is_a_field_of_the_objective_and_of_the_section(monkeypatch):
    assert "sapo_tau" not in Grpo.model_fields
    monkeypatch.setattr(grpo, "Grpo", WithTau)
    logp = -torch.rand(len(TOKENS))
    row = row_of(TOKENS, RowShape(max_tokens=len(TOKENS)))
    row = replace(row, old_logp=logp - 0.5, ref_logp=logp)
    found, _ = grpo.objective(TokenOutputs(logp, torch.zeros_like(logp)), row, WithTau(loss="sapo", sapo_tau=7.0))
    options = GrpoObjective(loss="sapo", sapo_tau=7.0)
    wanted, _ = grpo_loss(logp, row.old_logp, row.advantage, row.loss_weight, options, cu_seqlens=row.cu_seqlens)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    default, _ = grpo.objective(TokenOutputs(logp, torch.zeros_like(logp)), row, WithTau(loss="sapo"))
    assert found.item() != pytest.approx(default.item(), rel=1e-2)


# ---- a model family of a known shape: a name in hf/architecture.py -------------------------------------------------


def test_a_family_of_a_known_shape_is_its_name(world, tmp_path, monkeypatch):
    monkeypatch.setitem(model_folders.FAMILIES, "mistral", ("Mistral", {"sliding_window": None}))
    model = model_folders.save_model(tmp_path / "model", "mistral")
    with pytest.raises(ValueError, match="MistralForCausalLM"):
        architecture.read_architecture(tmp_path / "model")
    monkeypatch.setattr(architecture, "FAMILIES", (*architecture.FAMILIES, "MistralForCausalLM"))

    policy = policy_of(RlConfig(model={"path": tmp_path / "model"}), world)
    generator = LocalGenerator(tmp_path / "model", seed=0, slots=4, device=CPU, dtype=torch.float32)
    generator.load_weights(policy.weights())
    prompt = Prompt(0, TOKENS, "", Question(""))
    (drawn,) = generate(generator, [prompt], num_samples=1, step=0, max_tokens=12)
    tokens = [*TOKENS, *drawn.tokens]
    logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    wanted = logits[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    (logp,) = policy.logprobs([row_of(tokens, policy.row_shape(64))])
    torch.testing.assert_close(logp[1 : len(tokens)].double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(drawn.logp).double(), wanted[len(TOKENS) - 1 :], rtol=0, atol=1e-5)

    policy.export(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, again[name])] == []


# ---- a generator: a class with the calls of rollout/generator.py, and an `if` in make_generator --------------------


class Reciter:
    """Writes the reference answer. It has what `Generator` asks for, and no more."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._end = end_token(folder, self._tokenizer)
        self.weight_version, self.takes_shares, self.names = 0, False, []

    def load_weights(self, weights):
        self.names = [name for name, _ in weights]
        self.weight_version += 1

    def verify(self, logprobs, *, row_multiple): ...

    def draw(self, drafts, sampling, *, on_tokens=None, should_stop=None, on_ended=None):
        for one in drafts:
            text = f"<think>I know.</think><answer>{one.prompt.question.answer}</answer>"
            tokens = [*self._tokenizer.encode(text).ids, self._end]
            one.add(tokens, [-1.0] * len(tokens), self.weight_version)
            one.finish = "stop"
            if on_ended is not None:
                on_ended(one)

    def completions(self, drafts):
        return draft.completions(drafts, self._tokenizer)

    def awake(self):
        return nullcontext()

    def metrics(self):
        return {"refresh/own": float(self.weight_version)}

    def close(self): ...


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    write_model(folder, TinyConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32))
    return folder


def recited_stage(folder: Path, tmp_path: Path, world, monkeypatch: pytest.MonkeyPatch) -> rl.RlStage:
    """A stage whose generator is a Reciter; its held-out questions are multiple choice."""
    rows = {
        "train": [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(4)],
        "heldout": [{"question": f"Which? (A) {i} (B) x", "answer": "B", "reward": "choice"} for i in range(3)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = RlConfig(
        steps=2,
        model={"path": folder},
        data={name: tmp_path / f"{name}.jsonl" for name in rows} | {"max_prompt_tokens": 256},
        rollout={"max_tokens": 40},
        grpo={"questions": 2, "group_size": 2, "minibatches": 1, "kl_coef": 0.0},
        rewards={"workers": 1},
        evaluation={"samples": 2},
    )
    monkeypatch.setattr(rl, "make_generator", lambda cfg, world, dtype, note: Reciter(cfg.model.path))
    return rl.RlStage(cfg, world, Phases(), Progress("", enabled=False))


def test_a_generator_is_its_class_and_a_line(tiny_model, tmp_path, world, monkeypatch):
    stage = recited_stage(tiny_model, tmp_path, world, monkeypatch)
    try:
        stage.begin([])
        done = stage.advance(0)
    finally:
        stage.close()
    assert done.metrics["reward/accuracy"] == done.metrics["reward/format"] == 1.0
    assert done.metrics["refresh/own"] == 2.0 and done.metrics["staleness/max"] == 0
    assert "model.embed_tokens.weight" in stage.parts.generator.names
    assert len(done.samples) == 4
    assert all(sample["completion"].endswith(f"<answer>{sample['answer']}</answer>") for sample in done.samples)


# ---- a benchmark: another file of questions; a metric of it: an entry of heldout_metrics ---------------------------


def test_a_benchmark_is_a_file_and_a_metric_is_an_entry(tiny_model, tmp_path, world, monkeypatch):
    present = pass_at_1.heldout_metrics

    def with_own(groups):
        return present(groups) | {"eval/groups": float(len(groups))}

    monkeypatch.setattr(pass_at_1, "heldout_metrics", with_own)
    monkeypatch.setitem(summary._ROWS, "groups", ("questions", "{:.0f}", None))
    stage = recited_stage(tiny_model, tmp_path, world, monkeypatch)
    try:
        stage.begin([])
        found = stage.evaluate(0)
    finally:
        stage.close()
    assert found.metrics["eval/pass_at_1"] == 1.0  # by the rule `choice`, where training has `math`
    assert found.metrics["eval/groups"] == 3.0
    columns = summary.summary_table(found.metrics, found.metrics).columns
    assert "questions" in list(columns[0].cells)


# ---- a benchmark in an owner's format: its three functions, and a row of the table ---------------------------------


def load_sums(settings: BenchmarkSettings) -> list[Item]:
    rows = object_rows(settings.file, ("sum", "total"))
    return [Item(row.text("sum"), Question(row.text("sum"), row.text("total"), place=row.place)) for row in rows]


def test_a_benchmark_of_another_format_is_its_functions_and_a_row(tmp_path, monkeypatch):
    sums = Benchmark(
        "sums", "Sums", load_sums, lambda item, sample: f"{item.question.text} = ?", grade_question, grader="rewards/1"
    )
    monkeypatch.setattr(benchmarks, "BENCHMARKS", (*benchmarks.BENCHMARKS, sums))
    path = tmp_path / "sums.jsonl"
    path.write_text('{"sum": "1+1", "total": 2}\n{"sum": "2+2", "total": 4}\n')
    row = benchmarks.benchmark_of("sums", "suite")
    items = row.load(BenchmarkSettings(file=path))
    assert [row.ask(item, 0) for item in items] == ["1+1 = ?", "2+2 = ?"]
    graded = [row.grade(item, 0, Reply("\\boxed{2}", "stop")) for item in items]
    with Scorer(ScorerSettings(workers=1)) as scorer:
        scores = scorer.score(one.record for one in graded)
    assert [score.verdict for score in scores] == ["right", "wrong"]


# ---- a stage: its configuration, its class, a line in KINDS and in make_stage --------------------------------------


class CountConfig(StageConfig):
    """Learns to count."""

    stage: Literal["count"] = "count"
    """Kind of stage."""
    steps: int = 2
    """Optimizer steps."""

    @property
    def longest_sequence(self) -> int:
        return len(TOKENS)

    def source_problems(self) -> list[str]:
        return []


class CountStage:
    """The same sequence in every step."""

    def __init__(self, cfg: CountConfig, world, phases, progress) -> None:
        self.cfg, self.steps = cfg, cfg.steps
        self.policy = Policy(cfg.model, cfg.parallel, cfg.optimizer, world, seed=cfg.seed)
        self.rows = [row_of(TOKENS, self.policy.row_shape(cfg.row_tokens))]

    def identity(self):
        return model_identity(self.policy, self.cfg.model.path)

    def begin(self, rows):
        self.num_logged = len(rows)

    def advance(self, step):
        metrics = self.policy.update(self.rows, cross_entropy, self.cfg.optimizer.lr_at(step, self.steps)).metrics
        return Advance(1, metrics | {"logged": self.num_logged}, tokens=len(TOKENS))

    def evaluate(self, step):
        return None

    def save(self, folder):
        self.policy.save(folder / "model", None)
        return {"counted": True}

    def load(self, folder, state):
        assert state["counted"]
        self.policy.load(folder / "model", has_snapshot=False)

    def summary(self, rows):
        return {"loss_last": rows[-1]["loss"]}

    def close(self): ...


def train_counting(folder: Path) -> str:
    """Two runs in one run folder, the second one longer; the help text of the stage."""
    from r1engine import run
    from r1engine.config import read
    from r1engine.config.words import commented_defaults

    read.KINDS["count"] = CountConfig
    run.make_stage = CountStage
    (folder / "count.yaml").write_text("stage: count\n")
    settings = [f"model.path={folder / 'model'}", f"run_dir={folder / 'run'}", "optimizer.lr=0.01", "threads=1"]
    for steps in (2, 5):
        run.train(read.load(folder / "count.yaml", [*settings, f"steps={steps}", "log.tensorboard=false"]))
    return commented_defaults(read.KINDS["count"])


def test_a_stage_is_its_class_its_configuration_and_two_lines(tmp_path):
    model_folders.save_model(tmp_path / "model", "qwen2")
    (words,) = on_ranks(1, train_counting, tmp_path)
    assert "Optimizer steps." in words
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["logged"]) for row in rows] == [(1, 0), (2, 0), (3, 2), (4, 2), (5, 2)]
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["loss_last"] == losses[-1]
    for name in ("report.html", "model/model.safetensors", "checkpoints/step_00000005/state.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
