"""A step of supervised fine-tuning beside TRL's SFTTrainer: tokens a CPU second of one thread.

    .venv/bin/python benchmarks/bench_sft.py --peer-python .venv-trl/bin/python --model 0.5M --model 3M

Both read the same folder and the same tokens in the same batches of 32 texts, log-normal in length; a step of each in
turn. Ours is the stage as a run has it: reading, packing, update, optimizer. TRL runs three times: as it comes (batches
of 8 accumulated, activations recomputed), the same without recomputation, and one batch of 32. The losses of the first
step must agree.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import step_model
import timing
import torch
from tokenizers import Tokenizer

from r1engine.config import SftConfig
from r1engine.model import parallel
from r1engine.model.cpu import keep_freed_memory
from r1engine.observe.metrics import Phases
from r1engine.observe.progress import Progress
from r1engine.stages import make_stage
from r1engine.stages.sft import SftStage

BATCH = 32
SETTINGS = ("as_shipped", "batches_of_8", "one_batch")  # of sft_peer.py


def make_texts(folder: Path, count: int) -> Path:
    """Slices of the LICENSE text: prompts of 8 to 64 tokens, completions log-normal around 120, 16 to 700."""
    tokenizer, rng = Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(0)
    ids = tokenizer.encode((step_model.ROOT / "LICENSE").read_text()).ids

    def some(length: int) -> str:
        start = rng.randrange(len(ids) - length)
        return tokenizer.decode(ids[start : start + length]).replace("\ufffd", "?") + "."

    with (folder / "texts.jsonl").open("w") as file:
        for _ in range(count):
            size = int(min(700, max(16, rng.lognormvariate(4.8, 0.8))))
            row = {"question": some(rng.randint(8, 64)), "completion": some(size)}
            file.write(json.dumps(row) + "\n")
    return folder / "texts.jsonl"


def make_folder(folder: Path, size: str) -> None:
    """The model of bench_step.py, with an end token that it knows."""
    step_model.make_folder(folder, step_model.SHAPES[size])
    for name, end in (("config.json", 0), ("generation_config.json", 0), ("tokenizer_config.json", step_model.PAD)):
        settings = json.loads((folder / name).read_text())
        key = "eos_token" if isinstance(end, str) else "eos_token_id"
        (folder / name).write_text(json.dumps(settings | {key: end}))


class Peer:
    """TRL's side: a child process in its own environment, driven step by step."""

    def __init__(self, python: str, folder: Path, texts: Path, setting: str) -> None:
        job = json.dumps({"folder": str(folder), "texts": str(texts), "setting": setting})
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("sft_peer.py"), job],
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
            raise RuntimeError(f"sft_peer.py ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """The child ends when nothing more comes."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def our_stage(folder: Path, texts: Path, row_tokens: int) -> SftStage:
    """The stage of a run, on one thread."""
    cfg = SftConfig(
        model={"path": folder},
        run_dir=folder / "run",
        data={"train": texts, "max_tokens": 1024},
        sft={"epochs": 1, "batch_size": BATCH},
        max_row_tokens=row_tokens,
        optimizer={"lr": 1e-6, "schedule": "constant"},
    )
    stage = make_stage(cfg, parallel.join(cfg.parallel), Phases(), Progress("", enabled=False))
    assert isinstance(stage, SftStage)
    return stage


def measure(size: str, steps: int, row_tokens: int, python: str | None) -> list[dict[str, Any]]:
    """A row for each engine: medians over the steps but the first."""
    with tempfile.TemporaryDirectory(prefix="bench-sft-") as scratch:
        folder = Path(scratch)
        make_folder(folder, size)
        stage = our_stage(folder, make_texts(folder, steps * BATCH), row_tokens)
        order = [stage.train.at(index) for step in range(steps) for index in stage.batches.at(step)]
        (folder / "tokens.json").write_text(json.dumps(order))
        peers = {name: Peer(python, folder, folder / "tokens.json", name) for name in SETTINGS} if python else {}
        seconds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        losses: dict[str, float] = {}
        tokens = []
        for step in range(steps):
            for name, peer in peers.items():
                found = peer.step()
                seconds[name].append(found["cpu"])
                losses.setdefault(name, found["loss"])
            start = time.process_time()
            done = stage.advance(step)
            seconds["ours"].append(time.process_time() - start)
            losses.setdefault("ours", done.metrics["loss"])
            tokens.append(done.tokens)
        for peer in peers.values():
            peer.close()
        parallel.leave()
    far = {name: loss for name, loss in losses.items() if abs(loss - losses["ours"]) > 2e-3}
    assert not far, f"first losses differ: {losses}"
    return [
        {
            "engine": name,
            "model": size,
            "cpu_seconds": round(statistics.median(taken[1:]), 4),
            "tokens_per_cpu_second": round(sum(tokens[1:]) / sum(taken[1:])),
            "over_ours": round(
                statistics.median(b / a for a, b in zip(seconds["ours"][1:], taken[1:], strict=True)), 2
            ),
            "first_loss": round(losses[name], 4),
            **(peers[name].versions if name in peers else {}),
        }
        for name, taken in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    names, steps, python = args.model or list(step_model.SHAPES), args.steps, args.peer_python
    if args.smoke:
        names, steps, python = ["0.5M"], 2, None
    for name in names:
        for row in measure(name, steps, args.row_tokens, python):
            timing.emit("sft", row.pop("engine"), device, row)


if __name__ == "__main__":
    main()
