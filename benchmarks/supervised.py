"""What the benchmarks of supervised steps share: texts, the stage beside TRL's side, and the rows."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import step_model
import timing
import torch
from driven import Driven
from tokenizers import Tokenizer

from r1engine.config import StageConfig
from r1engine.model import parallel
from r1engine.model.cpu import keep_freed_memory
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.stages import make_stage

BATCH = 32
SETTINGS = ("as_shipped", "batches_of_8", "one_batch")  # of trl_supervised.py


class Slices:
    """Texts of so many tokens, cut from the LICENSE."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.ids = self.tokenizer.encode((step_model.ROOT / "LICENSE").read_text()).ids
        self.rng = random.Random(0)

    def some(self, length: int) -> str:
        start = self.rng.randrange(len(self.ids) - length)
        return self.tokenizer.decode(self.ids[start : start + length]).replace("\ufffd", "?") + "."

    def prompt(self) -> str:
        """Of 8 to 64 tokens."""
        return self.some(self.rng.randint(8, 64))

    def completion(self) -> str:
        """Log-normal around 120 tokens, 16 to 700."""
        return self.some(int(min(700, max(16, self.rng.lognormvariate(4.8, 0.8)))))


def make(cfg: Any) -> Any:
    """The stage of a run, on one thread."""
    return make_stage(cfg, parallel.join(cfg.parallel), Phases(), Progress("", enabled=False))


@dataclass(frozen=True)
class Supervised:
    """A kind of stage, and TRL's trainer for it."""

    name: str  # as trl_supervised.py calls it
    config: type[StageConfig]
    # (folder, size of the model, examples) -> keys of the configuration; writes model and data into the folder
    settings: Callable[[Path, str, int], dict[str, Any]]
    tokens: Callable[[Any], Any] = lambda row: row  # of an example of the stage, as trl_supervised.py takes them


def measure(kind: Supervised, size: str, steps: int, row_tokens: int, python: str | None) -> list[dict[str, Any]]:
    """A row for each engine."""
    with tempfile.TemporaryDirectory(prefix=f"bench-{kind.name}-") as scratch:
        folder = Path(scratch)
        cfg = kind.config(
            model={"path": folder},
            run_dir=folder / "run",
            max_row_tokens=row_tokens,
            optimizer={"lr": 1e-6, "schedule": "constant"},
            **kind.settings(folder, size, steps * BATCH),
        )
        stage = make(cfg)
        order = [kind.tokens(stage.train.at(index)) for step in range(steps) for index in stage.batches.at(step)]
        return compare(stage, kind.name, folder, order, steps, python)


def compare(stage: Any, kind: str, folder: Path, tokens: list[Any], steps: int, python: str | None) -> list[dict]:
    """A row for each engine: medians over the steps but the first, which must have the same loss in all of them.

    tokens: of the whole run in its order, as trl_supervised.py takes them.
    """
    (folder / "tokens.json").write_text(json.dumps(tokens))
    job = {"kind": kind, "folder": str(folder), "texts": str(folder / "tokens.json")}
    settings = SETTINGS if python else ()
    peers = {name: Driven(str(python), "trl_supervised.py", job | {"setting": name}) for name in settings}
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    losses: dict[str, list[float]] = {name: [] for name in seconds}
    counts = []
    for step in range(steps):
        for name, peer in peers.items():
            found = peer.ask("step")
            seconds[name].append(found["cpu"])
            losses[name].append(found["loss"])
        start = time.process_time()
        done = stage.advance(step)
        seconds["ours"].append(time.process_time() - start)
        losses["ours"].append(done.metrics["loss"])
        counts.append(done.tokens)
    for peer in peers.values():
        peer.close()
    parallel.leave()
    far = {name: found[0] for name, found in losses.items() if abs(found[0] - losses["ours"][0]) > 2e-3}
    assert not far, f"first losses differ: {losses}"
    return [
        {
            "engine": name,
            "cpu_seconds": round(statistics.median(taken[1:]), 4),
            "tokens_per_cpu_second": round(sum(counts[1:]) / sum(taken[1:])),
            "over_ours": round(
                statistics.median(b / a for a, b in zip(seconds["ours"][1:], taken[1:], strict=True)), 2
            ),
            "first_loss": round(losses[name][0], 4),
            **(peers[name].versions if name in peers else {}),
        }
        for name, taken in seconds.items()
    ]


def run(kind: Supervised, doc: str | None) -> None:
    """The command line of a script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--model", choices=list(step_model.SHAPES), action="append", help="default: all of them")
    parser.add_argument("--steps", type=int, default=8, help="of which the first is not measured")
    parser.add_argument("--row-tokens", type=int, default=8192, help="of a packed row of ours")
    parser.add_argument("--peer-python", metavar="PATH", help="python of an environment with TRL")
    parser.add_argument("--smoke", action="store_true", help="two steps of the small model, no peer: does it run?")
    args = parser.parse_args()
    device = timing.use_device(args.device)
    torch.set_num_threads(1)
    keep_freed_memory()
    sizes, steps, python = args.model or list(step_model.SHAPES), args.steps, args.peer_python
    if args.smoke:
        sizes, steps, python = ["0.5M"], 2, None
    for size in sizes:
        for row in measure(kind, size, steps, args.row_tokens, python):
            timing.emit(kind.name, row.pop("engine"), device, {"model": size} | row)
