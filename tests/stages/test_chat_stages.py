"""Both stages on conversations: the tokens and the end of a turn are the chat template's, as transformers has them.

AutoTokenizer takes the class of the model's family, which splits words in its own way; the class here reads the file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from r1engine.config import Model, Optimizer, Parallel, RlConfig, SftConfig
from r1engine.hf.architecture import architecture_of, read_architecture
from r1engine.hf.prepared import prepare
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens
from r1engine.model.policy import Policy
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.stages import make_stage

# A turn ends with another token than a text of the base model does.
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [
    turns("What is 10+11?", "<think>0+1=1,0+1+1=2</think>21"),
    turns("1+1?", "2", "And 2+2?", "<answer>4</answer>", "3?", "It is 3."),
    [{"role": "system", "content": "Add."}, *turns("5+5?", "10")],
    turns("What is 7+7?", "14 " * 12),
]


@pytest.fixture(scope="module")
def instruct(tiny_base, tmp_path_factory) -> Path:
    """The tiny model as an instruct model, with conversations beside it."""
    folder = shutil.copytree(tiny_base / "tiny" / "model", tmp_path_factory.mktemp("instruct") / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|turn|>", special=True)])  # one of the ids that were unused
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    lines = [json.dumps({"messages": messages}) + "\n" for messages in CONVERSATIONS]
    (folder.parent / "train.jsonl").write_text("".join(lines))
    return folder


def sft(instruct: Path, run_dir: Path, world, **sections):
    data = {"train": instruct.parent / "train.jsonl", "template": "chat", "max_tokens": 128} | sections.pop("data", {})
    settings = {"sft": {"epochs": 1, "batch_size": 6}, "max_row_tokens": 256} | sections
    model = {"path": instruct} | settings.pop("model", {})
    cfg = SftConfig(model=model, run_dir=run_dir, data=data, **settings)
    return make_stage(cfg, world, Phases(), Progress("", enabled=False))


def expected_loss(instruct: Path, *, train_on: str) -> tuple[torch.Tensor, torch.nn.Module]:
    """Mean cross-entropy of the assistant's tokens in float64, each turn behind its history, all by transformers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(instruct)
    model = AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float64)
    losses = []
    for messages in CONVERSATIONS:
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "assistant"]
        for end in ends if train_on == "all" else ends[-1:]:
            prompt = tokenizer.apply_chat_template(messages[: end - 1], add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(messages[:end], tokenize=False)
            parts = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, whole.removeprefix(prompt))]
            tokens = torch.tensor([*parts[0], *parts[1]])
            logp = model(tokens[None]).logits[0, :-1].log_softmax(-1)
            losses.append(-logp.gather(1, tokens[1:, None])[len(parts[0]) - 1 :, 0])
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach(), model


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_loss_and_gradient_are_those_of_transformers_on_the_conversations(instruct, world, tmp_path, train_on):
    wanted, model = expected_loss(instruct, train_on=train_on)
    for rows in (128, 256, 1024):  # and do not depend on the rows
        stage = sft(
            instruct,
            tmp_path,
            world,
            data={"train_on": train_on},
            max_row_tokens=rows,
            optimizer={"lr": 1e-3, "clip_grad": 0.0},
        )
        assert len(stage.train) == (6 if train_on == "all" else 4) and stage.steps == 1
        done = stage.advance(0)
        assert done.metrics["loss"] == pytest.approx(wanted.item(), rel=1e-6)
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters())).item()
        assert done.metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_the_exported_folder_is_asked_and_stops_as_it_was_trained(instruct, world, tmp_path, template):
    data = {"template": template, "think": "prefilled", "train": answers(tmp_path)}
    stage = sft(instruct, tmp_path, world, data=data)
    stage.advance(0)
    stage.policy.export(tmp_path / "model")
    exported, start = tmp_path / "model", tmp_path / "start"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (exported / name).read_bytes() == (start / name).read_bytes()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported)
    asked = tokenizer.apply_chat_template(turns("1+1?"), add_generation_prompt=True, tokenize=False)
    tokens, num_prompt = stage.train.at(0)
    assert tokenizer.decode(tokens[:num_prompt]) == asked and asked.endswith("<think>\n")
    end = tokenizer.convert_tokens_to_ids("<|turn|>" if template == "chat" else "<|end|>")
    assert tokens[-1] == tokenizer.eos_token_id == end
    model = AutoModelForCausalLM.from_pretrained(exported)
    stops = model.generation_config.eos_token_id
    assert end in (stops if isinstance(stops, list) else [stops])
    assert end in stop_tokens(exported, load_tokenizer(exported))


def answers(folder: Path) -> Path:
    """One conversation with thoughts."""
    (folder / "a.jsonl").write_text(json.dumps({"messages": turns("1+1?", "<think>\none</think>2")}) + "\n")
    return folder / "a.jsonl"


def test_reinforcement_learning_asks_and_stops_by_the_chat_template(instruct, tiny_base, world, tmp_path):
    train = tiny_base / "tiny" / "train.jsonl"
    cfg = RlConfig(
        model={"path": instruct},
        run_dir=tmp_path,
        steps=1,
        data={
            "train": train,
            "template": "chat",
            "system": "Add.",
            "max_prompt_tokens": 64,
        },
        grpo={"questions": 2, "group_size": 2, "minibatches": 1},
        rollout={"max_tokens": 8},
        rewards={"workers": 1},
    )
    stage = make_stage(cfg, world, Phases(), Progress("", enabled=False))
    try:
        prompt = stage.prompts.next(1)[0]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(instruct)
        messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": prompt.question.text}]
        assert prompt.text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt.tokens == tokenizer.encode(prompt.text, add_special_tokens=False)
        generator = stage.parts.generator
        assert isinstance(generator, LocalGenerator) and generator._stop_tokens == {
            1,
            tokenizer.convert_tokens_to_ids("<|turn|>"),
        }
        stage.begin([])
        assert stage.advance(0).steps == 1
        for change in ({"template": "plain"}, {"system": "Be brief."}):
            other = cfg.model_copy(update={"data": cfg.data.model_copy(update=change), "run_dir": tmp_path / "other"})
            again = make_stage(other, world, Phases(), Progress("", enabled=False))
            try:
                assert again.identity()["data.train"][0] != stage.identity()["data.train"][0]
            finally:
                again.close()
    finally:
        stage.close()


def test_a_text_longer_than_the_models_positions_is_refused_with_the_ways_out(instruct, world, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": turns("q", "x y z " * 100)}) + "\n")
    data = {"train": tmp_path / "long.jsonl", "max_tokens": 1000}
    ways_out = r"lower data.max_tokens, or set model.max_positions"
    with pytest.raises(ValueError, match=rf"has 256 positions, .*long.jsonl has a text of .* {ways_out}"):
        sft(instruct, tmp_path, world, data=data, max_row_tokens=1024)
    with pytest.raises(ValueError, match=r"has 300 positions"):
        sft(instruct, tmp_path, world, data=data, max_row_tokens=1024, model={"max_positions": 300})


@pytest.mark.parametrize("template", ["chat", "none"])
def test_positions_and_rotary_base_are_those_of_the_configuration_in_training_and_export(
    instruct, world, tmp_path, template
):
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": turns("q", "x y z " * 100)}) + "\n")
    data = {"train": tmp_path / "long.jsonl", "max_tokens": 1000, "template": template}
    changes = {"max_positions": 1024, "rope_theta": 321.0}
    stage = sft(instruct, tmp_path, world, data=data, max_row_tokens=1024, model=changes)
    stage.policy.export(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert model.config.max_position_embeddings == 1024 and model.config.rope_parameters["rope_theta"] == 321.0
    tokens, num_prompt = stage.train.at(0)
    assert len(tokens) > 256
    logits = model(torch.tensor(tokens)[None]).logits[0, num_prompt - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[num_prompt:]))
    assert stage.advance(0).metrics["loss"] == pytest.approx(wanted.item(), rel=1e-6)


def test_positions_of_a_stretched_context_are_refused(folders, tmp_path, world):
    settings = {"path": folders["llama"][0], "max_positions": 1024}
    with pytest.raises(
        ValueError, match=r"model.max_positions: found 1024, required null: the rope_scaling in .*config"
    ):
        architecture_of(Model(**settings))
    assert architecture_of(Model(**settings | {"max_positions": 128})).max_positions == 128  # what it has
    with pytest.raises(ValueError, match=r"take a folder made by hf\.prepared"):
        Policy(Model(path=folders["qwen2"][0], rope_theta=5.0), Parallel(), Optimizer(), world)


@pytest.mark.parametrize("style", ["rope_theta", "rope_parameters"])
def test_the_rotary_base_is_written_wherever_it_is_read(folders, tmp_path, style):
    source = shutil.copytree(folders["qwen2"][0], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 5.0} if style == "rope_theta" else {"rope_parameters": {"rope_theta": 5.0}}
    (source / "config.json").write_text(json.dumps(config))
    prepare(source, tmp_path / "start", rope_theta=7.0)
    assert AutoConfig.from_pretrained(tmp_path / "start").rope_parameters["rope_theta"] == 7.0
    assert read_architecture(tmp_path / "start").rope_theta == 7.0
    assert json.loads((tmp_path / "start" / "config.json").read_text())["rope_theta"] == 7.0  # older readers
    assert (tmp_path / "start" / "model.safetensors").is_symlink()


def test_a_run_that_goes_on_reads_the_tokens_that_are_there_and_refuses_others(instruct, world, tmp_path):
    first = sft(instruct, tmp_path, world)
    (folder,) = (tmp_path / "tokens" / "train").iterdir()
    before = (folder / "tokens").stat().st_mtime_ns
    again = sft(instruct, tmp_path, world)
    assert (folder / "tokens").stat().st_mtime_ns == before
    assert again.identity() == first.identity()
    for change in ({"system": "Be brief."}, {"train_on": "last"}, {"template": "plain"}):
        other = sft(instruct, tmp_path / "other", world, data=change)
        assert other.identity()["data"][0] != first.identity()["data"][0]
