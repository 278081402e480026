"""Which characters each token of a completion is."""

import math

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from r1engine.batch import Completion, Prompt
from r1engine.data.question import Question
from r1engine.hf.tokenizer import PromptTokenizer
from r1engine.rollout.token_texts import token_texts

TEXT = "It is 7 \U0001f600 \u4e2d\u6587. <think>caf\u00e9</think>"


def bytes_only() -> PromptTokenizer:
    """Every byte is a token: the hardest case for characters of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PromptTokenizer(tokenizer)


def words() -> PromptTokenizer:
    """As Llama 2: a word begins with a mark that is a blank, but not in front of a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<end>"]))
    return PromptTokenizer(tokenizer)


def completion(ids: list[int], text: str, *, truncated: bool = False) -> Completion:
    prompt = Prompt(0, [1], "", Question(""))
    return Completion(prompt, 0, ids, [math.log((i % 4 + 1) / 4) for i in range(len(ids))], text, truncated)


@pytest.mark.parametrize("make", [bytes_only, words])
def test_the_characters_of_all_tokens_are_the_text(make):
    tokenizer = make()
    ids = tokenizer.encode(TEXT).ids
    found = token_texts(completion([*ids, tokenizer.token_to_id("<end>")], TEXT), tokenizer.decode)
    assert sum(found["token_characters"]) == len(TEXT) and found["token_characters"][-1] == 0
    assert len(found["token_characters"]) == len(ids) + 1 and len(found["token_characters"]) > 5
    assert found["token_percent"][:5] == [25, 50, 75, 100, 25]


def test_a_character_of_several_bytes_belongs_to_its_last_token():
    tokenizer = bytes_only()
    found = token_texts(
        completion(tokenizer.encode("a\U0001f600b").ids, "a\U0001f600b", truncated=True), tokenizer.decode
    )
    assert found["token_characters"] == [1, 0, 0, 0, 1, 1]


def test_half_a_character_at_the_end_is_shown_as_the_text_shows_it():
    tokenizer = bytes_only()
    ids = tokenizer.encode("a\u4e2d").ids[:3]
    text = tokenizer.decode(ids)
    assert token_texts(completion(ids, text, truncated=True), tokenizer.decode)["token_characters"] == [1, 0, 1]


def test_what_does_not_add_up_is_left_out():
    tokenizer = bytes_only()
    assert token_texts(completion(tokenizer.encode("abc").ids, "another text", truncated=True), tokenizer.decode) == {}
