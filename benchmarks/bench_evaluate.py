"""An evaluation beside its generator, transformers and lm-eval; how long it takes to go on; what grading adds.

    python benchmarks/bench_evaluate.py [--peer-python .venv-lm-eval/bin/python] [--smoke]

`drawing`: tokens a CPU second of `evaluate` (weights, drawing, grading, files, summary), of the embedded generator
alone, of transformers.generate alone, and of an evaluation by lm-eval's hf backend (`make lm-eval`): the same model,
prompts and sampling, in turns; with replies of one length, and with replies that end by themselves. `grading`: what
500 slow graders add to the wall time of an evaluation, beside graders that decide at once. `resume`: seconds to find
what is missing of so many stored and graded replies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import timing
import torch
from bench_generate import SIZES, SMOKE_SIZES, Case, new_model, run_ours, run_transformers
from driven import Driven
from tokenizers import Tokenizer, models, pre_tokenizers

from r1engine import ranks
from r1engine.batch import Prompt
from r1engine.config.evaluation import BenchmarkSettings, Suite
from r1engine.data.question import Question
from r1engine.evaluation.entries import Ask, load_entries
from r1engine.evaluation.evaluate import evaluate
from r1engine.evaluation.lines import GradeLine, SampleLine
from r1engine.evaluation.runner import Grading, draw_and_grade, missing
from r1engine.evaluation.samplers import LocalSampler, OnReply
from r1engine.evaluation.store import Store
from r1engine.rewards.from_config import make_scorer
from r1engine.rollout.local.generator import LocalGenerator


@dataclass(frozen=True)
class Model:
    """A random model in a folder, the questions that it is asked, and the ids that end a reply."""

    folder: Path
    module: torch.nn.Module
    stops: list[int]
    questions: Path
    prompts: list[Prompt]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny cases, no peer: does it run?")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-python", metavar="PATH", help="python of an environment with lm-eval")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [Case("one_length", 64, 4, 32, 64, 64, 0), Case("own_lengths", 128, 4, 32, 64, 64, 16)]
    if args.smoke:
        cases, args.repeats, args.peer_python = [Case("smoke", 4, 2, 16, 8, 4, 16)], 1, None
    with tempfile.TemporaryDirectory(prefix="bench-evaluate-") as folder:
        sizes = SMOKE_SIZES if args.smoke else SIZES
        made = [make_model(Path(folder) / case.name, case, sizes) for case in cases]
        for model, case in zip(made, cases, strict=True):
            drawn = drawing(model, case, args.repeats, args.peer_python)
            timing.emit("evaluate", f"drawing/{case.name}", torch.device("cpu"), drawn)
        replies, max_tokens = (8, 8) if args.smoke else (500, 512)
        for graded in GRADED:
            found = grading(made[0], graded, replies, max_tokens, args.repeats)
            timing.emit("evaluate", f"grading/{graded.name}", torch.device("cpu"), found)
        found = resume(Path(folder), 400 if args.smoke else 32_000)
        timing.emit("evaluate", "resume", torch.device("cpu"), found)


def make_model(folder: Path, case: Case, sizes: dict[str, object]) -> Model:
    """A random model whose tokens are words, divided by blanks, and one question for each prompt of the case."""
    size = int(str(sizes["vocab_size"]))
    stops = list(range(1, 1 + case.num_stops)) or [size]  # behind the vocabulary: never drawn
    module = new_model(folder, sizes, stops)
    words = {f"<{i}>" if i in stops else f"w{i}": i for i in range(size + 1)}  # no word begins with the end's text
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"eos_token": f"<{stops[0]}>", "pad_token": "w0", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(end))
    ids = [[100 + (i * 7 + j) % 300 for j in range(case.prompt_tokens)] for i in range(case.prompts)]
    prompts = [Prompt(i, tokens, "", Question("")) for i, tokens in enumerate(ids)]
    questions = folder / "questions.jsonl"
    write_questions(questions, [" ".join(f"w{token}" for token in tokens) for tokens in ids])
    return Model(folder, module, stops, questions, prompts)


def write_questions(path: Path, texts: Iterable[str], reward: str = "exact", answer: str = "w3", **fields: Any) -> None:
    rows = [{"question": text, "answer": answer, "reward": reward} | fields for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def suite_of(model: Model, case: Case, out: Path) -> Suite:
    asked = BenchmarkSettings(file=model.questions, kind="questions", samples=case.samples)
    return Suite(
        out=out, max_tokens=case.max_tokens, slots=case.slots, template="none", temperature=1.0, top_p=1.0,
        benchmarks={"mine": asked},
    )  # fmt: skip


# ---- drawing -------------------------------------------------------------------------------------------------------


def drawing(model: Model, case: Case, repeats: int, peer_python: str | None) -> dict[str, object]:
    """Tokens a CPU second of each side, medians, and ours over the others': medians of the rounds' ratios."""
    generator = LocalGenerator(model.folder, seed=0, slots=case.slots, device=torch.device("cpu"), dtype=torch.float32)
    generator.load_weights(model.module.state_dict().items())
    outs = (model.folder / f"out{number}" for number in count())

    def whole() -> int:
        found = evaluate(model.folder, suite_of(model, case, next(outs)), note=lambda text: None)["mine"]
        return round(found["tokens"] * found["replies"])

    sides: dict[str, Callable[[], float]] = {
        "evaluate": lambda: rate(whole),
        "generator": lambda: rate(lambda: run_ours(generator, model.prompts, case)),
        "transformers": lambda: rate(lambda: run_transformers(model.module, model.prompts, case, model.stops)),
    }
    peer = lm_eval(peer_python, model, case) if peer_python else None
    if peer is not None:
        sides["lm_eval"] = partial(rate_of, peer)
    rates = timing.interleaved(sides, rounds=repeats, warmup=1)
    if peer is not None:
        peer.close()
    ratios = {
        f"over_{name}": statistics.median(a / b for a, b in zip(rates["evaluate"], found, strict=True))
        for name, found in rates.items() if name != "evaluate"
    }  # fmt: skip
    medians = {f"{name}_tokens_per_cpu_second": round(statistics.median(found)) for name, found in rates.items()}
    versions = {"peer_versions": peer.versions} if peer is not None else {}
    return {"replies": case.prompts * case.samples, "repeats": repeats} | medians | ratios | versions


def lm_eval(python: str, model: Model, case: Case) -> Driven:
    """lm-eval's side."""
    job = {"folder": str(model.folder), "file": str(model.questions), "stops": model.stops}
    job |= {"samples": case.samples, "max_tokens": case.max_tokens, "slots": case.slots}
    job |= {"max_length": case.prompt_tokens + case.max_tokens, "threads": torch.get_num_threads()}
    return Driven(python, "lm_eval_peer.py", job)


def rate_of(peer: Driven) -> float:
    """Tokens a CPU second of one evaluation, as the child measures them."""
    answer = peer.ask("evaluate")
    return answer["tokens"] / answer["cpu_seconds"]


def rate(run: Callable[[], int]) -> float:
    """Tokens a CPU second of this process and of its children that have ended."""
    before = timing.cpu_seconds()
    tokens = run()
    return tokens / (timing.cpu_seconds() - before)


# ---- grading -------------------------------------------------------------------------------------------------------

DOUBLE = [{"stdin": f"{n}\n", "stdout": f"{2 * n}\n"} for n in range(3)]


@dataclass(frozen=True)
class Graded:
    """Replies that all have this text, right by this reward."""

    name: str
    reward: str
    answer: str
    text: str


GRADED = [
    Graded("code", "code", "", "```python\nprint(2 * int(input()))\n```"),
    Graded("algebra", "math", "x^2 + 3x + 2", "<answer>(x + 1)(x + 2)</answer>"),
]
AT_ONCE = Graded("at_once", "exact", "w3", "<answer>w3</answer>")


class Instead(LocalSampler):
    """Draws as the model does, and hands over another text for each reply: one that takes long to grade."""

    text = ""
    ended = 0.0  # when the last one was drawn

    def draw(self, asks: Sequence[Ask], on_reply: OnReply, on_tokens: Callable[[int], None]) -> None:
        super().draw(asks, lambda ask, line: on_reply(ask, replace(line, text=self.text)), on_tokens)
        self.ended = time.perf_counter()


def grading(model: Model, graded: Graded, replies: int, max_tokens: int, repeats: int) -> dict[str, object]:
    """Wall seconds of an evaluation: with this grader, with one that decides at once, by turns; what the first has
    left to grade when its last reply is drawn; and of grading alone."""
    case = Case(graded.name, replies // 4, 4, 0, max_tokens, 64, 0)
    numbers = count()

    def seconds(what: Graded) -> tuple[float, float, float]:
        questions = model.folder / f"{what.name}.jsonl"
        tests = {"tests": DOUBLE} if what.reward == "code" else {}
        texts = (f"w{n % 500} w{n}" for n in range(replies // 4))
        write_questions(questions, texts, what.reward, what.answer, **tests)
        out = model.folder / f"{graded.name}{next(numbers)}"
        return graded_run(model.folder, suite_of(replace(model, questions=questions), case, out), what.text)

    runs = [(seconds(graded), seconds(AT_ONCE)) for _ in range(repeats)]
    columns = {
        "seconds": [whole for (whole, _, _), _ in runs],
        "seconds_graded_at_once": [whole for _, (whole, _, _) in runs],
        "added_share": [1 - plain / whole for (whole, _, _), (plain, _, _) in runs],
        "left_seconds": [left for (_, left, _), _ in runs],
        "left_share": [left / whole for (whole, left, _), _ in runs],
        "grading_alone_seconds": [alone for (_, _, alone), _ in runs],
    }
    return {"replies": replies, "repeats": repeats} | {
        name: statistics.median(found) for name, found in columns.items()
    }


def graded_run(folder: Path, suite: Suite, text: str) -> tuple[float, float, float]:
    """Wall seconds of the evaluation, after the last reply of it, and of grading the stored replies alone."""
    entries = load_entries(suite.benchmarks, has_judge=False)
    store, world = Store(suite.out or folder), ranks.start()
    store.begin({"target": "", "same": {}, "benchmarks": {}})
    sampler = Instead(folder, suite, torch.device("cpu"))
    sampler.text = text
    with make_scorer(suite.rewards) as scorer:

        def draw() -> float:
            began = time.perf_counter()
            found = draw_and_grade(store, entries, 0, world, lambda: sampler, Grading(scorer, None), lambda text: None)
            assert found["mine"]["score"]["mean"] == 1.0, found["mine"]
            return time.perf_counter() - began

        whole = draw()
        left = time.perf_counter() - sampler.ended
        store.discard_grades("mine")
        return whole, left, draw()


# ---- resume --------------------------------------------------------------------------------------------------------


def resume(folder: Path, replies: int) -> dict[str, object]:
    """Seconds to read what is stored and see that nothing is missing."""
    questions = folder / "many.jsonl"
    write_questions(questions, (f"w{n}" for n in range(replies // 4)))
    settings = BenchmarkSettings(file=questions, kind="questions", samples=4)
    (entry,) = load_entries({"mine": settings}, has_judge=False)
    store, text = Store(folder / "stored"), "A reply of a thousand characters. " * 30
    samples, grades = store.reply_file("mine", 0), []
    for ask in entry.asks(0):
        samples.append(SampleLine(*ask.key, text, 250, "stop", 20, ask.seed, 1.0))
        grades.append(GradeLine(*ask.key, "wrong", 0.0, "8", "another text", entry.row.grader))
    samples.close()
    store.write_grades("mine", grades)
    began, cpu = time.perf_counter(), time.process_time()
    left = missing(store, [entry], 0, 0, 1)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert not left.asks and not left.replies
    return {"replies": replies, "seconds": seconds, "cpu_seconds": cpu}


if __name__ == "__main__":
    main()
