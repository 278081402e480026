"""The commands that look at something and change nothing: config, report, plan, data, doctor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from r1engine.cli.border import ConfigPath, Overrides, fail
from r1engine.config import (
    KINDS,
    ConfigError,
    ProcessRewardConfig,
    RewardModelConfig,
    RlConfig,
    SftConfig,
    StageConfig,
    check_files,
    load,
    to_yaml,
)
from r1engine.config.pipeline import is_pipeline, load_pipeline
from r1engine.config.rollout import Sglang


def show_config(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file; with --defaults a stage.")] = None,
    overrides: Overrides = None,
    defaults: Annotated[
        bool,
        typer.Option(
            "--defaults", help="Print every key of a stage (rl, sft, reward_model, ...), default and meaning."
        ),
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
        fail(error)


def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", help="Folder of a run, finished or not; several are compared."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.html", help="Of a comparison.", show_default=True)] = Path(
        "comparison.html"
    ),
    live: Annotated[int | None, typer.Option("--live", metavar="SECONDS", help="The page loads itself again.")] = None,
) -> None:
    """Write the report of a run (again), or a page that compares several."""
    for run_dir in run_dirs:
        if not (run_dir / "metrics.jsonl").is_file():
            fail(ConfigError(f"report: found no metrics.jsonl in {run_dir}, required the folder of a run"))
    from r1engine.observe.report import write_comparison, write_report

    try:
        if len(run_dirs) > 1:
            typer.echo(write_comparison(run_dirs, out))
            return
        if live is not None:
            os.nice(10)  # beside the run itself
        typer.echo(write_report(run_dirs[0], refresh_seconds=live))
    except (ValueError, OSError) as error:
        fail(ConfigError.of(error))


def plan(
    config: ConfigPath,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that train.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option("--gpu", help="h100, h800, h200, h20, b200, gb200, a100, l40s, rtx4090, ...")
    ] = "h100",
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
    """Memory, traffic and time of CONFIG on so many GPUs; needs no weights and no GPU. Of a pipeline: of each stage."""
    try:
        if is_pipeline(config):
            if auto or html is not None:
                raise ConfigError("plan: found --auto or --html with a pipeline, required one stage for them")
            from r1engine.plan.stages import plan_pipeline

            stages = load_pipeline(config, overrides or [])
            if not plan_pipeline(stages, gpus, gpu, assume=assume or [], as_json=as_json):
                raise typer.Exit(1)
            return
        cfg: StageConfig = load(config, overrides or [])
        assert isinstance(cfg, RlConfig | SftConfig | RewardModelConfig | ProcessRewardConfig)  # all that train
        from r1engine.plan.command import run_plan

        fits = run_plan(cfg, gpus, gpu, auto=auto, assume=assume or [], as_json=as_json, html=html)
    except ConfigError as error:
        fail(error)
    if not fits:
        raise typer.Exit(1)


def simulate(
    config: ConfigPath,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that train.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option("--gpu", help="As of plan.")] = "h100",
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="NAME=VALUE", help="As of plan, and what is guessed, e.g. length_sigma=1."),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option("--like", metavar="PATH", help="A run's folder: its costs and lengths; a file: its lengths."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with figures.")] = None,
) -> None:
    """Replay CONFIG's timeline on paper: how far ahead, how many generators, how often to save; needs no GPU."""
    try:
        from r1engine.plan.timeline.command import run_simulation

        cfg = load(config, overrides or [], RlConfig)
        run_simulation(cfg, gpus, gpu, assume=assume or [], like=like, as_json=as_json, html=html)
    except (ConfigError, OSError) as error:
        fail(ConfigError.of(error))


def doctor(
    run_dir: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN_DIR]",
            help="Of a run that seems to stand still: who waits for whom. With --cluster: a folder on the file system "
            "of the later run.",
        ),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Started by torchrun: what the ranks have and reach together.")
    ] = False,
    ports: Annotated[
        str, typer.Option("--ports", metavar="FIRST-LAST", help="With --cluster: rollout.sglang.ports of the run.")
    ] = "",
) -> None:
    """Print what this machine has; of a run, where its ranks are; of a cluster, whether an expensive start may work."""
    try:
        if cluster:
            _doctor_cluster(run_dir, ports)
            return
        if ports:
            raise ConfigError(f"doctor: found --ports {ports}, required --cluster with it")
        if run_dir is None:
            from r1engine.doctor import print_table

            print_table()
            return
        from r1engine.observe.stall import lines

        typer.echo("\n".join(lines(run_dir)))
    except (ValueError, OSError) as error:
        fail(ConfigError.of(error))


def _doctor_cluster(folder: Path | None, ports: str) -> None:
    """Status 1 if something is to be done."""
    if folder is None:
        raise ConfigError("doctor --cluster: required a folder on the file system of the later run")
    try:
        wanted = Sglang(ports=ports).port_range
    except ValueError as error:
        raise ConfigError(f"doctor --ports: found {ports}, required FIRST-LAST such as 30000-30099") from error
    from r1engine import ranks
    from r1engine.cluster.checks import examine, print_findings

    try:
        world = ranks.start(timeout_minutes=5)
        findings = examine(world, folder, wanted)
    except RuntimeError as error:  # of the ranks' meeting
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if world.is_first:
        print_findings(findings)
    world.everyones(None)  # a launcher ends all ranks when the first one ends
    ranks.stop()
    if any(finding.todo for finding in findings):
        raise typer.Exit(1)


def data(
    config: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Prompts that are printed.")] = 3,
    heldout: Annotated[bool, typer.Option("--heldout", help="Look at data.heldout, not at data.train.")] = False,
) -> None:
    """Print the questions of CONFIG as the run will see them: prompts, tokens, repeats, references of no use."""
    from rich.console import Console

    try:
        from r1engine.hf.hub import fetched

        cfg = fetched(load(config, overrides or [], RlConfig))
        check_files(cfg)
        if heldout and cfg.data.heldout is None:
            raise ConfigError("data.heldout: found null, required a file to look at")
        from r1engine.verbs.look import look

        look(cfg, cfg.data.heldout if heldout and cfg.data.heldout else cfg.data.train_file, rows, Console())
    except (ValueError, RuntimeError, OSError) as error:
        fail(ConfigError.of(error))
