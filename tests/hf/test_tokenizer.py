"""The loader of tokenizers: nothing that a tokenizer.json holds besides the tokenizer changes a prompt."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from r1engine.hf.tokenizer import load_tokenizer

BOS, EOS, USER = 256, 257, 258
ALPHABET = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def byte_level() -> Tokenizer:
    """One token a byte, and three special ones."""
    tokenizer = Tokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<u>")])
    return tokenizer


def post(single: str) -> processors.TemplateProcessing:
    ids = [("<s>", BOS), ("</s>", EOS), ("<u>", USER)]
    return processors.TemplateProcessing(single=single, special_tokens=ids)


def plain(text: str) -> list[int]:
    return byte_level().encode(text).ids


def cut(**settings: object):
    return lambda tokenizer: tokenizer.enable_truncation(**settings)


def padded(**settings: object):
    return lambda tokenizer: tokenizer.enable_padding(pad_id=EOS, pad_token="</s>", **settings)


def added(*parts: object):
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.post_processor = processors.Sequence(list(parts))

    return change


BYTES = processors.ByteLevel(trim_offsets=False)
CHAT = "<s><u>1+1?"
# what the file holds -> what it puts in front of a text
SETTINGS = {
    "cut on the right": (cut(max_length=4), []),
    "cut on the left": (cut(max_length=4, direction="left"), []),
    "cut with a stride": (cut(max_length=4, stride=2, strategy="only_first"), []),
    "padded to a length": (padded(length=24), []),
    "padded on the left": (padded(length=24, direction="left"), []),
    "padded to a multiple": (padded(pad_to_multiple_of=16), []),
    "padded to the longest": (padded(), []),
    "BOS": (added(post("<s> $A")), [BOS]),
    "BOS behind another step": (added(BYTES, post("<s> $A")), [BOS]),
    "EOS": (added(post("$A </s>")), []),
    "BOS and EOS": (added(post("<s> $A </s>")), [BOS]),
    "as BERT": (added(processors.BertProcessing(("</s>", EOS), ("<s>", BOS))), [BOS]),
    "two in front": (added(post("<s> <u> $A")), [BOS, USER]),
}


@pytest.mark.parametrize("text", ["What is twelve plus thirty?", CHAT, "<u>no BOS", " <s> inside", "x", "\u4e2d\u6587"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_prompt_is_the_whole_text_behind_one_bos(tmp_path, settings, text):
    change, front = SETTINGS[settings]
    tokenizer = byte_level()
    change(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded, whole = load_tokenizer(tmp_path), plain(text)
    wanted = whole if whole[: len(front)] == front else front + whole
    assert loaded.encode(text).ids == wanted
    assert [one.ids for one in loaded.encode_batch([text, "longer than it", text])][::2] == [wanted, wanted]
    assert loaded.decode(wanted, skip_special_tokens=False).endswith(text)


def test_all_of_it_at_once(tmp_path):
    tokenizer = byte_level()
    for change in (cut(max_length=3), padded(length=40), added(post("<s> $A </s>"))):
        change(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(CHAT).ids == plain(CHAT)
    assert load_tokenizer(tmp_path).encode("1+1?").ids == [BOS, *plain("1+1?")]


@pytest.mark.parametrize(
    ("names", "told"), [((), ""), (("tiktoken.model",), "tiktoken.model"), (("tokenizer.model",), "")]
)
def test_a_folder_with_another_tokenizer_is_told_what_to_do(tmp_path, names, told):
    for name in names:
        (tmp_path / name).write_text("IQ== 0\n")
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: no such file; required to encode prompts")
    assert (f"The folder has {names[-1]}: docs/models.md" in message) if names else message.endswith("completions")
