"""A miniature R1-Zero: two-digit sums, and a small base model that solves them badly in many styles.

DeepSeek-R1-Zero starts from a base model whose pre-training text holds everything at once: quick answers,
worked solutions, slips, missing tags. Reinforcement learning does not teach it the sums; it finds out that
the worked solutions pay. This module makes the same situation small enough for two CPU cores: the questions,
the tokenizer, the model's shape, its random start, and the mixed-quality texts it is pre-trained on.

What is imitated, and honestly so: nobody tells the model to think. Most texts are short rough guesses, worked
solutions slip often and break the format often; the prompt is the paper's Table 1, the rewards are its two
rules. Accuracy and length can only grow because the rewards favour what the base does now and then.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from r1engine.config import TinyConfig
from r1engine.data.chat import render
from r1engine.hf.architecture import Architecture, read_architecture
from r1engine.hf.tensors import hf_shapes

PAD, EOS = "<|pad|>", "<|end|>"
# Where Qwen2's tokenizer splits a text (the pre_tokenizer of its tokenizer.json).
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Shares of the styles in the pre-training text; they sum to 1. Three things in them matter:
# - Short answers are common, so length has room to grow.
# - Short answers in the right format are rare. The format alone is learned within a few steps, and where a guess
#   is the easiest well-formed text, the policy collapses into it: short, well-formed, wrong.
# - Worked solutions in a broken format are never right by the accuracy rule. Where "steps, then an <answer>"
#   pays without the think tags, some seeds settle there: accurate, and without the format for good.
STYLES: dict[str, float] = {
    "guess": 0.55,  # <answer>87</answer>
    "empty_thought": 0.05,  # <think></think><answer>87</answer>
    "worked": 0.22,  # <think>7+8=15,1+4+3=8</think><answer>85</answer>
    "unclosed": 0.06,  # <think>7+8=15,1+4+3=8<answer>85</answer>
    "untagged": 0.06,  # <think>7+8=15,1+4+3=8</think>85
    "aloud": 0.06,  # 7+8=15,1+4+3=8 so 85
}
GUESS_DEVIATION = 6.0  # standard deviation of a guess: it has about the right size and is exact in 7 % of cases
SLIP_RATE = 0.25  # chance that one step of a worked solution is wrong; what follows is consistent with it

Pair = tuple[int, int]


def task_pairs(heldout: int, *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """All 8,100 pairs of two-digit numbers, shuffled, as (training pairs, held-out pairs); disjoint.

    Raises:
        ValueError: `heldout` leaves no training pair.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    if not 0 < heldout < len(pairs):
        raise ValueError(f"task_pairs: heldout={heldout}, required 1 to {len(pairs) - 1}")
    random.Random(f"pairs {seed}").shuffle(pairs)
    return pairs[heldout:], pairs[:heldout]


def question(pair: Pair) -> str:
    """The question as it stands in the data file."""
    return f"What is {pair[0]}+{pair[1]}?"


def write_world(cfg: TinyConfig) -> None:
    """Write all of it into cfg.run_dir: model/ (tokenizer and random weights), texts.jsonl to pre-train it on, and
    train.jsonl and heldout.jsonl, the questions (fields `question` and `answer`)."""
    folder = cfg.run_dir
    write_model(folder / "model", cfg)
    train, heldout = task_pairs(cfg.heldout, seed=cfg.seed)
    for name, pairs in (("train", train), ("heldout", heldout)):
        write_rows(folder / f"{name}.jsonl", ({"question": question(p), "answer": str(sum(p))} for p in pairs))
    texts = base_texts(cfg.texts, seed=cfg.seed, pairs=train)
    write_rows(folder / "texts.jsonl", ({"question": asked, "completion": told} for asked, told in texts))


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """A .jsonl file."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _worked_steps(pair: Pair, rng: random.Random) -> tuple[str, int]:
    """Digit by digit, ones first: "7+8=15,1+4+3=8" and the answer it leads to, slips included."""
    (a_tens, a_ones), (b_tens, b_ones) = divmod(pair[0], 10), divmod(pair[1], 10)
    ones = a_ones + b_ones
    if rng.random() < SLIP_RATE:
        ones = min(18, max(0, ones + rng.choice((-2, -1, 1, 2))))
    carry = ones // 10
    tens = carry + a_tens + b_tens
    if rng.random() < SLIP_RATE:
        tens = max(1, tens + rng.choice((-1, 1)))
    return f"{a_ones}+{b_ones}={ones},{carry}+{a_tens}+{b_tens}={tens}", tens * 10 + ones % 10


def base_completion(pair: Pair, style: str, rng: random.Random) -> str:
    """One answer in one of STYLES, as the base model's pre-training text has it.

    Raises:
        ValueError: an unknown style.
    """
    guess = max(1, sum(pair) + round(rng.gauss(0.0, GUESS_DEVIATION)))
    steps, answer = _worked_steps(pair, rng)
    texts = {
        "guess": f"<answer>{guess}</answer>",
        "empty_thought": f"<think></think><answer>{guess}</answer>",
        "worked": f"<think>{steps}</think><answer>{answer}</answer>",
        "unclosed": f"<think>{steps}<answer>{answer}</answer>",
        "untagged": f"<think>{steps}</think>{answer}",
        "aloud": f"{steps} so {answer}",
    }
    if style not in texts:
        raise ValueError(f"base_completion: unknown style {style!r}, required one of {', '.join(texts)}")
    return texts[style]


def base_texts(count: int, *, seed: int, pairs: list[Pair]) -> Iterator[tuple[str, str]]:
    """(question, completion) of the texts to pre-train on, without template and end token.

    Each text depends on (seed, index) alone.

    Args:
        count: number of texts.
        seed:  of the world.
        pairs: the training pairs (never the held-out ones).
    """
    styles, shares = list(STYLES), list(STYLES.values())
    for index in range(count):
        rng = random.Random(f"base text {seed} {index}")
        pair = rng.choice(pairs)
        style = rng.choices(styles, shares)[0]
        yield question(pair), base_completion(pair, style, rng)


def make_tokenizer(folder: Path, cfg: TinyConfig) -> Tokenizer:
    """Train a byte-level BPE on texts in the paper's template and write it as a Hugging Face tokenizer.

    Digits are single tokens. Pieces may cross spaces, so the constant text of the template becomes a handful
    of tokens: a prompt has 7 instead of some 90, and a sequence a quarter of the length. The tags are ordinary
    text. Ids from the tokenizer's size (477) up to cfg.vocab_size stay unused.

    Raises:
        ValueError: cfg.vocab_size is too small for the bytes, the special tokens and the template.
    """
    pairs, _ = task_pairs(cfg.heldout, seed=cfg.seed)
    texts = base_texts(512, seed=cfg.seed, pairs=pairs)
    pieces = [piece for asked, told in texts for piece in (render(asked, "r1_zero"), told)]
    tokenizer = trained_tokenizer(pieces, cfg.vocab_size)
    size = len(tokenizer.encode(render(question(pairs[0]), "r1_zero")).ids)
    if size > 32:
        raise ValueError(f"make_tokenizer: a prompt has {size} tokens with vocab_size={cfg.vocab_size}, required <= 32")
    save_tokenizer(folder, tokenizer)
    return tokenizer


def trained_tokenizer(pieces: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of these texts, with digits alone, in the form of Qwen2's."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return _in_form_of_qwen2(tokenizer, sorted({part for piece in pieces for part in re.split(r"\d", piece)}))


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _in_form_of_qwen2(tokenizer: Tokenizer, parts: list[str]) -> Tokenizer:
    """A tokenizer with the same ids for texts of digits and `parts`, as transformers' AutoTokenizer builds it.

    For a model of type qwen2 that takes vocabulary, merges and added tokens of tokenizer.json, but splits texts at
    words, whatever tokenizer.json says. So this one splits there, too, and the parts that are a single token become
    added ones: those are found before a text is split. Their entries in the vocabulary are spelled as the text is, not
    byte by byte, to keep their ids; the merges that would make them are dropped.
    """
    content = json.loads(tokenizer.to_str())
    vocab, merges, respelled = content["model"]["vocab"], content["model"]["merges"], set()
    for part in parts:
        encoded = tokenizer.encode(part)
        if len(encoded.ids) != 1 or len(part) == 1:
            continue
        if encoded.tokens[0] != part:
            vocab[part] = vocab.pop(encoded.tokens[0])
            respelled.add(encoded.tokens[0])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        content["added_tokens"].append({"id": encoded.ids[0], "content": part, **flags})
    content["model"]["merges"] = [m for m in merges if not {m[0], m[1], m[0] + m[1]} & respelled]
    content["added_tokens"].sort(key=lambda token: token["id"])
    made = Tokenizer.from_str(json.dumps(content))
    made.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    return made


def make_model_config(cfg: TinyConfig) -> dict[str, object]:
    """The content of config.json: a Qwen2 or DeepSeek-V3 model, small in every dimension."""
    theta = 10_000.0  # sequences are under 256 tokens
    family = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
    if cfg.family == "deepseek_v3":
        family = _deepseek_config(cfg)
    return {
        **family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "rope_theta": theta,  # transformers 4 reads this, transformers 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "dtype": "float32",
    }


def _deepseek_config(cfg: TinyConfig) -> dict[str, object]:
    head = cfg.hidden_size // cfg.heads
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "q_lora_rank": cfg.hidden_size // 2,
        "kv_lora_rank": cfg.hidden_size // 4,
        "qk_nope_head_dim": head // 2,
        "qk_rope_head_dim": head // 2,
        "v_head_dim": head,
        "first_k_dense_replace": 1,
        "n_routed_experts": cfg.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": cfg.intermediate_size // 4,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def init_weights(arch: Architecture, *, seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights under their Hugging Face names, from a private generator.

    Normal with deviation 0.02, except the two projections of a layer that write into the residual stream,
    which have 0.02 / sqrt(2 * layers) so that the stream does not grow with depth; norms 1, biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in hf_shapes(arch).items():
        if len(shape) == 1:
            weights[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            continue
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / (2 * arch.num_layers) ** 0.5 if into_residual else 0.02
        weights[name] = torch.randn(shape, generator=generator) * deviation
    return weights


def write_model(folder: Path, cfg: TinyConfig) -> None:
    """Write a complete Hugging Face folder: tokenizer, config.json and random model.safetensors."""
    make_tokenizer(folder, cfg)
    write_weights(folder, cfg)


def write_weights(folder: Path, cfg: TinyConfig) -> None:
    """Write config.json, generation_config.json and random model.safetensors."""
    (folder / "config.json").write_text(json.dumps(make_model_config(cfg), indent=2) + "\n")
    eos = {"eos_token_id": 1, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(eos, indent=2) + "\n")
    weights = init_weights(read_architecture(folder), seed=cfg.seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
