"""Folders with real tokenizers and chat templates of the kinds that models have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = [
    "User: What is 1+1? Assistant: It is 2. <think>one and one are two</think> system user assistant",
    "a.method b.method c.method d.make e.more .m .m .m",
]


@dataclass(frozen=True)
class Kind:
    """A kind of chat model."""

    special: tuple[str, ...]  # added tokens; the first one is the end of a text
    end: str  # of a turn
    template: str | None
    bos: str | None = None  # written by the tokenizer's post-processor, too
    plain: tuple[str, ...] = ()  # added tokens that are not special


CHATML = """{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
# Takes thoughts and answer apart and writes them with its own white space; without thoughts it writes an empty block.
RETHINK = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set parts = message.content.split('</think>') %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.last %}
            {{- '<think>\\n' + (parts[0].split('<think>')[-1].strip('\\n') if parts|length > 1 else '') }}
            {{- '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- parts[-1].strip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|header|>' + message.role + '<|header_end|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|header_end|>\\n\\n' }}{%- endif %}
"""
# The one that the distilled models come with: the thoughts of every turn are deleted, and the prompt opens them.
FORGETS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + message.content.split('</think>')[-1] + eos_token }}"
    "{% elif message.role == 'user' %}{{ '<\uff5cUser\uff5c>' + message.content }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
)
DEEPSEEK = ("<\uff5cend\uff5c>", "<\uff5cbegin\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KINDS = {
    "chatml": Kind(IM, "<|im_end|>", CHATML, plain=("<think>", "</think>")),
    "rethink": Kind(IM, "<|im_end|>", RETHINK, plain=("<think>", "</think>")),
    "headers": Kind(
        ("<|end_of_text|>", "<|bos|>", "<|header|>", "<|header_end|>", "<|eot_id|>"), "<|eot_id|>", HEADERS, "<|bos|>"
    ),
    "forgets": Kind(DEEPSEEK, DEEPSEEK[0], FORGETS, DEEPSEEK[1], plain=("<think>", "</think>")),
    "bare": Kind(("<|endoftext|>",), "<|endoftext|>", None),
}


def save_tokenizer(folder: Path, kind: Kind, *, normalizer: object = None) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in kind.special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in kind.plain])
    if kind.bos is not None:
        front = [(kind.bos, tokenizer.token_to_id(kind.bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{kind.bos} $A", special_tokens=front)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": kind.special[0], "bos_token": kind.bos}
    settings |= {"chat_template": kind.template} if kind.template is not None else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"eos_token_id": tokenizer.token_to_id(kind.special[0]), "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
