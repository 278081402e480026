"""The console script `r1engine`. Thin: each command imports what it runs when it runs.

Help and a config error answer without importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from r1engine import __version__
from r1engine.config import KINDS, ConfigError, RlConfig, StageConfig, load, to_yaml
from r1engine.ending import Ended, Ending

app = typer.Typer(
    name="r1engine",
    help="Post-training as in DeepSeek-R1.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a plain traceback can be pasted into an issue
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with what differs from the defaults.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="e.g. grpo.kl_coef=0 'rollout.max_tokens={0: 32, 10: 64}'"),
]

Live = Annotated[
    bool, typer.Option("--live", help="With --dry-run: try the sandbox of this machine and ask the servers, too.")
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the config, stop.")] = False,
    live: Live = False,
) -> None:
    """Train as CONFIG says. Started by torchrun, every process is one rank."""
    from r1engine.stages.check import check_start
    from r1engine.stages.check import dry_run as check_all

    try:
        cfg: StageConfig = load(config, overrides or [])
        if dry_run:
            notes = check_all(cfg, _world_size(), is_live=live)
            _agree(None)
            _tell(notes)
            typer.echo(to_yaml(cfg), nl=False)
            return
        check_start(cfg, _world_size())
        from r1engine.run import train as run  # brings torch, so only once the config is known to be good

        with _ranks(cfg.parallel.timeout_minutes) as ending:
            run(cfg, ending)
    except ConfigError as error:
        _fail(error)


@app.command()
def pipeline(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every stage, print what would run, stop.")] = False,
    live: Live = False,
    status: Annotated[bool, typer.Option("--status", help="Print what is done, and stop.")] = False,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop when this one is done.")] = None,
    redo: Annotated[
        str | None,
        typer.Option("--redo", metavar="STAGE", help="Make it again, and what is made from it; old folders are kept."),
    ] = None,
) -> None:
    """Run the stages of CONFIG in order; what is done is not run again. On ranks: torchrun -m r1engine pipeline ..."""
    from r1engine.config.pipeline import load_pipeline
    from r1engine.pipeline import driver
    from r1engine.pipeline.status import print_plan, print_status

    try:
        stages = load_pipeline(config, overrides or [])
        stages = stages.until(until) if until is not None else stages
        again = [*stages.after(redo)] if redo is not None else []  # refuses a name that is none
        if status:
            print_status(stages)
            return
        if redo is None:
            states = driver.check(stages, _world_size())
            print_plan(states) if _is_first() else None
            if _world_size() == 1 and all(state == "done" for _, state in states):
                return
        if dry_run:
            if redo is not None and _is_first():
                typer.echo(f"--redo {redo} would make again: {', '.join([redo, *(stage.name for stage in again)])}")
            notes = driver.dry_run(stages, _world_size(), is_live=live) if redo is None else []
            _agree(None)
            _tell(notes)
            return
        with _ranks(stages.timeout_minutes) as ending:
            driver.run_pipeline(stages, ending, redo=redo)
    except ConfigError as error:
        _fail(error)


@contextmanager
def _ranks(timeout_minutes: int) -> Iterator[Ending]:
    """Inside, torch.distributed may run, and a signal ends the run where it is saved; of many ranks one tells why."""
    with Ending() as ending:
        _agree(None, timeout_minutes)
        from r1engine.model.parallel import leave
        from r1engine.observe.failure import RunFailed
        from r1engine.ranks import is_first_to

        try:
            yield ending
        except Ended as end:
            typer.echo(end, err=True) if _is_first() else None
            raise typer.Exit(end.status) from None
        except RunFailed as error:
            typer.echo(error, err=True) if error.args else None
            raise typer.Exit(1) from None
        except ConfigError as error:
            if is_first_to("tell the failure"):
                rank = "" if _is_first() else f" on rank {os.environ['RANK']}"
                typer.echo(f"error{rank}: {error}", err=True)
            raise typer.Exit(2) from None
        finally:
            leave()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@app.command("config")
def show_config(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file; with --defaults a stage.")] = None,
    overrides: Overrides = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Print every key of a stage (rl, sft, tiny) with default and meaning.")
    ] = False,
) -> None:
    """Print CONFIG with every default filled in."""
    try:
        if defaults:
            from r1engine.config.words import commented_defaults

            if (kind := config or "rl") not in KINDS:
                raise ConfigError(f"config --defaults: found {kind}, required one of {', '.join(KINDS)}")
            typer.echo(commented_defaults(KINDS[kind]), nl=False)
            return
        if config is None:
            raise ConfigError("config: required CONFIG, or --defaults and a kind of stage")
        typer.echo(to_yaml(load(Path(config), overrides or [])), nl=False)
    except ConfigError as error:
        _fail(error)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, finished or not.")],
) -> None:
    """Write the report of a run (again)."""
    if not (run_dir / "metrics.jsonl").is_file():
        _fail(ConfigError(f"report: found no metrics.jsonl in {run_dir}, required the folder of a run"))
    from r1engine.observe.report import write_report

    try:
        for written in write_report(run_dir):
            typer.echo(written)
    except (ValueError, OSError) as error:
        _fail(ConfigError.of(error))


@app.command()
def plan(
    config: ConfigPath,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs of the run.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h800, h200 or h20.")] = "h100",
    auto: Annotated[
        bool, typer.Option("--auto", help="Search the layouts and rank them; CONFIG's is ignored.")
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="NAME=VALUE", help="Change what is assumed, e.g. mean_tokens=4000."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with stacked bars.")] = None,
) -> None:
    """Memory, traffic and time of CONFIG on so many GPUs; needs no weights and no GPU."""
    try:
        cfg = load(config, overrides or [], RlConfig)
        from r1engine.plan.command import run_plan

        fits = run_plan(cfg, gpus, gpu, auto=auto, assume=assume or [], as_json=as_json, html=html)
    except ConfigError as error:
        _fail(error)
    if not fits:
        raise typer.Exit(1)


@app.command()
def serve(
    config: ConfigPath,
    overrides: Overrides = None,
    servers: Annotated[int, typer.Option("--servers", min=1, help="SGLang servers on this machine.")] = 1,
    host: Annotated[str | None, typer.Option("--host", help="Address that the trainer reaches; default: name.")] = None,
) -> None:
    """Run the SGLang servers of a disaggregated CONFIG on this machine, until Ctrl-C."""
    try:
        cfg = load(config, overrides or [], RlConfig)
        from r1engine.rollout.sglang.serve import serve as run

        run(cfg, servers, host)
    except (ValueError, OSError) as error:
        _fail(ConfigError.of(error))


@app.command()
def reward(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="One record a line: reward, completion, answer.")],
    out: Annotated[Path, typer.Option("--out", metavar="OUT.jsonl", help="One verdict a line, in the same order.")],
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

    A record is {"id", "reward", "prompt", "completion", "answer" or "tests", "language"}.
    """
    from rich.console import Console

    from r1engine.config import load_rewards
    from r1engine.rewards.from_config import make_scorer
    from r1engine.rewards.offline import score_file

    try:
        with make_scorer(load_rewards(settings or [])) as scorer:
            scorer.check_servers()
            score_file(file, out, scorer, Console())
    except (ValueError, RuntimeError, OSError) as error:
        _fail(ConfigError.of(error))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Hugging Face folder, e.g. DeepSeek-V3 in FP8.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write; an interrupted run goes on.")],
    precision: Annotated[str, typer.Option(help="bfloat16, float32 or fp8 (128x128 blocks).")] = "bfloat16",
) -> None:
    """Write a Hugging Face folder in another number format, tensor by tensor, with index and SHA-256."""
    if precision not in ("bfloat16", "float32", "fp8"):
        _fail(ConfigError(f"--precision: found {precision}, required bfloat16, float32 or fp8"))
    from r1engine.convert import convert as run

    try:
        run(source, target, precision)  # type: ignore[arg-type]  # one of the three, as checked above
    except (ValueError, RuntimeError, OSError) as error:
        _fail(ConfigError.of(error))


@app.command()
def doctor() -> None:
    """Print what this machine has: versions, devices, memory, disk, the compiled kernels."""
    from r1engine.doctor import print_table

    print_table()


def main() -> None:
    """Entry of the console script."""
    app()


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"r1engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _tell(notes: list[str]) -> None:
    """Prints what a dry run found worth knowing."""
    for note in notes if _is_first() else []:
        typer.echo(f"note: {note}", err=True)


def _fail(error: ConfigError) -> NoReturn:
    """Ends the program with status 2 and the message, once and not once a rank."""
    _agree(str(error))
    if _is_first():
        typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)


def _agree(problem: str | None, timeout_minutes: int = 30) -> None:
    """Ends the program on every rank if one of them has a problem before they meet. Once on each rank; collective.

    A rank may see what others do not: a folder that only its node lacks, an argument that only it was given.
    """
    if _world_size() == 1 or "MASTER_ADDR" not in os.environ:  # no launcher
        return
    from r1engine import ranks

    found = ranks.common_problem(problem, timeout_minutes)
    if found is None:
        return
    if _is_first():
        typer.echo(f"error: {found}", err=True)
    ranks.stop()
    raise typer.Exit(2)
