"""The demo's base model: a tiny random model pre-trained for a few minutes on the texts of tiny.py.

The pre-training runs through the same Megatron policy as everything else and ends in a Hugging Face folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from r1engine.config import Base, Config, Data, Model, Optimizer
from r1engine.data.questions import render
from r1engine.demo import tiny
from r1engine.grpo import learning_rate
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.model.parallel import World
from r1engine.model.policy import Policy
from r1engine.observe.metrics import MetricsLog
from r1engine.observe.progress import Progress
from r1engine.sft import supervised_step

DONE = "base.json"  # written last; holds what the base model was made from


def with_base_model(cfg: Config, world: World, progress: Progress) -> Config:
    """Make the base model of `cfg.base` in run_dir/base, unless it is there, and point the config at it. Collective.

    Raises:
        ValueError: run_dir/base holds a base model made with other settings.
    """
    assert cfg.base is not None
    folder = cfg.run_dir / "base"
    recipe = {"base": cfg.base.model_dump(mode="json"), "seed": cfg.seed, "template": cfg.data.template}
    if (folder / DONE).is_file():
        if (found := json.loads((folder / DONE).read_text())) != recipe:
            raise ValueError(
                f"base: {folder} was made with {found}, this run wants {recipe}; "
                "use another run_dir or delete the folder"
            )
    else:
        if world.is_first:
            start = folder / "start"
            tiny.write_task(folder, cfg.base, seed=cfg.seed)
            start.mkdir(parents=True, exist_ok=True)
            tiny.write_model(start, cfg.base, seed=cfg.seed, render=lambda q: render(q, cfg.data.template))
        if world.size > 1:
            dist.barrier()
        _pretrain(cfg, cfg.base, folder, world, progress)
        if world.is_first:
            (folder / DONE).write_text(json.dumps(recipe, indent=1))
    if world.size > 1:
        dist.barrier()
    data = Data(**cfg.data.model_dump() | {"train": folder / "train.jsonl", "heldout": folder / "heldout.jsonl"})
    return cfg.model_copy(update={"data": data, "model": _at(folder, cfg.model)})


def _at(folder: Path, settings: Model) -> Model:
    """The configured model, in a folder."""
    return settings.model_copy(update={"path": folder})


def _pretrain(cfg: Config, base: Base, folder: Path, world: World, progress: Progress) -> None:
    optimizer = Optimizer(
        lr=base.lr,
        schedule="cosine",
        warmup_steps=min(50, base.steps // 4),
        min_lr_ratio=0.02,
        beta2=0.98,
        weight_decay=0.01,
    )
    start = folder / "start"
    policy = Policy(cfg.model_copy(update={"model": _at(start, cfg.model), "optimizer": optimizer}), world)
    tokenizer = load_tokenizer(start)
    eos = tokenizer.token_to_id(tiny.EOS)
    pairs, _ = tiny.task_pairs(base.heldout, seed=cfg.seed)
    encoded: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in encoded:
            encoded[text] = tokenizer.encode(text).ids
        return encoded[text]

    log = None
    if world.is_first:
        log = MetricsLog(folder, tensorboard=False, wandb_project=None, config={}, resume_step=None)
    progress.phase("pre-train the base model", total=base.steps)
    for step in range(base.steps):
        texts = tiny.base_texts(
            step, base.texts_per_step, seed=cfg.seed, pairs=pairs, render=lambda q: render(q, cfg.data.template)
        )
        tokens = [(encode(prompt), [*encode(completion), eos]) for prompt, completion in texts]
        row = supervised_step(policy, tokens, max_tokens=cfg.row_tokens, lr=learning_rate(step, base.steps, optimizer))
        if log is not None:
            log.log(step, row)
        progress.advance(1)
    if log is not None:
        log.close()
    policy.export(folder)
