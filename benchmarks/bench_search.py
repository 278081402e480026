"""Beam search and MCTS against search-and-learn's way on transformers: python benchmarks/bench_search.py [--smoke]

One row a case. Both sides have the same random policy and the same random process reward model, on the same
threads; times are CPU seconds of this process, interleaved. The other side is written after search-and-learn's beam
search: one question at a time, and in every step the policy and the PRM read the whole text of every beam.
One token of 8 is a mark, one of 40 an end: a step has some 8 tokens, a completion some 5 steps. In the long case
every step has 40 tokens and every completion 40 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timing
import torch
import transformers
from tokenizers import Tokenizer, models

from r1engine.batch import Prompt
from r1engine.config import StepScorerSection
from r1engine.config.search import Search
from r1engine.data.question import Question
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.rewards import Scorer, ScorerSettings
from r1engine.rollout import Sampling
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.search.lockstep import Crew, DrawLimits, Lockstep
from r1engine.search.scored_folder import NAME, ScoredFolder
from r1engine.search.scorer import open_scorer
from r1engine.search.steps import StepMarks
from r1engine.search.tree import Tree

VOCAB, PROMPT_TOKENS = 320, 24
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
Count = dict[str, float]


@dataclass(frozen=True)
class Lengths:
    """What ends steps and completions."""

    marks: range  # tokens that end a step
    ends: range  # tokens that end a completion
    step: int  # tokens of a step, at most
    most: int  # tokens of a completion, at most

    def is_end(self, completion: list[int], at: int) -> bool:
        """Whether a step ends with its token `at`, where all steps are as long as they may be, or none is."""
        return completion[at] in self.marks or completion[at] in self.ends or (at + 1) % self.step == 0


SHORT = Lengths(range(280, 320), range(2, 10), step=160, most=160)


def long_steps(count: int) -> Lengths:
    """So many steps of 40 tokens: no model draws the end, whose id is outside of its vocabulary."""
    return Lengths(range(0), range(VOCAB, VOCAB + 1), step=40, most=40 * count)


@dataclass(frozen=True)
class World:
    """The two models on both sides, and the questions."""

    lengths: Lengths
    policy: torch.nn.Module
    prm: torch.nn.Module
    generator: LocalGenerator
    scorer: Any
    grader: Scorer
    folder: Path
    prompts: list[Prompt]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two questions, to see that the script runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument(
        "--steps", type=int, default=40, help="of the long case, 2 questions, minutes a round; 0: not it"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = timing.use_device(args.device)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    questions, steps, rounds = (2, 2, 1) if args.smoke else (args.questions, args.steps, args.rounds)
    with tempfile.TemporaryDirectory() as name, Scorer(ScorerSettings(workers=1)) as grader:
        world = new_world(Path(name) / "short", questions, grader, device, SHORT)
        for n in (4, 16):
            timing.emit("search", f"beam n={n} width=4", device, beam_row(world, n, rounds))
        timing.emit("search", "mcts width=4 simulations=32", device, mcts_row(world))
        if not steps:
            return
        world = new_world(Path(name) / "long", 2, grader, device, long_steps(steps))
        timing.emit("search", f"beam n=16 width=4, {steps} steps of 40", device, beam_row(world, 16, rounds))


def new_world(folder: Path, questions: int, grader: Scorer, device: torch.device, lengths: Lengths) -> World:
    """Random models; the PRM is the policy's trunk with another seed and a score."""
    words = {f"w{i}" if i not in lengths.marks else f"m{i}": i for i in range(VOCAB)}
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES, eos_token_id=list(lengths.ends), pad_token_id=0)
    policy = transformers.Qwen2ForCausalLM(config).eval()
    prm = transformers.Qwen2ForTokenClassification(transformers.Qwen2Config(**SIZES, num_labels=1)).eval()
    for name, model in (("policy", policy), ("prm", prm)):
        model.save_pretrained(folder / name)
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / name / "tokenizer.json"))
    settings = json.loads((folder / "prm" / "config.json").read_text())
    settings |= {"architectures": ["Qwen2ForTokenClassification"], "eos_token_id": 2}
    (folder / "prm" / "config.json").write_text(json.dumps(settings))
    (folder / "prm" / NAME).write_text(ScoredFolder(("m",), None, "correctness").to_text())
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = LocalGenerator(folder / "policy", seed=0, slots=256, device=device, dtype=dtype)
    generator.load_weights(policy.state_dict().items())
    scorer = open_scorer(StepScorerSection(path=folder / "prm"), device, load_tokenizer(folder / "policy"))
    tokens = torch.randint(100, 280, (questions, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [Prompt(i, row, "", Question("q", "1", reward="math")) for i, row in enumerate(tokens)]
    return World(lengths, policy.to(device, dtype), prm.to(device, dtype), generator, scorer, grader, folder, prompts)


def ours(world: World, cfg: Search) -> Count:
    """All questions in lockstep, with kept keys and values."""
    marks = StepMarks(load_tokenizer(world.folder / "policy"), ["m"], world.lengths.step)
    crew = Crew(world.generator, world.scorer, world.grader, marks, frozenset(world.lengths.ends))
    world.scorer.clear()
    run, scored = world.generator.tokens_run or 0, world.scorer.tokens_run
    with world.generator.awake():
        world.generator.keep_steps(2**30)
        limits = DrawLimits(Sampling(), world.lengths.most)
        trees: list[Tree] = list(Lockstep(crew, cfg, limits, "min", 0).run(world.prompts))
    return {
        "drawn": sum(tree.spent.drawn for tree in trees),
        "policy_run": (world.generator.tokens_run or 0) - run,
        "scorer_run": world.scorer.tokens_run - scored,
        "kept_mib": world.generator.kept_bytes()[1] / 2**20,
        "nodes": sum(len(tree.nodes) for tree in trees),
        "simulations": sum(tree.root.visits for tree in trees),
    }


@torch.no_grad()
def theirs(world: World, n: int, width: int) -> Count:
    """Beam search question by question, on transformers, whole texts in every step."""
    torch.manual_seed(0)
    found: Count = {"drawn": 0, "policy_run": 0, "scorer_run": 0}
    ends, most = world.lengths.ends, world.lengths.most
    for prompt in world.prompts:
        beams: list[list[int]] = [[]]
        ended = 0
        for _ in range(40):
            beams = (beams * n)[:n]
            new = _continued(world, prompt.tokens, beams, found)
            values = _values(world, prompt.tokens, new, found)
            ended += sum(beam[-1] in ends for beam in new)
            going = [
                (v, beam) for v, beam in zip(values, new, strict=True) if beam[-1] not in ends and len(beam) < most
            ]
            beams = [beam for _, beam in sorted(going, reverse=True)[: n // width]]
            if not beams or ended >= n:
                break
    return found


def _continued(world: World, prompt: list[int], beams: list[list[int]], found: Count) -> list[list[int]]:
    policy: Any = world.policy
    lengths, width = world.lengths, max(map(len, beams)) + len(prompt)
    stops = {*lengths.ends, *lengths.marks}
    ids = torch.zeros(len(beams), width, dtype=torch.long, device=policy.device)
    mask = torch.zeros_like(ids)
    for row, beam in enumerate(beams):  # padded on the left
        ids[row, width - len(prompt) - len(beam) :] = torch.tensor(prompt + beam)
        mask[row, width - len(prompt) - len(beam) :] = 1
    out = policy.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        max_new_tokens=min(lengths.step, lengths.most - max(map(len, beams))), eos_token_id=[*stops],
    )  # fmt: skip
    new = []
    for beam, row in zip(beams, out[:, width:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        new.append(beam + row[:end])
    found["drawn"] += sum(len(b) - len(a) for a, b in zip(beams, new, strict=True))
    found["policy_run"] += int(mask.sum()) + sum(len(b) - len(a) for a, b in zip(beams, new, strict=True))
    return new


def _values(world: World, prompt: list[int], beams: Sequence[list[int]], found: Count) -> list[float]:
    prm: Any = world.prm
    width = max(map(len, beams)) + len(prompt)
    ids = torch.zeros(len(beams), width, dtype=torch.long, device=prm.device)
    mask = torch.zeros_like(ids)
    for row, beam in enumerate(beams):
        ids[row, : len(prompt) + len(beam)] = torch.tensor(prompt + beam)
        mask[row, : len(prompt) + len(beam)] = 1
    found["scorer_run"] += int(mask.sum())
    scores = torch.sigmoid(prm(input_ids=ids, attention_mask=mask).logits[..., 0].float())
    places = [[i for i in range(len(b)) if world.lengths.is_end(b, i)] or [len(b) - 1] for b in beams]
    return [min(scores[row, len(prompt) + i].item() for i in at) for row, at in enumerate(places)]


def beam_row(world: World, n: int, rounds: int) -> dict[str, object]:
    """Questions a CPU second on both sides, and what the models run for each drawn token."""
    cfg = Search.model_validate({"method": "beam", "n": n, "width": 4, "questions_at_once": 64})
    found: dict[str, Count] = {}  # the same in every round

    def timed(name: str, run: Callable[[], Count]) -> Callable[[], float]:
        def work() -> None:
            found[name] = run()

        return lambda: timing.seconds(work, world.policy.device, time.process_time)

    sides = {"ours": timed("ours", lambda: ours(world, cfg)), "theirs": timed("theirs", lambda: theirs(world, n, 4))}
    taken = timing.interleaved(sides, rounds=rounds, warmup=1)
    count, mine, other = len(world.prompts), found["ours"], found["theirs"]
    # A token drawn on either side costs its own work: random models do not draw equally many.
    drawn = other["drawn"] / mine["drawn"]
    ratios = [b / a / drawn for a, b in zip(taken["ours"], taken["theirs"], strict=True)]
    needed = mine["drawn"] + sum(len(prompt.tokens) for prompt in world.prompts)
    return {
        "questions_per_cpu_s": round(count / statistics.median(taken["ours"]), 2),
        "transformers_questions_per_cpu_s": round(count / statistics.median(taken["theirs"]), 2),
        "ratio_of_cpu_s_per_drawn_token": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "drawn": round(mine["drawn"] / count),
        "transformers_drawn": round(other["drawn"] / count),
        "policy_run_per_needed": round(mine["policy_run"] / needed, 3),
        "scorer_run_per_needed": round(mine["scorer_run"] / needed, 3),
        "transformers_policy_run_per_needed": round(other["policy_run"] / (other["drawn"] + count * PROMPT_TOKENS), 2),
        "kept_mib": round(mine["kept_mib"], 2),
        "nodes": mine["nodes"],
    }


def mcts_row(world: World) -> dict[str, object]:
    """What tree and driver cost beside the models and the grading of answers: time in these against all of it."""
    cfg = Search.model_validate({"method": "mcts", "width": 4, "simulations": 32, "questions_at_once": 64})
    inside = {"models": 0.0, "grading": 0.0}

    def timed(owner: Any, name: str, part: str) -> None:
        call = getattr(owner, name)

        def work(*arguments: Any, **options: Any) -> Any:
            begun = time.process_time()
            result = call(*arguments, **options)
            inside[part] += time.process_time() - begun
            return result

        setattr(owner, name, work)  # on the object, beside the method of its class

    parts = [(world.generator, name, "models") for name in ("draw", "forget", "completions")]
    parts += [(world.scorer, "score", "models"), (world.grader, "submit", "grading")]
    for one in parts:
        timed(*one)
    try:
        begun = time.process_time()
        found = ours(world, cfg)
        total = time.process_time() - begun
    finally:
        for owner, name, _ in parts:
            delattr(owner, name)
    driver = total - sum(inside.values())
    return {
        "driver_share_of_cpu": round(driver / total, 3),
        "grading_share_of_cpu": round(inside["grading"] / total, 3),
        "simulations_per_cpu_s": round(found["simulations"] / total, 1),
        "simulations_per_driver_s": round(found["simulations"] / driver, 1),
        "drawn": round(found["drawn"] / len(world.prompts)),
    }


if __name__ == "__main__":
    main()
