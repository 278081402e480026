"""One GRPO step of r1engine, against TRL's GRPOTrainer on the same cores and against the arithmetic it needs.

    python benchmarks/bench_step.py [--model 3M] [--peer-python PATH] [--smoke]

Both engines get the same Hugging Face folder (random weights), the same prompts and completion length, float32
on CPU, beta 0.04, one optimizer step a rollout. The end-of-text token cannot be sampled, so every completion has
full length. Steps of the two alternate; rows are medians over the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import step_model
import timing
import torch
from driven import Driven
from step_model import SHAPES, Shape, Work

from r1engine.batch import Prompt
from r1engine.config import RlConfig
from r1engine.data.question import Question
from r1engine.data.stream import MixedStream, PromptStream
from r1engine.model import parallel
from r1engine.model.policy import Policy
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.rewards import Scorer, ScorerSettings
from r1engine.rollout import make_generator
from r1engine.rollout.rollouts import Rollouts
from r1engine.run import set_up_torch
from r1engine.stages.iteration import Parts, iterate

BETA, LR = 0.04, 1e-6  # a small rate: the weights stay random, and so does the length of the work
PHASES = ("generate", "score", "logprobs", "update", "refresh")


class Ours:
    """r1engine's side: the parts that a training run makes, and its iteration."""

    def __init__(self, folder: Path, work: Work, device: torch.device, threads: int | None) -> None:
        cfg = RlConfig.model_validate(
            {
                "steps": 10**6,
                "threads": threads,
                "model": {"path": folder},
                "data": {"max_prompt_tokens": work.prompt},
                "rollout": {"max_tokens": work.completion, "slots": work.completions},
                "grpo": {
                    "questions": work.questions,
                    "group_size": work.group,
                    "minibatches": 1,
                    "kl_coef": BETA,
                    "reference_every": 0,
                },
                "optimizer": {"lr": LR},
                # One row a step: matrix products large enough for their best rate.
                "max_row_tokens": 8192,
            }
        )
        set_up_torch(cfg)
        world = parallel.join(cfg.parallel)
        policy = Policy(cfg.model, cfg.parallel, cfg.optimizer, world)
        generator = make_generator(cfg, world, policy.dtype, timing.note)
        generator.load_weights(policy.weights())
        pairs = step_model.prompts(folder, work)
        prompts = [Prompt(i, ids, text, Question(text, "0")) for i, (text, ids) in enumerate(pairs)]
        rollouts = Rollouts(generator, MixedStream(PromptStream(prompts, seed=cfg.seed, digest="")), cfg, world)
        phases = Phases(torch.cuda.synchronize if device.type == "cuda" else None)
        progress = Progress("bench_step", enabled=False)
        scorer = Scorer(ScorerSettings(workers=1))
        self.parts = Parts(cfg, world, policy, generator, rollouts, scorer, phases, progress, policy.snapshot())
        self.tokens, self.device, self.step_number = work.completions * work.completion, device, 0
        self.cpu: list[float] = []
        self.phases: dict[str, list[float]] = {name: [] for name in (*PHASES, "rest")}

    def step(self) -> float:
        """Seconds of one iteration; those of its phases are kept."""
        self.parts.phases.take()
        results, cpu_start = [], time.process_time()
        seconds = timing.seconds(lambda: results.append(iterate(self.parts, self.step_number)), self.device)
        self.cpu.append(time.process_time() - cpu_start)
        self.step_number += 1
        assert results[0].metrics["tokens_generated"] == self.tokens
        taken = self.parts.phases.take()
        for name in PHASES:
            self.phases[name].append(taken[f"seconds/{name}"])
        self.phases["rest"].append(seconds - sum(taken[f"seconds/{name}"] for name in PHASES))
        return seconds


class Peer:
    """TRL's side: a child process in its own environment, driven step by step."""

    def __init__(self, python: str, folder: Path, work: Work, device: torch.device, *, fastest: bool) -> None:
        texts = [text for text, _ in step_model.prompts(folder, work)]
        job = work.fields() | {"folder": str(folder), "prompts": texts, "device": device.type, "beta": BETA, "lr": LR}
        job |= {"threads": torch.get_num_threads(), "fastest": fastest}
        self.child = Driven(python, "trl_peer.py", job)
        self.generate: list[float] = []
        self.cpu: list[float] = []
        self.length = work.completion

    def step(self) -> float:
        """Seconds of one optimizer step, as the child measures them."""
        answer = self.child.ask("step")
        assert answer["lengths"] == [self.length], answer
        self.generate.append(answer["generate"])
        self.cpu.append(answer["cpu"])
        return answer["seconds"]


def gemm_shapes(shape: Shape, work: Work) -> list[tuple[int, int, int]]:
    """A large product and the model's own ones over all tokens of the step."""
    tokens, hidden, inner = work.completions * (work.prompt + work.completion), shape.hidden, shape.intermediate
    return [(1024, 1024, 1024), (2048, 2048, 2048), (tokens, hidden, inner), (tokens, inner, hidden)]


def measure(name: str, work: Work, args: argparse.Namespace, device: torch.device) -> None:
    """All rows of one model size."""
    shape, rounds, warmup = SHAPES[name], args.rounds, args.warmup
    common = {"model": name, "parameters": shape.parameters} | work.fields()

    def row(kind: str, values: dict[str, object]) -> None:
        timing.emit("step", kind, device, common | values)

    with tempfile.TemporaryDirectory(prefix="bench-step-") as temporary:
        folder = Path(temporary)
        step_model.make_folder(folder, shape)
        ours = Ours(folder, work, device, args.threads)
        candidates: dict[str, Callable[[], float]] = {"ours": ours.step}
        peers: dict[str, Peer] = {}
        if args.peer_python:
            for peer_name, fastest in (("trl_as_shipped", False), ("trl_fastest", True)):
                peers[peer_name] = Peer(args.peer_python, folder, work, device, fastest=fastest)
                candidates[peer_name] = peers[peer_name].step
        timing.note(f"bench_step: {name}, {warmup} + {rounds} rounds of {', '.join(candidates)}")
        taken = timing.interleaved(candidates, rounds=rounds, warmup=warmup)
        for peer in peers.values():
            peer.child.close()

    ours_step = timing.summary(taken["ours"])
    # CPU seconds of the process: with one thread they hardly depend on what else the machine does.
    row("ours/cpu", timing.summary(ours.cpu[warmup:]))
    row("ours", ours_step | {"tokens_per_second": ours.tokens / ours_step["median"]})
    for phase, values in ours.phases.items():
        row(f"ours/{phase}", timing.summary(values[warmup:]))
    for peer_name, peer in peers.items():
        row(peer_name, timing.summary(taken[peer_name]) | {"peer_versions": peer.child.versions})
        row(f"{peer_name}/cpu", timing.summary(peer.cpu[warmup:]))
        row(f"{peer_name}/generate", timing.summary(peer.generate[warmup:]))
        ratios = [b / a for a, b in zip(taken["ours"], taken[peer_name], strict=True)]
        row(f"{peer_name}/ours", timing.summary(ratios) | {"unit": "ratio of the two steps of a round"})

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rate = timing.matmul_rate(gemm_shapes(shape, work), dtype, device)
    flop = step_model.floor_flop(shape, work)
    floor = {part: value / rate for part, value in flop.items()}
    total = sum(floor.values())
    row(
        "floor",
        {"seconds": total, "gflop": sum(flop.values()) / 1e9, "matmul_gflop_per_s": rate / 1e9}
        | {f"seconds_{part}": value for part, value in floor.items()}
        | {"ours_over_floor": ours_step["median"] / total},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(SHAPES), action="append", help="default: all of them")
    parser.add_argument("--threads", type=int, help="CPU threads; default: the usable cores")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--peer-python", metavar="PATH", help="python of an environment with TRL")
    parser.add_argument("--smoke", action="store_true", help="a few tokens, one round, no peer: does it run?")
    args = parser.parse_args()
    device = timing.use_device(args.device)
    work = Work(questions=8, group=8, prompt=4, completion=64)
    names = args.model or list(SHAPES)
    if args.smoke:
        work, names = Work(questions=2, group=2, prompt=8, completion=4), ["0.5M"]
        args.rounds, args.warmup, args.peer_python = 1, 1, None
    try:
        for name in names:
            measure(name, work, args, device)
    finally:
        parallel.leave()


if __name__ == "__main__":
    main()
