"""Embedded generator against transformers.generate: python benchmarks/bench_generate.py [--smoke] [--device cuda]

One JSON line per case on standard output. Both sample from the same weights, temperature 1, interleaved run by run.
The floor is the time of the weight matrix products alone, at the rate measured here for the same shapes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models

from r1engine.batch import Prompt
from r1engine.data.question import Question
from r1engine.rollout import generate
from r1engine.rollout.local.generator import LocalGenerator

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 683,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMOKE_SIZES = SIZES | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}


@dataclass(frozen=True)
class Case:
    """A rollout: `prompts` of `prompt_tokens`, `samples` of each, `slots` at once, up to `max_tokens`."""

    name: str
    prompts: int
    samples: int
    prompt_tokens: int
    max_tokens: int
    slots: int
    num_stops: int  # of the vocabulary; 0: every completion runs to the limit


CASES = [
    Case("groups", prompts=4, samples=16, prompt_tokens=32, max_tokens=64, slots=64, num_stops=0),
    Case("distinct", prompts=64, samples=1, prompt_tokens=32, max_tokens=64, slots=64, num_stops=0),
    Case("ragged", prompts=16, samples=16, prompt_tokens=32, max_tokens=128, slots=64, num_stops=16),
]
SMOKE_CASES = [Case("smoke", prompts=2, samples=4, prompt_tokens=8, max_tokens=8, slots=4, num_stops=16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one tiny case, to see that the script runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    repeats = 1 if args.smoke else args.repeats
    for case in SMOKE_CASES if args.smoke else CASES:
        row = measure(case, SMOKE_SIZES if args.smoke else SIZES, torch.device(args.device), repeats)
        print(json.dumps(row), flush=True)


def measure(case: Case, sizes: dict[str, object], device: torch.device, repeats: int) -> dict[str, object]:
    """The row of one case. Times are seconds, medians; the IQR is of the ratio of neighbouring runs."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # Without stops, the id behind the vocabulary is the stop token: it is never drawn.
    stops = list(range(1, 1 + case.num_stops)) or [int(sizes["vocab_size"])]
    with tempfile.TemporaryDirectory() as folder:
        model = new_model(Path(folder), sizes, stops).to(device, dtype)
        generator = LocalGenerator(Path(folder), seed=0, slots=case.slots, device=device, dtype=dtype)
    generator.load_weights(model.state_dict().items())
    prompts = [
        Prompt(
            id=i, tokens=[100 + (i * 7 + j) % 300 for j in range(case.prompt_tokens)], text="", question=Question("")
        )
        for i in range(case.prompts)
    ]
    ours = lambda: run_ours(generator, prompts, case)  # noqa: E731
    theirs = lambda: run_transformers(model, prompts, case, stops)  # noqa: E731
    ours(), theirs()
    runs = [(timed(ours, device), timed(theirs, device)) for _ in range(repeats)]
    (our_s, our_tokens), (their_s, their_tokens) = (
        (statistics.median(run[side][0] for run in runs), statistics.median(run[side][1] for run in runs))
        for side in (0, 1)
    )
    ratios = [(a[1] / a[0]) / (b[1] / b[0]) for a, b in runs]
    gflop, gflops = matmul_gflop(model, case, our_tokens), matmul_rate(model, case.slots)
    return {
        "case": case.name,
        "ours_tokens_per_s": round(our_tokens / our_s, 1),
        "transformers_tokens_per_s": round(their_tokens / their_s, 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_iqr": [round(q, 2) for q in statistics.quantiles(ratios, n=4)[::2]] if repeats > 1 else None,
        "ours_s": round(our_s, 4),
        "transformers_s": round(their_s, 4),
        "floor_s": round(gflop / gflops, 4),
        "fraction_of_floor": round(gflop / gflops / our_s, 3),
        "matmul_gflops": round(gflops, 1),
        "batch": case.slots,
        "repeats": repeats,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def new_model(folder: Path, sizes: dict[str, object], stops: list[int]) -> torch.nn.Module:
    """A random Qwen2, saved to `folder` with a tokenizer."""
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, eos_token_id=stops)).eval()
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(int(sizes["vocab_size"]))}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return model


def run_ours(generator: LocalGenerator, prompts: list[Prompt], case: Case) -> int:
    """Tokens sampled."""
    with generator.awake():
        completions = generate(generator, prompts, num_samples=case.samples, step=0, max_tokens=case.max_tokens)
    return sum(len(completion.tokens) for completion in completions)


@torch.inference_mode()
def run_transformers(model: torch.nn.Module, prompts: list[Prompt], case: Case, stops: list[int]) -> int:
    """Tokens sampled, in batches of `slots` sequences; a batch ends with its longest sequence."""
    sequences = [prompt.tokens for prompt in prompts for _ in range(case.samples)]
    num_tokens = 0
    for first in range(0, len(sequences), case.slots):
        inputs = torch.tensor(sequences[first : first + case.slots], device=model.device)
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            top_k=0,
            max_new_tokens=case.max_tokens,
            eos_token_id=stops,
            pad_token_id=0,
        )[:, inputs.shape[1] :]
        is_stop = torch.isin(outputs, torch.tensor(stops, device=outputs.device))
        num_tokens += int((is_stop.cumsum(dim=1) - is_stop.long() == 0).sum())
    return num_tokens


def timed(run: Callable[[], int], device: torch.device) -> tuple[float, int]:
    """Seconds and tokens of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    num_tokens = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, num_tokens


def matmul_shapes(model: torch.nn.Module) -> list[tuple[int, int]]:
    """(rows, columns) of every weight matrix a token passes, those that share an input as one."""
    c, head_dim = model.config, model.config.hidden_size // model.config.num_attention_heads
    layer = [
        ((c.num_attention_heads + 2 * c.num_key_value_heads) * head_dim, c.hidden_size),
        (c.hidden_size, c.num_attention_heads * head_dim),
        (2 * c.intermediate_size, c.hidden_size),
        (c.hidden_size, c.intermediate_size),
    ]
    return layer * c.num_hidden_layers + [(c.vocab_size, c.hidden_size)]


def matmul_gflop(model: torch.nn.Module, case: Case, num_tokens: float) -> float:
    """Weight matrix products of a rollout that computes each prompt once."""
    layers, head = matmul_shapes(model)[:-1], matmul_shapes(model)[-1]
    num_sequences = case.prompts * case.samples
    passes = case.prompts * case.prompt_tokens + num_tokens - num_sequences  # the last token of each is only drawn
    per_token = sum(rows * columns for rows, columns in layers)
    return 2e-9 * (passes * per_token + num_tokens * head[0] * head[1])


def matmul_rate(model: torch.nn.Module, batch: int) -> float:
    """GFLOP/s of one decode step's weight matrix products at `batch` rows: the best of 20 steps."""
    device, dtype = model.device, model.dtype
    pairs = [
        (
            torch.randn(batch, columns, device=device, dtype=dtype),
            torch.randn(rows, columns, device=device, dtype=dtype),
        )
        for rows, columns in matmul_shapes(model)
    ]

    def step() -> int:
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)
        return 0

    step()
    best = min(timed(step, device)[0] for _ in range(20))
    return 2e-9 * batch * sum(rows * columns for rows, columns in matmul_shapes(model)) / best


if __name__ == "__main__":
    main()
