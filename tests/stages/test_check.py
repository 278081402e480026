"""The dry run: it names each fault in seconds, and where it finds none the start goes well."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r1engine.config import ConfigError, TinyConfig, load
from r1engine.config.pipeline import load_pipeline
from r1engine.demo.tiny import write_world
from r1engine.hf.architecture import read_architecture
from r1engine.pipeline.driver import dry_run as dry_run_of
from r1engine.plan.command import run_plan
from r1engine.plan.request import assumptions, gpu_named, job_of
from r1engine.plan.search import search
from r1engine.stages.check import check_start, dry_run

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10


@pytest.fixture(scope="module", params=["qwen2"])
def made(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_world(TinyConfig(run_dir=folder, hidden_size=32, layers=2, heads=2, texts=64, heldout=4))
    (folder / "train.jsonl").write_text("".join((folder / "train.jsonl").read_text().splitlines(keepends=True)[:40]))
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """A working directory with a whole model, questions and texts."""
    folder = Path(shutil.copytree(made, tmp_path / "here"))
    (folder / "rl.yaml").write_text((ROOT / "configs" / "tiny_r1_zero.yaml").read_text())
    (folder / "sft.yaml").write_text("stage: sft\ndata: {template: r1_zero, max_tokens: 64}\n")
    monkeypatch.chdir(folder)
    return folder


def checked(kind: str, *settings: str, ranks: int = 1) -> list[str]:
    """What a dry run says."""
    data = ["data.train=train.jsonl", "data.heldout=heldout.jsonl"] if kind == "rl" else ["data.train=texts.jsonl"]
    cfg = load(Path(f"{kind}.yaml"), ["model.path=model", *data, *settings])
    return dry_run(cfg, ranks, is_live=False)


def refusal(kind: str, *settings: str, ranks: int = 1) -> str:
    started = time.process_time()  # of the machine's other work nothing is said
    with pytest.raises(ConfigError) as caught:
        checked(kind, *settings, ranks=ranks)
    assert time.process_time() - started < SECONDS
    return str(caught.value)


# ---- faults, one each ------------------------------------------------------------------------------------------


def row(number: int, **fields: object) -> Callable[[], None]:
    """Other fields in a line (from 1) of train.jsonl and texts.jsonl; None takes one away."""

    def change() -> None:
        for file in (Path("train.jsonl"), Path("texts.jsonl")):
            lines = file.read_text().splitlines()
            changed = json.loads(lines[number - 1]) | fields
            lines[number - 1] = json.dumps({key: value for key, value in changed.items() if value is not None})
            file.write_text("\n".join(lines) + "\n")

    return change


def line(number: int, text: str) -> Callable[[], None]:
    """Another line (from 1) of train.jsonl and texts.jsonl."""

    def change() -> None:
        for file in (Path("train.jsonl"), Path("texts.jsonl")):
            lines = file.read_text().splitlines()
            lines[number - 1] = text
            file.write_text("\n".join(lines) + "\n")

    return change


def model(**values: object) -> Callable[[], None]:
    """Other values in the model's config.json."""

    def change() -> None:
        file = Path("model/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def written(path: str, content: str) -> Callable[[], object]:
    return lambda: Path(path).write_text(content)


def token_beyond_the_vocabulary() -> None:
    """A token that the model has no row for; one question and one text hold it."""
    file = Path("model/tokenizer.json")
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["z"] = 512
    file.write_text(json.dumps(tokenizer))
    row(3, question="What is z+1?")()


def weights(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[], None]:
    def to_file() -> None:
        tensors = load_file("model/model.safetensors")
        change(tensors)
        save_file(tensors, "model/model.safetensors", {"format": "pt"})

    return to_file


NORM = "model.norm.weight"
HALF = "model.safetensors"


@dataclass(frozen=True)
class Fault:
    message: str  # parts in order, "..." between them
    make: Callable[[], object] = lambda: None
    settings: tuple[str, ...] = ()
    ranks: int = 1
    kinds: tuple[str, ...] = ("rl", "sft")


RL_ONLY, SFT_ONLY = ("rl",), ("sft",)
FAULTS = {
    "no model": Fault("model.path: found no config.json in nowhere", settings=("model.path=nowhere",)),
    "no data": Fault("data.train: found no file nowhere.jsonl", settings=("data.train=nowhere.jsonl",)),
    "run_dir is a file": Fault("run_dir: ...train.jsonl is a file", settings=("run_dir=train.jsonl",)),
    "run_dir in a file": Fault("run_dir: train.jsonl/run: Not a directory", settings=("run_dir=train.jsonl/run",)),
    "ranks": Fault("does not divide the world size 3", settings=("parallel.tensor=2",), ranks=3),
    "batch": Fault("grpo.questions: found 16, required a multiple of the 3", ranks=3, kinds=RL_ONLY),
    "layout": Fault("parallel.tensor: 4 does not divide", settings=("parallel.tensor=4",), ranks=4),
    "stages": Fault("parallel.pipeline: pipeline 4 does not divide", settings=("parallel.pipeline=4",), ranks=4),
    "experts": Fault("parallel.expert: found 2, required 1", settings=("parallel.expert=2",), ranks=2),
    "fp8": Fault("model.fp8: the hidden size is 24", make=model(hidden_size=24), settings=("model.fp8=true",)),
    "mtp": Fault("model.mtp_loss_weight: found 0.1, required 0", settings=("model.mtp_loss_weight=0.1",)),
    "family": Fault(
        "model/config.json: architecture 'Gemma2ForCausalLM'", make=model(architectures=["Gemma2ForCausalLM"])
    ),
    "config cut off": Fault("model/config.json: not valid JSON", make=written("model/config.json", '{"hid')),
    "config type": Fault("model/config.json: hidden_size is '32'", make=model(hidden_size="32")),
    "tokenizer pointer": Fault(
        "model/tokenizer.json: found a Git LFS pointer",
        make=written("model/tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
    ),
    "no tokenizer": Fault("model/tokenizer.json: no such file", make=lambda: Path("model/tokenizer.json").unlink()),
    "tokenizer cut off": Fault(
        "model/tokenizer.json: cannot be read by tokenizers", make=written("model/tokenizer.json", '{"version')
    ),
    "end token": Fault(
        "model/tokenizer_config.json: eos_token 'nobody' is not in",
        make=written("model/tokenizer_config.json", '{"eos_token": "nobody"}'),
    ),
    "no weights": Fault("model.path: model has no *.safetensors", make=lambda: Path("model", HALF).unlink()),
    "weights cut off": Fault(
        f"model.path: model/{HALF} of 999 bytes is no whole safetensors file",
        make=lambda: Path("model", HALF).write_bytes(Path("model", HALF).read_bytes()[:999]),
    ),
    "tensor missing": Fault(f"1 missing ({NORM})", make=weights(lambda tensors: tensors.pop(NORM))),
    "tensor too many": Fault(
        "1 unexpected (lm_tail)", make=weights(lambda tensors: tensors.update(lm_tail=np.zeros(1, np.float32)))
    ),
    "tensor misshaped": Fault(
        f"1 misshaped ({NORM} is (31,), required (32,))",
        make=weights(lambda tensors: tensors.update({NORM: tensors[NORM][:31].copy()})),
    ),
    "tensor type": Fault(
        f"({NORM} is I32)", make=weights(lambda tensors: tensors.update({NORM: tensors[NORM].astype(np.int32)}))
    ),
    "weights of another vocabulary": Fault("is (512, 32), required (500, 32)", make=model(vocab_size=500)),
    "line cut off": Fault(":7: not valid JSON", make=line(7, '{"question": "1+')),
    "line no object": Fault(":7: found list, required an object", make=line(7, "[1]")),
    "no question": Fault(":9: found no field 'question', only [", make=row(9, question=None)),
    "question no text": Fault(":9: question is 3, required a text", make=row(9, question=3)),
    "no completion": Fault("texts.jsonl:9: found no field 'completion'", make=row(9, completion=None), kinds=SFT_ONLY),
    "no answer": Fault("train.jsonl:9: found no `answer`", make=row(9, answer=None), kinds=RL_ONLY),
    "answer a list": Fault("train.jsonl:9: answer is ['1', '2']", make=row(9, answer=["1", "2"]), kinds=RL_ONLY),
    "no such reward": Fault("train.jsonl:9: found reward 'maths'", make=row(9, reward="maths"), kinds=RL_ONLY),
    "no tests": Fault("train.jsonl:9: found tests None", make=row(9, reward="code"), kinds=RL_ONLY),
    "no judge": Fault("rewards.judge: found null, required", make=row(9, reward="judge"), kinds=RL_ONLY),
    "no API key": Fault(
        "the environment variable NO_SUCH_KEY is not set",
        settings=("rewards.judge={urls: [http://h:1/v1], model: m, key_variable: NO_SUCH_KEY}",),
        kinds=RL_ONLY,
    ),
    "no reference can be read": Fault(
        "train.jsonl: 1 of 1 references (100%) are undecided whatever the answer: train.jsonl:1",
        make=written("train.jsonl", json.dumps({"question": "What is 10+10?", "answer": "\\sqrt{"}) + "\n"),
        kinds=RL_ONLY,
    ),
    "token": Fault(":3: found token 512, required below 512, the vocab_size", make=token_beyond_the_vocabulary),
    "prompt too long": Fault(
        "1 of 40 prompts have more than max_prompt_tokens = 32 ... train.jsonl:5 (",
        make=row(5, question="9" * 40),
        kinds=RL_ONLY,
    ),
    "text too long": Fault(
        "texts.jsonl: 1 of 64 texts ... data.max_tokens = 64 tokens (texts.jsonl:5 has",
        make=row(5, completion="9" * 80),
        settings=("data.max_dropped=0",),
        kinds=SFT_ONLY,
    ),
    "text beyond the context": Fault(
        "model.path: model has 256 positions, ...(texts.jsonl:5)",
        make=row(5, completion="9" * 300),
        settings=("data.max_tokens=1024",),
        kinds=SFT_ONLY,
    ),
    "limit beyond the context": Fault(
        "rollout.max_tokens: found 250, required <= 249 behind the prompt of train.jsonl:",
        settings=("rollout.max_tokens=250",),
        kinds=RL_ONLY,
    ),
    "later limit beyond the context": Fault(
        "rollout.max_tokens: found 250 from step 149 on, required <= 249",
        settings=("rollout.max_tokens={0: 16, 149: 250, 151: 300}",),
        kinds=RL_ONLY,
    ),
    "limit of the last evaluation": Fault(
        "rollout.max_tokens: found 250 from step 150 on, required <= 249 behind the prompt of heldout.jsonl:",
        settings=("rollout.max_tokens={0: 16, 150: 250}",),
        kinds=RL_ONLY,
    ),
    "row": Fault("max_row_tokens: found 63, required >= 64", settings=("max_row_tokens=63",)),
    "warm-up": Fault("optimizer.warmup_steps: found 999, required <= ", settings=("optimizer.warmup_steps=999",)),
    "no sglang": Fault(
        "rollout.sglang.python: found no nowhere/python",
        settings=("rollout.engine=sglang", "rollout.sglang.python=nowhere/python"),
        kinds=RL_ONLY,
    ),
}
CASES = [(name, kind) for name, fault in FAULTS.items() for kind in fault.kinds]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_a_dry_run_names_the_fault(here, name, kind):
    fault = FAULTS[name]
    fault.make()
    found = refusal(kind, *fault.settings, ranks=fault.ranks)
    for part in fault.message.split("..."):
        assert part in found
        found = found[found.index(part) + len(part) :]


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_without_a_fault_it_finds_none_and_writes_nothing(here, kind):
    before = sorted(here.rglob("*"))
    assert checked(kind) == []
    assert sorted(here.rglob("*")) == before


def test_held_out_questions_that_are_not_asked_do_not_matter(here):
    questions = [
        {"question": "What is 10+10?", "answer": "20"},
        {"question": f"What is {'9' * 18}+10?", "answer": "2", "reward": "judge"},
    ]
    (here / "heldout.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    settings = ["rollout.max_tokens=240", "evaluation.questions=1"]
    assert checked("rl", *settings) == []
    assert "behind the prompt of heldout.jsonl:2" in refusal("rl", *settings[:1])


def test_what_a_start_asks_reads_no_rows_and_only_the_first_rank_of_a_node_looks(here, monkeypatch):
    Path("train.jsonl").write_text("no JSON")
    cfg = load(Path("rl.yaml"), ["model.path=model", "data.train=train.jsonl"])
    check_start(cfg, 1)
    Path("model/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        check_start(cfg, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_start(cfg, 1)


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [f"rewards.judge={{urls: [{NOBODY}/v1], model: m, tries: 1}}"],
            f"rewards: judge m at {NOBODY}/v1: found undecided (no reply from {NOBODY}/v1/chat/completions: ",
        ),
        (
            ["rollout.engine=sglang", "rollout.sglang.mode=remote", f"rollout.sglang.urls=[{NOBODY}]"],
            f"rollout.sglang.urls: {NOBODY}/server_info: ",
        ),
    ],
)
def test_a_live_dry_run_asks_the_servers_and_a_plain_one_does_not(here, settings, message):
    cfg = load(Path("rl.yaml"), ["model.path=model", "data.train=train.jsonl", *settings])
    dry_run(cfg, 1, is_live=False)
    with pytest.raises(ConfigError) as caught:
        dry_run(cfg, 1, is_live=True)
    assert message in str(caught.value)


def test_a_live_dry_run_tries_the_sandbox_if_a_reward_runs_code(here):
    row = {"question": "1+1=", "reward": "code", "tests": [{"stdin": "1", "stdout": "2"}]}
    Path("code.jsonl").write_text(json.dumps(row) + "\n")
    cfg = load(Path("rl.yaml"), ["model.path=model", "data.train=code.jsonl", "data.max_prompt_tokens=250"])
    assert not any("sandbox" in note for note in dry_run(cfg, 1, is_live=False))
    assert any(note.startswith("code rewards run in a sandbox of:") for note in dry_run(cfg, 1, is_live=True))


@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_an_interval_of_evaluations_without_anything_to_evaluate_is_noted(here, kind):
    nothing = ["data.heldout=null", "evaluation.every=7"]
    note = "evaluation.every: found 7, but no data.heldout" + " or evaluation.benchmarks" * (kind == "rl")
    assert f"{note}: nothing is evaluated" in checked(kind, *nothing)
    shutil.copy("texts.jsonl", "others.jsonl")
    some = "data.heldout=heldout.jsonl" if kind == "rl" else "data.heldout=others.jsonl"
    for quiet in ([some, nothing[1]], [nothing[0], "evaluation.every=0"]):
        assert not any("evaluat" in line for line in checked(kind, *quiet))


# ---- pipelines and plans ---------------------------------------------------------------------------------------

PIPELINE = """
run_dir: run
stages:
  base: {stage: sft, model: {path: model}, data: {train: texts.jsonl, template: r1_zero, max_tokens: 64}}
  zero: {config: rl.yaml, model: {path: base}, data: {train: train.jsonl, heldout: heldout.jsonl}}
"""


def of_pipeline(*overrides: str, ranks: int = 1) -> list[str]:
    Path("p.yaml").write_text(PIPELINE)
    return dry_run_of(load_pipeline(Path("p.yaml"), list(overrides)), ranks, is_live=False)


def test_a_dry_run_of_a_pipeline_checks_every_stage_with_what_is_there(here):
    assert of_pipeline() == ["stage zero: not checked with model.path, which is to be made"]
    shutil.copytree("model", "run/base/model")
    assert of_pipeline() == []


@pytest.mark.parametrize(
    ("make", "override", "message"),
    [
        (lambda: Path("texts.jsonl").write_text("[1]"), "seed=1", "stage base: texts.jsonl:1: found list, required"),
        (lambda: Path("train.jsonl").write_text("[1]"), "seed=1", "stage zero: train.jsonl:1: found list, required"),
        (lambda: Path("model/config.json").write_text("{"), "seed=1", "stage base: model/config.json: not valid JSON"),
        (lambda: None, "stages.base.data.max_tokens=5", "stage base: texts.jsonl: 64 of 64 texts"),
        (lambda: None, "run_dir=train.jsonl", "stage base: run_dir: train.jsonl/base: Not a directory"),
    ],
)
def test_a_dry_run_of_a_pipeline_names_the_stage(here, make, override, message):
    make()
    with pytest.raises(ConfigError) as caught:
        of_pipeline(override)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "gpus", "message"),
    [
        ((), 7, "grpo.questions: found 16, required a multiple of the 7 data-parallel ranks"),
        ((), 24, "grpo.questions: found 16, required a multiple of the 24 data-parallel ranks"),
        (("parallel.data=2",), 4, "parallel.data: found 2, required 4"),
        (("parallel.tensor=4",), 4, "parallel.tensor: 4 does not divide the model's"),
        (("rollout.max_tokens={0: 16, 9: 256}",), 1, "rollout.max_tokens: found 256 from step 9 on, required <= 255"),
        (("model.fp8=true", "parallel.tensor=2"), 2, "model.fp8: the hidden size is 32, required a multiple of 128"),
    ],
)
def test_a_plan_refuses_what_a_start_refuses(here, settings, gpus, message):
    data = ["model.path=model", "data.train=train.jsonl"]
    with pytest.raises(ConfigError) as caught:
        run_plan(
            load(Path("rl.yaml"), [*data, *settings]), gpus, "h100", auto=False, assume=[], as_json=True, html=None
        )
    assert message in str(caught.value)
    # The dry run knows the longest prompt, too.
    assert message.partition(" required")[0] in refusal("rl", *settings, ranks=gpus)


def test_a_search_for_layouts_keeps_to_those_that_share_the_batch(here):
    cfg = load(Path("rl.yaml"), ["model.path=model", "data.train=train.jsonl", "grpo.questions=2"])
    arch, assumed = read_architecture(Path("model")), assumptions([])
    plans = search(arch, job_of(cfg, assumed), 8, gpu_named("h100"), assumed, keep=99)
    assert {plan.layout.data for plan in plans} <= {1, 2}
    assert plans
