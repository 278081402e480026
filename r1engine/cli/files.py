"""The commands that make a file or folder of another: reward, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r1engine.cli.border import fail
from r1engine.config import ConfigError


def reward(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="One record a line: reward, completion, answer.")],
    out: Annotated[Path, typer.Option("--out", metavar="OUT.jsonl", help="One verdict a line, in the same order.")],
    function: Annotated[
        list[str] | None,
        typer.Option("--function", metavar="PATH.py:NAME", help="Call this reward function of yours, too."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Of section `rewards`, e.g. deadline_seconds=60 interval_may_be_inequality=true unsafe=true "
            "'judge={urls: [http://host:30000/v1], model: NAME}'",
        ),
    ] = None,
) -> None:
    """Score a file of completions offline, without a model, as a run would.

    A record is {"id", "reward", "prompt", "completion", "answer" or "tests", "language"}; with --function it needs no
    "reward".
    """
    from rich.console import Console

    from r1engine.config import load_rewards
    from r1engine.rewards.from_config import make_scorer
    from r1engine.rewards.offline import score_file

    try:
        called = [f"functions.{where.rpartition(':')[2]}={where}" for where in function or []]
        with make_scorer(load_rewards([*(settings or []), *called])) as scorer:
            scorer.check_functions()
            scorer.check_servers()
            score_file(file, out, scorer, Console())
    except (ValueError, RuntimeError, OSError) as error:
        fail(ConfigError.of(error))


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Hugging Face folder, e.g. DeepSeek-V3 in FP8.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write; an interrupted run goes on.")],
    precision: Annotated[str, typer.Option(help="bfloat16, float32 or fp8 (128x128 blocks).")] = "bfloat16",
) -> None:
    """Write a Hugging Face folder in another number format, tensor by tensor, with index and SHA-256."""
    if precision not in ("bfloat16", "float32", "fp8"):
        fail(ConfigError(f"--precision: found {precision}, required bfloat16, float32 or fp8"))
    from r1engine.convert import convert as run

    try:
        run(source, target, precision)  # type: ignore[arg-type]  # one of the three, as checked above
    except (ValueError, RuntimeError, OSError) as error:
        fail(ConfigError.of(error))
