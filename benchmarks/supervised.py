"""What the benchmarks of supervised steps share: texts, TRL's side as a child process, and the rows."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step_model
import timing
import torch
from tokenizers import Tokenizer

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


class Peer:
    """TRL's side: a child process in its own environment, driven step by step."""

    def __init__(self, python: str, kind: str, folder: Path, texts: Path, setting: str) -> None:
        job = json.dumps({"kind": kind, "folder": str(folder), "texts": str(texts), "setting": setting})
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("trl_supervised.py"), job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.versions = self._read()

    def step(self) -> dict[str, Any]:
        """CPU seconds and loss of one optimizer step, as the child measures them."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"trl_supervised.py ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """The child ends when nothing more comes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def make(cfg: Any) -> Any:
    """The stage of a run, on one thread."""
    return make_stage(cfg, parallel.join(cfg.parallel), Phases(), Progress("", enabled=False))


def compare(stage: Any, kind: str, folder: Path, tokens: list[Any], steps: int, python: str | None) -> list[dict]:
    """A row for each engine: medians over the steps but the first, which must have the same loss in all of them.

    tokens: of the whole run in its order, as trl_supervised.py takes them.
    """
    (folder / "tokens.json").write_text(json.dumps(tokens))
    peers = {name: Peer(python, kind, folder, folder / "tokens.json", name) for name in SETTINGS} if python else {}
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    losses: dict[str, list[float]] = {name: [] for name in seconds}
    counts = []
    for step in range(steps):
        for name, peer in peers.items():
            found = peer.step()
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


def run(name: str, doc: str | None, measure: Callable[[str, int, int, str | None], list[dict[str, Any]]]) -> None:
    """The command line of a script. `measure` takes a model's size, steps, tokens of a packed row, and TRL's python."""
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
        for row in measure(size, steps, args.row_tokens, python):
            timing.emit(name, row.pop("engine"), device, {"model": size} | row)
