"""`r1engine evaluate`: a model on benchmarks, and what is done with the results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from r1engine.cli.border import Overrides, agree, fail, is_first
from r1engine.config import ConfigError

OutPath = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of an evaluation.")]
SuitePath = Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="Benchmarks, sampling, who draws.")]


class _Evaluate(TyperGroup):
    """What is no name of a subcommand is TARGET of the evaluation itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_Evaluate, no_args_is_help=True, add_completion=False)


@app.callback()
def _about() -> None:
    """Evaluate a model: r1engine evaluate TARGET SUITE.yaml [KEY=VALUE]. A killed evaluation goes on where it was."""


@contextmanager
def _border() -> Iterator[None]:
    """Inside, what the user can repair ends the command with status 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(ConfigError.of(error))


@app.command(hidden=True)
def run(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Hugging Face folder, run folder (RUN@100: a checkpoint), or URL.")
    ],
    suite: SuitePath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove what is in the suite's folder, and begin anew.")
    ] = False,
) -> None:
    """Draw and grade a model's replies. Under torchrun every process has its share."""
    from rich.console import Console

    from r1engine.config.evaluation import load_suite

    with _border():
        settings = load_suite(suite, overrides or [])
    agree(None)
    import torch

    from r1engine import ranks
    from r1engine.evaluation import evaluate as work

    console, had_ranks = Console(soft_wrap=True), torch.distributed.is_initialized()
    ranks.use_threads(None)
    try:
        _, out = work.evaluate_into(
            target, settings, note=lambda text: console.print(text, markup=False, highlight=False), is_fresh=fresh
        )
    except ConfigError as error:
        _end(f"error: {error}", 2)
    except RuntimeError as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("interrupted; the same command goes on", 130)
    finally:
        if not had_ranks:  # a program that calls this may have its own
            ranks.stop()
    if is_first():
        _print(out)


def _print(out: Path) -> None:
    from rich.console import Console

    from r1engine.evaluation.page import write_page
    from r1engine.evaluation.show import print_result

    print_result(out, Console())
    typer.echo(f"written: {write_page([out])}")


def _end(message: str, status: int) -> None:
    """Of many ranks the first speaks: all have the same problem."""
    if is_first():
        typer.echo(message, err=True)
    raise typer.Exit(status) from None


@app.command()
def grade(out: OutPath, overrides: Overrides = None) -> None:
    """Grade stored replies again (another judge: rewards.judge=..., a repaired rule). No model is needed."""
    with _border():
        from rich.console import Console

        from r1engine.evaluation.afterwards import grade_again
        from r1engine.evaluation.show import print_result
        from r1engine.evaluation.store import Store

        grade_again(Store(out), overrides or [], note=typer.echo)
        print_result(out, Console())


@app.command()
def steps(
    arguments: Annotated[
        list[str], typer.Argument(metavar="FILE... KEY=VALUE...", help="Solutions, and path=MODEL of a scorer's keys.")
    ],
    template: Annotated[
        str, typer.Option("--template", help="How a model of `stage: process_reward` is asked.")
    ] = "chat",
) -> None:
    """Score labelled steps by a process reward model: ProcessBench's F1, accuracy, calibration."""
    with _border():
        from r1engine.config import StepScorerSection
        from r1engine.config.source import read_overrides, validate
        from r1engine.config.stage import template_of

        files = [Path(one) for one in arguments if "=" not in one]
        cfg = validate(StepScorerSection, read_overrides([one for one in arguments if "=" in one]))
        if problems := cfg.problems() + ([] if files else ["evaluate steps: found no file, required labelled steps"]):
            raise ConfigError(problems)
        from r1engine.verbs.step_scores import as_table, measure_files

        typer.echo(as_table(measure_files(files, cfg, template_of(template))))


@app.command()
def show(
    outs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Folders of evaluations.")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page, too.")] = None,
) -> None:
    """Print results; of several, side by side with paired differences and the paper's numbers."""
    with _border():
        from rich.console import Console

        from r1engine.evaluation.page import write_page
        from r1engine.evaluation.show import print_result, print_side_by_side

        print_side_by_side(outs, Console()) if len(outs) > 1 else print_result(outs[0], Console())
        if html is not None:
            typer.echo(f"written: {write_page(outs, html)}")


@app.command()
def board(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run that trains.")]) -> None:
    """Print the evaluations that a run made, step by step; best and last against the first."""
    with _border():
        from rich.console import Console

        from r1engine.evaluation.show import print_board

        print_board(run_dir, Console())


@app.command("import")
def import_verdicts(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Of a harness, or one verdict a line: question, right, sample.")
    ],
    out: OutPath,
    benchmark: Annotated[str, typer.Option("--benchmark", metavar="NAME", help="e.g. swe_bench_verified")],
    target: Annotated[str, typer.Option("--target", help="Whose verdicts they are, in a new folder.")] = "imported",
) -> None:
    """Take the verdicts of an official harness, for tables, intervals and comparisons."""
    with _border():
        from rich.console import Console

        from r1engine.evaluation.afterwards import import_verdicts as take
        from r1engine.evaluation.show import print_summaries

        print_summaries({benchmark: take(file, out, benchmark, target)}, Console())


@app.command()
def export(
    out: OutPath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the harness reads.")],
    benchmark: Annotated[str, typer.Option("--benchmark", metavar="NAME", help="alpaca_eval_2, arena_hard, ...")],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="The model's name there.")],
) -> None:
    """Write replies, without their thoughts, as the benchmark's own harness reads them."""
    with _border():
        from r1engine.evaluation.afterwards import export_replies

        typer.echo(f"written: {file} ({export_replies(out, benchmark, model, file):,} replies)")


@app.command()
def contamination(
    train: Annotated[Path, typer.Argument(metavar="TRAIN.jsonl", help="Questions that are trained on.")],
    suite: SuitePath,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="CLEAN.jsonl", help="The rows without overlap.")
    ] = None,
) -> None:
    """Count rows that share a 10-gram with a question or reference answer of the suite's benchmarks."""
    with _border():
        from r1engine.config.evaluation import load_suite
        from r1engine.evaluation.overlap import compare_with_training

        for line in compare_with_training(train, load_suite(suite, []), write):
            typer.echo(line)


@app.command("list")
def list_benchmarks() -> None:
    """Print the benchmarks: questions, metric, grader, the file that is wanted, its licence, R1's score."""
    from rich.console import Console

    from r1engine.evaluation.show import print_list

    print_list(Console())
