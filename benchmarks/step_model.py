"""The model, the prompts and the arithmetic of bench_step.py, the same for every engine that is measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 512
PAD, EOS = "<|pad|>", "<|end|>"


@dataclass(frozen=True)
class Shape:
    """A Qwen2 decoder with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    @property
    def matmul_weights(self) -> int:
        """Weights of the layers' matrix products, without the output matrix."""
        kv = self.hidden // self.heads * self.kv_heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """All weights that a product uses, the (tied) embedding once; biases and norms are left out."""
        return self.matmul_weights + VOCAB * self.hidden


@dataclass(frozen=True)
class Work:
    """One GRPO step: every completion has exactly `completion` tokens."""

    questions: int
    group: int
    prompt: int  # tokens
    completion: int  # tokens

    @property
    def completions(self) -> int:
        return self.questions * self.group

    def fields(self) -> dict[str, int]:
        return asdict(self)


SHAPES = {
    "3M": Shape(hidden=256, layers=4, heads=4, kv_heads=2, intermediate=704),
    "0.5M": Shape(hidden=128, layers=3, heads=4, kv_heads=2, intermediate=256),
}


def make_folder(folder: Path, shape: Shape) -> None:
    """Write a Hugging Face folder: a random model and a byte-level BPE trained on the LICENSE text.

    The end-of-text token has the first id that the model's vocabulary does not contain, so no engine can sample it
    and all of them make completions of full length without extra work.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((ROOT / "LICENSE").read_text().splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([EOS])
    assert tokenizer.token_to_id(EOS) == VOCAB
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCAB,
        pad_token_id=tokenizer.token_to_id(PAD),
        dtype="float32",
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def prompts(folder: Path, work: Work) -> list[tuple[str, list[int]]]:
    """Text and tokens of `work.questions` prompts of exactly `work.prompt` tokens, cut from the LICENSE text.

    Raises:
        ValueError: the text has not that many pieces that survive decoding and encoding again.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode((ROOT / "LICENSE").read_text()).ids
    pieces = [ids[i : i + work.prompt] for i in range(0, len(ids) - work.prompt, work.prompt)]
    texts = [(tokenizer.decode(piece), piece) for piece in pieces]
    same = [(text, piece) for text, piece in texts if tokenizer.encode(text).ids == piece]
    if len(same) < work.questions:
        raise ValueError(f"prompts: {len(same)} usable pieces of {work.prompt} tokens, {work.questions} are required")
    return same[: work.questions]


def floor_flop(shape: Shape, work: Work) -> dict[str, float]:
    """FLOP that a step cannot do without, by part; recomputation, padding and sampling are not in it.

    generate:  one forward of each prompt (shared by its group) and of each sampled token but the last.
    reference: one forward of every sequence.
    update:    a forward and a backward of every sequence, three forwards' worth.
    """
    length = work.prompt + work.completion

    def forward(tokens: int, contexts: int, outputs: int) -> float:
        """`contexts`: sum over the tokens of the positions each attends to."""
        return (
            2 * shape.matmul_weights * tokens
            + 4 * shape.hidden * shape.layers * contexts
            + 2 * VOCAB * shape.hidden * outputs
        )

    prefill = forward(
        work.questions * work.prompt, work.questions * work.prompt * (work.prompt + 1) // 2, work.questions
    )
    decoded = work.completions * (work.completion - 1)
    decode_contexts = work.completions * sum(range(work.prompt + 1, length))
    whole = forward(
        work.completions * length, work.completions * length * (length + 1) // 2, work.completions * work.completion
    )
    return {"generate": prefill + forward(decoded, decode_contexts, decoded), "reference": whole, "update": 3 * whole}
