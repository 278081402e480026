"""The engine as a library: a loop of your own around one GRPO iteration. After `make demo`:

.venv/bin/python examples/own_loop.py runs/demo [steps]
"""

import sys
from pathlib import Path

from r1engine.batch import Completion
from r1engine.config import RlConfig
from r1engine.data.chat import render
from r1engine.data.prompts import load_prompts
from r1engine.data.question import Question
from r1engine.data.stream import MixedStream, PromptStream, file_digest
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.model.parallel import join, leave
from r1engine.model.policy import Policy
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.rewards.from_config import make_scorer
from r1engine.rollout import make_generator
from r1engine.rollout.rollouts import Rollouts
from r1engine.stages.iteration import Parts, iterate, refresh


def main(demo: Path, steps: int) -> None:
    """Train the demo's base model for some steps and write the model to demo/own_loop."""
    cfg = RlConfig(
        steps=steps,
        model={"path": demo / "base" / "model"},
        data={"train": demo / "tiny" / "train.jsonl", "max_prompt_tokens": 32},
        rollout={"max_tokens": 32},
        grpo={"questions": 16, "minibatches": 1, "kl_coef": 0.0},
        optimizer={"lr": 3e-4},
        max_row_tokens=8192,
    )
    world = join(cfg.parallel)
    tokenizer = load_tokenizer(cfg.model.path)

    def shown(question: Question) -> str:
        return render(question.text, "r1_zero")

    prompts = load_prompts(cfg.data.train, lambda text: tokenizer.encode(text).ids, shown, 32)
    stream = MixedStream(PromptStream(prompts, seed=cfg.seed, digest=file_digest(cfg.data.train)))
    policy = Policy(cfg.model, cfg.parallel, cfg.optimizer, world, temperature=cfg.rollout.temperature)
    generator = make_generator(cfg, world, policy.dtype, print)
    rollouts = Rollouts(generator, stream, cfg, world)
    with make_scorer(cfg.rewards) as scorer, Progress("own loop", enabled=False) as progress:
        parts = Parts(cfg, world, policy, generator, rollouts, scorer, Phases(), progress)
        with policy.awake():
            refresh(parts)  # the generator gets its first weights
        for step in range(steps):
            done = iterate(parts, step)
            own = [sample for sample in done.samples if isinstance(sample.completion, Completion)]  # drawn by this rank
            best = max(own, key=lambda sample: sample.advantage).completion
            print(f"step {step + 1}: reward {done.metrics['reward/mean']:.3f}, best: {best.text}", flush=True)
    with policy.awake():
        policy.export(demo / "own_loop")
    generator.close()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
