"""The commands that make a file or folder of another: reward, convert, export, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r1engine.cli.border import Overrides, fail, is_first, ranks_of_a_run
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


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, or one of its checkpoints.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Hugging Face folder to write.")],
    overrides: Overrides = None,
    precision: Annotated[
        str | None, typer.Option(help="bfloat16, float32 or fp8; by default that of the weights here.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The one that checkpoint.best keeps.")] = False,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder; the newest one where RUN_DIR names none."""
    if precision not in (None, "bfloat16", "float32", "fp8"):
        fail(ConfigError(f"--precision: found {precision}, required bfloat16, float32 or fp8"))
    try:
        with ranks_of_a_run(30):
            from r1engine.verbs.export import export as run

            try:
                step = run(source, target, precision, overrides or [], best=best)  # type: ignore[arg-type]  # as checked above
            except (ValueError, RuntimeError, OSError) as error:
                raise ConfigError.of(error) from error
            typer.echo(f"{target}: the model after {step} optimizer steps") if is_first() else None
    except ConfigError as error:
        fail(error)


def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Hugging Face folder, or folder of a run.")],
    prompts: Annotated[
        Path | None, typer.Argument(metavar="PROMPTS", help="Data file; without it, a conversation in the terminal.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="OUT.jsonl", help="One sample a line.")] = None,
    column: Annotated[str, typer.Option(help="Of PROMPTS, with the questions.")] = "question",
    template: Annotated[
        str | None,
        typer.Option(help="chat, r1, plain, r1_zero, r1_zero_steps or none; by default chat where the model has one."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    draw: Annotated[
        str, typer.Option(metavar="NAME=VALUE,...", help="samples, max_tokens, temperature, top_p, seed.")
    ] = "",
) -> None:
    """Draw samples of a model for the questions of a file (`r1engine reward` grades them), or talk to it."""
    if (prompts is None) != (out is None):
        fail(ConfigError("generate: found one of PROMPTS and --out, required both, or none for a conversation"))
    from rich.console import Console

    try:
        from r1engine.verbs.generate import Speaker, converse, write_samples
        from r1engine.verbs.wanted import wanted_of

        console, speaker = Console(), Speaker(model, wanted_of(template, system, draw))
        if prompts is None or out is None:
            typer.echo("Ctrl-D ends the conversation, an empty line begins a new one, Ctrl-C stops an answer.")
            converse(speaker, console, lambda: input("> "))
            return
        count = write_samples(speaker, prompts, out, column, console)
        console.print(f"written: {out}, {count} samples", highlight=False)
    except (ValueError, RuntimeError, OSError) as error:
        fail(ConfigError.of(error))
