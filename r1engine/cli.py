"""The console script `r1engine`. Thin: each command imports what it runs when it runs.

Help and a config error answer without importing torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from r1engine import __version__
from r1engine.config import Config, ConfigError, check_files, check_world, load, to_yaml

app = typer.Typer(
    name="r1engine",
    help="Reinforcement-learning post-training as in DeepSeek-R1.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a plain traceback can be pasted into an issue
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with what differs from the defaults.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="e.g. grpo.kl_coef=0 'rollout.max_tokens={0: 32, 10: 64}'"),
]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the config, stop.")] = False,
) -> None:
    """Train as CONFIG says. Started by torchrun, every process is one rank."""
    try:
        cfg = load(config, overrides or [])
        check_files(cfg)
        check_world(cfg, int(os.environ.get("WORLD_SIZE", "1")))
        from r1engine.rewards.from_config import check_rewards

        check_rewards(cfg.rewards)
        if dry_run:
            typer.echo(to_yaml(cfg), nl=False)
            return
        from r1engine.loop import train as run  # brings torch, so only once the config is known to be good

        run(cfg)
    except ConfigError as error:
        _fail(error)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            typer.echo("interrupted; the same command goes on from the last checkpoint", err=True)
        raise typer.Exit(130) from None


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file; not with --defaults.")] = None,
    overrides: Overrides = None,
    defaults: Annotated[bool, typer.Option("--defaults", help="Print every key with its default and meaning.")] = False,
) -> None:
    """Print CONFIG with every default filled in."""
    if defaults == (config is not None):
        _fail(ConfigError("config: required either CONFIG or --defaults"))
    if config is None:
        from r1engine.config_file import commented_defaults

        typer.echo(commented_defaults(Config), nl=False)
        return
    try:
        typer.echo(to_yaml(load(config, overrides or [])), nl=False)
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

    for written in write_report(run_dir):
        typer.echo(written)


@app.command()
def plan(
    config: ConfigPath,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs of the run.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option("--gpu", help="h100, h800, h200 or h20.")] = "h100",
    auto: Annotated[
        bool, typer.Option("--auto", help="Search the layouts and rank them; CONFIG's is ignored.")
    ] = False,
    generator_gpus: Annotated[
        int | None, typer.Option("--generator-gpus", min=1, help="GPUs of one generator; by default what fits well.")
    ] = None,
    mean_tokens: Annotated[
        int | None, typer.Option("--mean-tokens", min=1, help="Mean completion; by default a quarter of the longest.")
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option("--assume", metavar="NAME=VALUE", help="Change an assumed efficiency.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with stacked bars.")] = None,
) -> None:
    """Memory, traffic and time of CONFIG on so many GPUs; needs no weights and no GPU."""
    try:
        cfg = load(config, overrides or [])
        from r1engine.plan.command import run_plan

        fits = run_plan(
            cfg, gpus, gpu, auto=auto, generator_gpus=generator_gpus, mean_tokens=mean_tokens,
            assume=assume or [], as_json=as_json, html=html,
        )  # fmt: skip
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
        cfg = load(config, overrides or [])
        from r1engine.rollout.sglang.serve import serve as run

        run(cfg, servers, host)
    except ValueError as error:
        _fail(error if isinstance(error, ConfigError) else ConfigError(str(error)))


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
    except (ValueError, RuntimeError) as error:
        _fail(error if isinstance(error, ConfigError) else ConfigError(str(error)))


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
        run(source, target, precision)
    except (ValueError, RuntimeError) as error:
        _fail(ConfigError(str(error)))


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


def _fail(error: ConfigError) -> NoReturn:
    """Ends the program with status 2 and the message, once and not once a rank."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)
