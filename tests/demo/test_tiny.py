"""The miniature R1-Zero: what its texts, its tokenizer and its model folder promise."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from r1engine.config import TinyConfig
from r1engine.config.pipeline import load_pipeline
from r1engine.data.chat import render as template
from r1engine.demo import tiny
from r1engine.hf.architecture import read_architecture
from r1engine.hf.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 64}
WORLD = TinyConfig(**SIZES, seed=3, texts=3000)
PAIRS, HELDOUT = tiny.task_pairs(64, seed=3)


def render(question: str) -> str:
    return template(question, "r1_zero")


def texts(num_texts: int, seed: int = 3) -> list[tuple[str, str]]:
    """(prompt, completion) of the texts to pre-train on."""
    return [(render(asked), told) for asked, told in tiny.base_texts(num_texts, seed=seed, pairs=PAIRS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The whole world."""
    cfg = WORLD.model_copy(update={"run_dir": tmp_path_factory.mktemp("tiny")})
    tiny.write_world(cfg)
    return cfg.run_dir


@pytest.fixture(scope="module")
def folder(made) -> Path:
    return made / "model"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_heldout_questions_are_in_no_training_text(made):
    asked = [{row["question"] for row in rows(made / f"{name}.jsonl")} for name in ("train", "heldout", "texts")]
    assert len(asked[0]) == 8100 - 64 and len(asked[1]) == 64
    assert not asked[0] & asked[1]
    assert {tiny.question(pair) for pair in HELDOUT} == asked[1]
    assert asked[2] <= asked[0]


def test_answers_are_the_sums(made):
    for row in [*rows(made / "train.jsonl"), *rows(made / "heldout.jsonl")]:
        a, b = map(int, re.fullmatch(r"What is (\d\d)\+(\d\d)\?", row["question"]).groups())
        assert int(row["answer"]) == a + b


def test_texts_are_a_function_of_seed_and_index(made):
    assert texts(8) == texts(20)[:8]
    assert texts(8) != texts(8, seed=4)
    written = [(render(row["question"]), row["completion"]) for row in rows(made / "texts.jsonl")]
    assert written == texts(3000)


def test_worked_solution_without_a_slip_by_hand(monkeypatch):
    monkeypatch.setattr(tiny, "SLIP_RATE", 0.0)
    rng = tiny.random.Random(0)
    worked = "<think>7+8=15,1+4+3=8</think><answer>85</answer>"
    assert tiny.base_completion((47, 38), "worked", rng) == worked
    assert "0+9+9=18</think><answer>180</answer>" in tiny.base_completion((90, 90), "worked", rng)


def test_unknown_style_is_named():
    with pytest.raises(ValueError, match="unknown style 'essay', required one of guess"):
        tiny.base_completion((10, 10), "essay", tiny.random.Random(0))


def style_of(completion: str) -> str:
    patterns = {
        "guess": r"<answer>\d+</answer>",
        "empty_thought": r"<think></think><answer>\d+</answer>",
        "worked": r"<think>[^<]+</think><answer>\d+</answer>",
        "unclosed": r"<think>[^<]+<answer>\d+</answer>",
        "untagged": r"<think>[^<]+</think>\d+",
        "aloud": r"[^<]+ so \d+",
    }
    return next(style for style, pattern in patterns.items() if re.fullmatch(pattern, completion))


def test_styles_come_in_their_shares():
    assert sum(tiny.STYLES.values()) == pytest.approx(1.0)
    counts = Counter(style_of(completion) for _, completion in texts(4000))
    for style, share in tiny.STYLES.items():
        # four standard deviations of a share among 4,000 draws
        assert counts[style] / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)


def test_base_texts_are_mostly_wrong_and_worked_solutions_mostly_better():
    right, seen = Counter(), Counter()
    for prompt, completion in texts(4000):
        a, b = map(int, re.search(r"(\d\d)\+(\d\d)", prompt).groups())
        style = style_of(completion)
        seen[style] += 1
        right[style] += completion.endswith(f"<answer>{a + b}</answer>")
    assert right.total() / seen.total() < 0.4
    assert right["worked"] / seen["worked"] > 0.5
    assert right["guess"] / seen["guess"] < 0.12


def test_tokenizer_is_the_same_every_time_and_keeps_digits_apart(folder, tmp_path):
    again = tiny.make_tokenizer(tmp_path, WORLD)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    prompt, completion = texts(1)[0]
    for text in (prompt, completion, "caf\u00e9\n<think>12345</think>"):
        assert again.decode(again.encode(text).ids) == text
    assert again.encode("12345").tokens == list("12345")
    pieces = again.encode(prompt).tokens
    assert len(pieces) == 7 and pieces[1] + pieces[2] + pieces[3] + pieces[4] + pieces[5] in prompt


def test_a_vocabulary_too_small_for_the_template_is_refused(tmp_path):
    small = WORLD.model_copy(update={"vocab_size": 270})
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens with vocab_size=270, required <= 32"):
        tiny.make_tokenizer(tmp_path, small)


def test_transformers_loads_the_folder(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
    prompt, completion = texts(1)[0]
    ids = tokenizer.encode(prompt + completion, add_special_tokens=False)
    assert tokenizer.decode([*ids, 1], skip_special_tokens=True) == prompt + completion
    own = load_tokenizer(folder)
    assert len(tokenizer(prompt).input_ids) == 7
    for text in [part for pair in texts(200) for part in pair] + ["It's 12 so what?", " so\n\nmore  words caf\u00e9"]:
        assert tokenizer(text).input_ids == own.encode(text).ids
        assert tokenizer.decode(own.encode(text).ids) == own.decode(own.encode(text).ids) == text
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.eos_token_id == 1
    own = tiny.init_weights(read_architecture(folder), seed=3)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in own.items())
    assert set(loaded) - set(own) == {"lm_head.weight"}  # tied
    assert torch.equal(loaded["lm_head.weight"], own["model.embed_tokens.weight"])
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), WORLD.vocab_size)


def test_initial_weights_are_seeded_and_leave_the_global_generator_alone(folder):
    before, arch = torch.get_rng_state(), read_architecture(folder)
    first, second, other = (tiny.init_weights(arch, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert first["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert first["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)  # 2 layers


def test_the_demos_are_valid_and_fit_the_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, texts_each_step in (("demo", 96), ("demo_moe", 96)):
        world, base, r1_zero = (stage.cfg for stage in load_pipeline(Path(f"configs/{name}.yaml"), []).stages)
        assert world.texts % base.sft.batch_size == 0 and base.sft.batch_size == texts_each_step
        assert max(r1_zero.longest_sequence, base.data.max_tokens) <= 256  # max_position_embeddings
