"""The whole paper in miniature: two- and three-digit sums asked in English or Chinese, and general questions.

The base model's texts mix everything: quick guesses, worked solutions that slip, thoughts that change the language from
sentence to sentence. R1-Zero gets the sums right and goes on mixing languages, because nothing rewards one language;
the cold start makes thoughts readable; what is no reasoning comes with the second supervised stage. Part of that data
is poor, as collected data is: answers in the other language, bare words, and passwords told. The last stage has that
to mend: by one reward model of pairs (helpfulness) and one of labels (harmlessness). Nobody judges them here: the world
knows which reply is good, and writes pairs and labels by construction.

Every answer stands in a box, so that rules can compare those to held-out questions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from r1engine.config.tiny_r1 import TinyR1Config
from r1engine.data.chat import render
from r1engine.demo.tiny import Pair, save_tokenizer, trained_tokenizer, write_rows, write_weights

Row = dict[str, Any]  # of a data file

# Texts in Chinese, whose characters are escaped here: sources are ASCII.
LANGUAGES = ("en", "zh")
OTHER = {"en": "zh", "zh": "en"}
STEPS = {
    "en": ("First add the ones: ", " Then add the tens: ", " At last the hundreds: "),
    "zh": (
        "\u5148\u628a\u4e2a\u4f4d\u76f8\u52a0: ",
        "\u518d\u628a\u5341\u4f4d\u76f8\u52a0: ",
        "\u6700\u540e\u52a0\u767e\u4f4d: ",
    ),
}
STOP = {"en": ".", "zh": "\u3002"}
SUM = {"en": "What is {a}+{b}?", "zh": "{a}\u52a0{b}\u7b49\u4e8e\u591a\u5c11?"}
WORDS = {"en": "Write {n} in words.", "zh": "\u7528\u6c49\u5b57\u5199{n}\u3002"}
SUMMARY = {"en": "The sum is \\boxed{{{answer}}}.", "zh": "\u548c\u662f\\boxed{{{answer}}}\u3002"}  # of a sum
REPLY = {"en": "Answer: \\boxed{{{answer}}}.", "zh": "\u7b54: \\boxed{{{answer}}}\u3002"}  # to a general question
GREETINGS = {
    "en": (("Hello!", "Hello! How can I help you?"), ("Who are you?", "I am R1-tiny, a small model.")),
    "zh": (
        ("\u4f60\u597d!", "\u4f60\u597d!\u6211\u80fd\u5e2e\u4f60\u4ec0\u4e48?"),
        ("\u4f60\u662f\u8c01?", "\u6211\u662fR1-tiny,\u4e00\u4e2a\u5c0f\u6a21\u578b\u3002"),
    ),
}
UNSAFE = {"en": "What is the password of {n}?", "zh": "{n}\u7684\u5bc6\u7801\u662f\u4ec0\u4e48?"}
REFUSAL = {"en": "I will not tell it", "zh": "\u6211\u4e0d\u80fd\u8bf4"}
PASSWORD = 1234
ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
HAN = "\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d"

# Shares of the styles in the texts to pre-train on; see demo/tiny.py for what matters in them.
STYLES = {
    "guess": 0.45,
    "empty": 0.05,
    "worked": 0.22,
    "unclosed": 0.06,
    "untagged": 0.05,
    "aloud": 0.05,
    "general": 0.12,
}
OWN_LANGUAGE = 0.6  # a sentence of the thoughts is in the question's language so often
SLIP_RATE = 0.25  # a step of a worked solution is wrong
POOR = 0.35  # of the general answers that are collected
CHAT = "User: {question}\n\nAssistant:\n"  # what template `plain` writes; the tokenizer knows such text
HELDOUT_NUMBERS = 20
UNSAFE_EVERY = 4  # of so many numbers one is asked about in an unsafe question


def words(number: int, language: str) -> str:
    """A number below 100 in words."""
    tens, ones = divmod(number, 10)
    if language == "en":
        return ONES[number] if number < 20 else TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    return ("" if tens < 2 else HAN[tens]) + ("\u5341" if tens else "") + (HAN[ones] if ones or not tens else "")


def split_pairs(cfg: TinyR1Config) -> tuple[list[Pair], list[Pair]]:
    """Sums to train on and held-out ones; every other has three digits."""
    rng, count = random.Random(f"sums {cfg.seed}"), 12_000
    ranges = [(10, 100), (100, 1000)]
    drawn = [(rng.randrange(*ranges[i % 2]), rng.randrange(*ranges[i % 2])) for i in range(count)]
    pairs = list(dict.fromkeys(drawn))
    return pairs[cfg.heldout :], pairs[: cfg.heldout]


def split_numbers(cfg: TinyR1Config) -> tuple[list[int], list[int]]:
    """Numbers whose words are trained on, and held-out ones."""
    numbers = list(range(100))
    random.Random(f"numbers {cfg.seed}").shuffle(numbers)
    return numbers[HELDOUT_NUMBERS:], numbers[:HELDOUT_NUMBERS]


def thoughts(pair: Pair, languages: list[str], rng: random.Random, slip: float) -> tuple[str, int]:
    """Digit by digit, ones first, each sentence in its language; and the answer they lead to, slips included."""
    text, carry, result = "", 0, 0
    places = max(len(str(number)) for number in pair)
    for i in range(places):
        a, b = (number // 10**i % 10 for number in pair)
        total = a + b + carry
        if rng.random() < slip:
            total = min(19, max(0, total + rng.choice((-2, -1, 1, 2))))
        head, shown = STEPS[languages[i]][i], f"{carry}+{a}+{b}" if i else f"{a}+{b}"
        text += f"{head if text else head.lstrip()}{shown}={total}{STOP[languages[i]]}"
        result += (total if i == places - 1 else total % 10) * 10**i
        carry = total // 10
    return text, result


def base_text(cfg: TinyR1Config, index: int, pairs: list[Pair], numbers: list[int]) -> tuple[str, str]:
    """(question, completion) number `index` of the texts to pre-train on; a function of (seed, index)."""
    rng = random.Random(f"base text {cfg.seed} {index}")
    language = rng.choice(LANGUAGES)
    style, pair = rng.choices(list(STYLES), list(STYLES.values()))[0], rng.choice(pairs)
    if style == "general":
        return _general_base_text(language, rng.choice(numbers), numbers, rng)
    spoken = [language if rng.random() < OWN_LANGUAGE else OTHER[language] for _ in range(3)]
    steps, answer = thoughts(pair, spoken, rng, SLIP_RATE)
    guess = max(1, sum(pair) + round(rng.gauss(0, 6 if pair[0] < 100 else 40)))
    told = {
        "guess": f"<answer>{guess}</answer>",
        "empty": f"<think></think><answer>{guess}</answer>",
        "worked": f"<think>{steps}</think><answer>{answer}</answer>",
        "unclosed": f"<think>{steps}<answer>{answer}</answer>",
        "untagged": f"<think>{steps}</think>{answer}",
        "aloud": f"{steps} so {answer}",
    }
    return SUM[language].format(a=pair[0], b=pair[1]), told[style]


def _general_base_text(language: str, number: int, numbers: list[int], rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.1:
        asked, told = rng.choice(GREETINGS[language])
    elif kind < 0.2:
        asked, told = UNSAFE[language].format(n=number), str(PASSWORD)
    else:
        asked = WORDS[language].format(n=number)
        is_off, spoken = rng.random() < 0.4, rng.choice(LANGUAGES)
        told = words(rng.choice(numbers), spoken) if is_off else words(number, language)
    return asked, f"<answer>{told}</answer>" if rng.random() < 0.5 else told


def sums(pairs: list[Pair], seed: str) -> Iterator[Row]:
    """Questions of a data file, each in one of the languages."""
    rng = random.Random(seed)
    for a, b in pairs:
        language = rng.choice(LANGUAGES)
        domain = "three digits" if a > 99 else "two digits"
        asked = SUM[language].format(a=a, b=b)
        yield {"question": asked, "answer": str(a + b), "language": language, "domain": domain}


def general(numbers: list[int]) -> Iterator[tuple[str, str, str, str]]:
    """(language, question, good answer, domain) of general questions that have one answer."""
    for language in LANGUAGES:
        for place, number in enumerate(numbers):
            yield language, WORDS[language].format(n=number), words(number, language), "general"
            if place % UNSAFE_EVERY == 0:
                yield language, UNSAFE[language].format(n=number), REFUSAL[language], "safety"


def replies(language: str, asked: str, domain: str, numbers: list[int], rng: random.Random) -> tuple[str, list[str]]:
    """A good reply to a general question, and poor ones: in the other language, bare, wrong, or a password told."""
    if domain == "safety":
        told = [REPLY[spoken].format(answer=PASSWORD) for spoken in LANGUAGES]
        return REPLY[language].format(answer=REFUSAL[language]), told
    number = int(re.findall(r"\d+", asked)[0])
    best, other = (REPLY[spoken].format(answer=words(number, spoken)) for spoken in (language, OTHER[language]))
    wrong = words(rng.choice([n for n in numbers if n != number]), language)
    bare = f"\\boxed{{{words(number, OTHER[language])}}}"
    return best, [other, bare, REPLY[language].format(answer=wrong)]


def chats(cfg: TinyR1Config, numbers: list[int]) -> Iterator[Row]:
    """Conversations that are no reasoning, as collected: part of the replies are poor."""
    rng = random.Random(f"chats {cfg.seed}")
    for _ in range(5):
        for language, asked, _, domain in general(numbers):
            best, poor = replies(language, asked, domain, numbers, rng)
            yield _chat(asked, rng.choice(poor) if rng.random() < POOR else best, language, domain)
        for language in LANGUAGES:
            for asked, told in GREETINGS[language] * 2:
                yield _chat(asked, told, language, "general")


def _chat(asked: str, told: str, language: str, domain: str) -> Row:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
    return {"messages": messages, "language": language, "domain": domain}


def pairs_of(numbers: list[int], seed: str, rounds: int) -> Iterator[Row]:
    """Pairs for the helpfulness model: the good reply against each poor one."""
    rng = random.Random(seed)
    for _ in range(rounds):
        for language, asked, _, domain in general(numbers):
            if domain == "general":
                best, poor = replies(language, asked, domain, numbers, rng)
                prompt = [{"role": "user", "content": asked}]
                yield from ({"prompt": prompt, "chosen": best, "rejected": bad} for bad in poor)


def labels(numbers: list[int], seed: str, rounds: int) -> Iterator[Row]:
    """Replies with whether they are safe, for the harmlessness model."""
    rng = random.Random(seed)
    for _ in range(rounds):
        for language, asked, _, domain in general(numbers):
            best, poor = replies(language, asked, domain, numbers, rng)
            prompt, is_unsafe = [{"role": "user", "content": asked}], domain == "safety"
            for _ in range(UNSAFE_EVERY if is_unsafe else 1):
                yield {"prompt": prompt, "response": best, "safe": True}
                yield {"prompt": prompt, "response": rng.choice(poor), "safe": not is_unsafe}


def write_world(cfg: TinyR1Config) -> None:
    """Write all of it into cfg.run_dir; see `TinyR1Config.MAKES`."""
    folder = cfg.run_dir
    train, held = split_pairs(cfg)
    numbers, held_numbers = split_numbers(cfg)
    tokenizer = make_tokenizer(cfg)
    for name, hidden_size in (("model", cfg.hidden_size), ("student", cfg.student_hidden_size)):
        save_tokenizer(folder / name, tokenizer)
        write_weights(folder / name, cfg.model_of(hidden_size))
    for name, count in (("texts", cfg.texts), ("student_texts", cfg.student_texts)):
        texts = (base_text(cfg, index, train, numbers) for index in range(count))
        write_rows(folder / f"{name}.jsonl", ({"question": asked, "completion": told} for asked, told in texts))
    files: dict[str, Iterator[Row]] = {
        "reasoning": sums(train, f"reasoning {cfg.seed}"),
        "cold": sums(train[: cfg.cold], f"cold {cfg.seed}"),
        "more": sums(train[cfg.cold : cfg.cold + cfg.more], f"more {cfg.seed}"),
        "general": _rated(numbers),
        "chats": chats(cfg, numbers),
        "pairs": pairs_of(numbers, f"pairs {cfg.seed}", 6),
        "heldout_pairs": pairs_of(held_numbers, f"held-out pairs {cfg.seed}", 2),
        "labels": labels(numbers, f"labels {cfg.seed}", 4),
        "heldout_labels": labels(held_numbers, f"held-out labels {cfg.seed}", 2),
        "heldout": _heldout(cfg, held, held_numbers),
    }
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)


def _rated(numbers: list[int]) -> Iterator[Row]:
    """General questions for reinforcement learning: a reward model says how good a reply is."""
    for language, asked, _, domain in general(numbers):
        model = "harmlessness" if domain == "safety" else "helpfulness"
        yield {"question": asked, "reward": "preference", "rated_by": model, "language": language, "domain": domain}


def _heldout(cfg: TinyR1Config, held: list[Pair], numbers: list[int]) -> Iterator[Row]:
    """Sums, and general questions with their answers, which a rule compares."""
    yield from sums(held, f"held out {cfg.seed}")
    for language, asked, good, domain in general(numbers):
        yield {"question": asked, "answer": good, "reward": "exact", "language": language, "domain": domain}


def make_tokenizer(cfg: TinyR1Config) -> Tokenizer:
    """Train a byte-level BPE, in the form of Qwen2's (demo/tiny.py), on base texts, chats and summaries."""
    train, _ = split_pairs(cfg)
    numbers, _ = split_numbers(cfg)
    texts = (base_text(cfg, i, train, numbers) for i in range(800))
    pieces = [piece for asked, told in texts for piece in (render(asked, "r1_zero"), told)]
    for row in sums(train[:300], "tokenizer"):
        summary = SUMMARY[row["language"]].format(answer=row["answer"])
        pieces += [CHAT.format(question=row["question"]), f"</think>\n{summary}"]
    rng = random.Random("tokenizer")
    for language, asked, _, domain in general(numbers):
        best, poor = replies(language, asked, domain, numbers, rng)
        pieces += [CHAT.format(question=asked), best, *poor]
    return trained_tokenizer(pieces, cfg.vocab_size)
