"""The training run: builds the parts, resumes, iterates, evaluates, checkpoints, and reports at the end."""

from __future__ import annotations

import hashlib
import json
import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from r1engine import checkpoint, config
from r1engine.base_model import with_base_model
from r1engine.batch import Prompt
from r1engine.config import Config, ConfigError
from r1engine.data.questions import PromptStream, file_digest, load_prompts
from r1engine.evaluation.pass_at_1 import pass_at_1, sample_row
from r1engine.grpo import record_of
from r1engine.hf.architecture import is_fp8_folder
from r1engine.hf.formats import store
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.model import parallel
from r1engine.model.cpu import keep_freed_memory
from r1engine.model.layers import fp8
from r1engine.model.parallel import World
from r1engine.model.policy import Policy, model_dtype
from r1engine.observe.hacking_alarm import Alarms
from r1engine.observe.metrics import MetricsLog, Phases, device_telemetry, peak_rss_gb
from r1engine.observe.progress import Progress
from r1engine.observe.report import write_report
from r1engine.observe.summary import print_summary
from r1engine.rewards import Record, Scorer
from r1engine.rewards.from_config import make_scorer
from r1engine.rewards.rules import rule_of
from r1engine.rewards.sandbox import probe
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.rollout.rollouts import Ahead
from r1engine.rollout.sglang.generator import SglangGenerator
from r1engine.step import Iteration, Parts, iterate, refresh


def train(cfg: Config) -> None:
    """Run the whole training of `cfg`, resuming it if its run_dir holds a checkpoint. Called on every rank.

    Raises:
        ConfigError: the parallel sizes do not fit the world, or the model, the data or the checkpoint to resume from
            is not what the config needs; see the message.
        RuntimeError: no disk space, no whole checkpoint, or the ranks cannot meet.
    """
    started = time.time()
    config.check_world(cfg, int(os.environ.get("WORLD_SIZE", "1")))
    config.check_files(cfg)
    if cfg.model.fp8:
        fp8.check_machine()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    scorer = make_scorer(cfg.rewards, workers=max(1, len(os.sched_getaffinity(0)) // ranks_here))
    set_up_torch(cfg)
    world = parallel.join(cfg.parallel)
    try:
        with Progress(cfg.steps, cfg.run_dir.name, enabled=world.is_first) as progress:
            try:
                run = Run(cfg, world, progress, scorer)
            except ValueError as error:  # every input is checked while the parts are built
                raise ConfigError(str(error)) from error
            try:
                run.loop()
            finally:
                run.parts.generator.close()
        if world.is_first:
            run.finish(time.time() - started)
    finally:
        scorer.close()
        parallel.leave()


def set_up_torch(cfg: Config) -> None:
    """CPU threads, memory and determinism of this process."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(cfg.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here))
    if not torch.cuda.is_available():
        keep_freed_memory()
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory


class Run:
    """The parts of one training run and its position."""

    def __init__(self, cfg: Config, world: World, progress: Progress, scorer: Scorer) -> None:
        self.world, self.progress, self.step = world, progress, 0
        resume_from = self._find_checkpoint(cfg)
        if world.is_first:
            cfg.run_dir.mkdir(parents=True, exist_ok=True)
            config.dump(cfg, cfg.run_dir / "config.yaml")
        self.cfg = cfg = with_base_model(cfg, world, progress) if cfg.base is not None else cfg
        progress.phase("load")
        self.prompts, self.heldout = self._load_data()
        self._check_rewards({prompt.question.reward for prompt in [*self.prompts.prompts, *self.heldout]})
        generator = self._generator()
        policy = Policy(cfg, world)
        synchronize = torch.cuda.synchronize if world.device.type == "cuda" else None
        self.parts = Parts(cfg, world, policy, generator, Phases(synchronize), progress, scorer)
        self._note_unusable(self.prompts.prompts)
        if cfg.grpo.kl_coef > 0:
            self.parts.reference = policy.snapshot()
        if cfg.rollout.max_staleness:
            self.parts.ahead = Ahead(generator, self.prompts, cfg, rank=world.rank, size=world.size)
        if resume_from is not None:
            self._resume(resume_from)
        refresh(self.parts)
        self.log = None
        if world.is_first:
            self.log = MetricsLog(
                cfg.run_dir,
                tensorboard=cfg.log.tensorboard,
                wandb_project=cfg.log.wandb_project,
                config=cfg.model_dump(mode="json"),
                resume_step=self.step if resume_from is not None else None,
            )
        self.alarms = Alarms(list(cfg.rewards.reward_models), window=cfg.rewards.alarm_window)
        if resume_from is not None and world.is_first and cfg.rewards.reward_models:
            for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines():
                self.alarms.update(json.loads(line))

    def _check_rewards(self, rewards: set[str]) -> None:
        """Tells what protects from the code that the rewards run; refuses them where too little does, and those
        that a server must grade where there is none."""
        section = self.cfg.rewards
        for reward, key, is_there in (
            ("judge", "judge", section.judge is not None),
            ("preference", "helpfulness_model or rewards.harmlessness_model", bool(section.reward_models)),
        ):
            if reward in rewards and not is_there:
                raise ConfigError(f"rewards.{key}: found null, required by the questions of reward '{reward}'")
        if section.reward_models:
            if "preference" not in rewards:
                raise ConfigError("rewards: found a reward model, required questions of reward 'preference' for it")
            if rewards <= {"preference", "format", "language"}:
                self.progress.note("no question has a verifiable reward: nothing tells if a reward model is hacked")
        if any(rule_of(reward, "data").runs_code for reward in rewards):
            try:
                probe().require(unsafe=self.cfg.rewards.unsafe)
            except RuntimeError as error:
                raise ConfigError(str(error)) from None
            self.progress.note("\n  ".join(["code rewards run in a sandbox of:", *probe().describe()]))

    def _note_unusable(self, prompts: list[Prompt]) -> None:
        """Lists the questions whose reference no rule can use: what is sampled for them is always undecided."""
        if not self.world.is_first:
            return
        records = [Record(p.question, "", id=str(p.id)) for p in prompts]
        unusable = self.parts.scorer.unusable_references(records)
        if unusable:
            examples = "; ".join(f"question {record.id} {problem}" for record, problem in unusable[:5])
            self.progress.note(
                f"{len(unusable)} of {len(prompts)} references are undecided whatever the answer: {examples}"
            )

    def _load_data(self) -> tuple[PromptStream, list[Prompt]]:
        cfg = self.cfg
        tokenizer = load_tokenizer(cfg.model.path)

        def load(path: Path) -> list[Prompt]:
            return load_prompts(
                path, lambda text: tokenizer.encode(text).ids, cfg.data.template, cfg.data.max_prompt_tokens
            )

        stream = PromptStream(load(cfg.data.train), seed=cfg.seed, digest=file_digest(cfg.data.train))
        heldout = load(cfg.data.heldout)[: cfg.evaluation.questions] if cfg.data.heldout is not None else []
        return stream, heldout

    # ------------------------------------------------------------------ the loop

    def loop(self) -> None:
        """Iterate until `cfg.steps` optimizer steps are done; then export the model as a Hugging Face folder."""
        cfg = self.cfg
        if self.step == 0:
            self._evaluate()
        self.progress.start(self.step)
        while self.step < cfg.steps:
            before = self.step
            prompts = self.prompts.next(cfg.grpo.questions) if self.parts.ahead is None else None
            result = iterate(self.parts, prompts, self.step)
            self.step += cfg.steps_per_rollout
            if self.parts.reference is not None and _passed(before, self.step, cfg.grpo.reference_every):
                self.parts.reference = self.parts.policy.snapshot()
            self._log_iteration(result)
            if self.step == cfg.steps or _passed(before, self.step, cfg.evaluation.every):
                self._evaluate()
            if self.step == cfg.steps or _passed(before, self.step, cfg.checkpoint.every):
                self._save()
        with self.parts.policy.awake():
            self.parts.policy.export(cfg.run_dir / "model")
        if self.log is not None:
            self.log.close()

    def _log_iteration(self, result: Iteration) -> None:
        row = result.metrics | self.parts.phases.take() | device_telemetry()
        row["tokens_per_second"] = row["tokens_generated"] / row["seconds/total"]
        warnings = self.alarms.update(row)
        row |= {f"alarm/{name}": float(name in warnings) for name in self.cfg.rewards.reward_models}
        self.progress.step(self.step, row)
        for name, warning in warnings.items():
            self.progress.note(f"step {self.step}: {name}: {warning}")
        if self.log is None:
            return
        self.log.log(self.step, row)
        undecided = [(record_of(c), s) for c, s in result.graded if s.verdict == "undecided"]
        self.log.log_undecided(self.step, [{**record.as_row(), "reason": s.reason} for record, s in undecided])
        if count := min(self.cfg.log.samples, len(result.graded)):
            chosen = range(0, len(result.graded), len(result.graded) // count)
            rows = [sample_row(*result.graded[i], result.samples[i].advantage) for i in chosen][:count]
            self.log.log_samples(self.step, rows)

    def _evaluate(self) -> None:
        if not self.heldout:
            return
        self.progress.phase("evaluate")
        metrics, rows = pass_at_1(
            self.parts.generator,
            self.parts.scorer,
            self.heldout,
            self.cfg,
            self.world,
            step=self.step,
            on_tokens=self.progress.advance,
        )
        self.parts.phases.take()  # evaluation time belongs to no iteration
        if self.log is not None:
            self.log.log(self.step, metrics)
            self.log.log_samples(self.step, [{"heldout": True, **row} for row in rows[: self.cfg.log.samples]])
        self.progress.note(f"step {self.step}: held-out pass@1 {metrics['eval/pass_at_1']:.3f}")

    def _generator(self) -> LocalGenerator | SglangGenerator:
        cfg, world = self.cfg, self.world
        dtype = model_dtype(cfg, world)
        if cfg.rollout.engine == "local":
            return LocalGenerator(
                cfg.model.path, seed=cfg.seed, slots=cfg.rollout.slots, device=world.device, dtype=dtype
            )
        return SglangGenerator(
            cfg,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            dtype=dtype,
            store=partial(store, precision="fp8") if is_fp8_folder(cfg.model.path) else None,
            note=self.progress.note,
        )

    # ------------------------------------------------------------------ checkpoints

    def _identity(self) -> dict:
        """What must not change between a checkpoint and the run that goes on from it; the layout may."""
        cfg = self.cfg
        folder = cfg.model.path
        sizes = sorted((f.name, f.stat().st_size) for f in folder.glob("*.safetensors"))
        model = hashlib.sha256((folder / "config.json").read_bytes() + json.dumps(sizes).encode()).hexdigest()
        return {
            "seed": cfg.seed,
            "dataset": self.prompts.state()["sha256"],
            "model": model,
            "dtype": str(self.parts.policy.dtype).removeprefix("torch."),
            "mtp": self.parts.policy.trains_mtp,
            "reference": cfg.grpo.kl_coef > 0,
            "ahead": cfg.rollout.max_staleness > 0,
        }

    def _save(self) -> None:
        cfg, policy = self.cfg, self.parts.policy
        self.progress.phase("checkpoint")
        name: list = [None]
        if self.world.is_first:
            partial = checkpoint.begin(cfg.run_dir, self.step)
            checkpoint.free_space_check(partial, policy.state_bytes() * self.world.size)
            (partial / "model").mkdir()
            name = [str(partial)]
        self._broadcast(name)
        with policy.awake():
            policy.save(Path(name[0]) / "model", self.parts.reference)
        if self.parts.ahead is not None:
            self.parts.ahead.save(Path(name[0]))
        self._barrier()
        if self.world.is_first:
            state = self._identity() | {"step": self.step, "prompts": self.prompts.state()}
            checkpoint.commit(Path(name[0]), state)
            checkpoint.prune(cfg.run_dir, cfg.checkpoint.keep)
        self._barrier()
        self.parts.phases.take()  # nor does checkpoint time

    def _find_checkpoint(self, cfg: Config) -> Path | None:
        found: list = [None]
        if self.world.is_first:
            folder = checkpoint.newest_complete(cfg.run_dir, self.progress.note)
            if folder is not None and not cfg.checkpoint.resume:
                raise ValueError(
                    f"run_dir: {cfg.run_dir} holds checkpoints up to {folder.name}, and checkpoint.resume is false; "
                    "choose another run_dir or delete the folder"
                )
            found = [str(folder) if folder is not None else None]
        self._broadcast(found)
        return Path(found[0]) if found[0] else None

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        checkpoint.check_same(state, self._identity())
        self.prompts.restore(state["prompts"])
        self.step = state["step"]
        if self.parts.ahead is not None:
            self.parts.ahead.load(folder)
        policy = self.parts.policy
        with policy.awake():
            self.parts.reference = policy.load(folder / "model", has_snapshot=self.parts.reference is not None)
        self.progress.note(f"resumed from {folder.name}")

    def _broadcast(self, message: list) -> None:
        if self.world.size > 1:
            dist.broadcast_object_list(message, src=0)

    def _barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier()

    # ------------------------------------------------------------------ the end

    def finish(self, seconds: float) -> None:
        """Write summary.json and the report, and print what came of the run. First rank only."""
        cfg = self.cfg
        rows = [json.loads(line) for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines()]
        evaluations = [row for row in rows if "eval/pass_at_1" in row]
        before, after = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
        iterations = [row for row in rows if "logp_diff/mean" in row]
        summary = {
            f"{name}_{when}": row.get(f"eval/{key}")
            for name, key in (("pass_at_1", "pass_at_1"), ("format", "format"), ("length", "length_mean"))
            for when, row in (("before", before), ("after", after))
        } | {
            "seconds": round(seconds, 1),
            "peak_rss_gb": round(peak_rss_gb(), 3),
            "logp_diff_mean": sum(row["logp_diff/mean"] for row in iterations) / max(1, len(iterations)),
            "logp_diff_max": max((row["logp_diff/max"] for row in iterations), default=0.0),
            "seed": cfg.seed,
        }
        (cfg.run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        png, html = write_report(cfg.run_dir)
        console = Console()
        samples = [json.loads(line) for line in (cfg.run_dir / "samples.jsonl").read_text().splitlines()]
        print_summary(before, after, [s for s in samples if s.get("heldout")][-2:], console=console)
        files = {"curves": png, "report": html, "summary": cfg.run_dir / "summary.json", "model": cfg.run_dir / "model"}
        console.print("\n".join(f"{name}: {path}" for name, path in files.items()), highlight=False)


def _passed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; `every` = 0 means never."""
    return every > 0 and before // every != after // every
