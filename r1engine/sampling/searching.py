"""The stage `search`: each question is searched, its tree is written when it is done, and a table compares methods.

What is written is kept: a killed stage searches the questions that lack, and its file is the same in the end, but for
the last digits of values: how many are computed at once decides how they are rounded.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from r1engine import config
from r1engine.config.search import Search
from r1engine.config.searching import DIFFICULTY, SearchConfig
from r1engine.data.prompts import PromptTable
from r1engine.evaluation.own_questions import same_answer
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens
from r1engine.observe.failure import RunFailed
from r1engine.observe.progress import Progress
from r1engine.observe.put import put_json, put_text
from r1engine.ranks import World
from r1engine.rollout import Sampling
from r1engine.sampling.drawing import AnswerSampler, open_sampler
from r1engine.sampling.envelope import envelope_of, envelope_text
from r1engine.sampling.search_page import write_page
from r1engine.sampling.search_rows import FILE, Row, SearchFiles, markdown, table_of
from r1engine.sampling.whole_lines import whole_lines
from r1engine.search.asks import candidates
from r1engine.search.lockstep import Crew, DrawLimits, Lockstep, StepScorer
from r1engine.search.scored_folder import read_scored_folder
from r1engine.search.scorer import open_scorer
from r1engine.search.steps import StepMarks
from r1engine.search.tree import Tree
from r1engine.search.vote import Aggregate, Choice, choose

LOOKED_AT = 64  # completions that must have a mark between them
OF_LABELS: dict[str, Aggregate] = {"correctness": "min", "value": "last"}
CHOICES: tuple[Choice, ...] = ("vote", "best", "majority")


def search(cfg: SearchConfig, world: World, digests: dict[str, str]) -> Row:
    """Search what is missing, and write the table and the page. Collective.

    Args:
        cfg:     of the stage.
        world:   the ranks share the questions.
        digests: key of `cfg.inputs()` -> SHA-256.

    Returns:
        Accuracy and tokens of each search.

    Raises:
        ValueError: the model, the scorer or the questions do not fit the configuration.
        RunFailed:  a server does not answer; what is done so far is kept.
    """
    files = SearchFiles(cfg.run_dir, _identity(cfg, digests))
    world.from_first(files.check)
    cfg = _with_budget(cfg, world)
    if world.is_first:
        config.dump(cfg, cfg.run_dir / "config.yaml")
    with (
        Progress(cfg.run_dir.name, enabled=world.is_first) as progress,
        open_sampler(cfg.as_run(), cfg.rewards, world, progress) as sampler,
    ):
        crew, how = _crew(cfg, world, sampler)
        if note := _other_steps(cfg):
            progress.note(note)
        with sampler.generator.awake():
            if cfg.rollout.engine == "local":
                _check_room(cfg, sampler)
                sampler.generator.keep_steps(int(cfg.search.cache_gib * 2**30))
            for name, one in cfg.searches().items():
                _search_all(cfg, world, files, crew, sampler.prompts, (name, one, how), progress)
                world.wait()
        found = world.from_first(partial(_conclude, cfg, files))
        for note in found.pop("notes"):
            progress.note(note)
    return found


def _crew(cfg: SearchConfig, world: World, sampler: AnswerSampler) -> tuple[Crew, Aggregate]:
    """Who draws, scores and grades, and what the scores become.

    Raises:
        ValueError: the scorer does not fit the configuration.
        RunFailed:  its server does not answer.
    """
    folder = sampler.cfg.model.folder
    tokenizer = load_tokenizer(folder)
    try:
        scorer = open_scorer(cfg.scorer, world.device, tokenizer) if cfg.scorer is not None else None
    except RuntimeError as error:
        raise RunFailed(f"{cfg.run_dir}: {error}; the same command goes on when it is back") from error
    marks, stop = StepMarks(tokenizer, cfg.steps.marks, cfg.steps.max_step_tokens), stop_tokens(folder, tokenizer)
    return Crew(sampler.generator, scorer, sampler.scorer, marks, stop), aggregate_of(cfg, scorer)


def _other_steps(cfg: SearchConfig) -> str:
    """What to say where the scorer has learned steps that end at other marks, "" for nothing."""
    about = read_scored_folder(cfg.scorer.path) if cfg.scorer is not None else None
    if about is None or {*about.marks} == {*cfg.steps.marks}:
        return ""
    assert cfg.scorer is not None
    learned = ", ".join(map(repr, about.marks))
    return (
        f"{_marks(cfg)}, and {cfg.scorer.path} has learned steps that end at {learned}: its scores are read elsewhere"
    )


def _with_budget(cfg: SearchConfig, world: World) -> SearchConfig:
    """The configuration with the budget that `search.tokens_of` gives."""
    if cfg.search.tokens_of is None:
        return cfg
    budget = world.from_first(partial(drawn_by, cfg.search.tokens_of))
    return cfg.model_copy(update={"search": cfg.search.model_copy(update={"budget_tokens": budget})})


def drawn_by(path: Path) -> int:
    """Tokens that a search drew for a question, in the mean.

    Raises:
        ValueError: the file is none of one search.
    """
    rows = [row for row in whole_lines(path) if row.get("search") != DIFFICULTY]
    names = {row.get("search") for row in rows}
    if len(names) != 1 or None in names:
        found = ", ".join(sorted(map(str, names))) or "no line"
        raise ValueError(f"search.tokens_of: found {found} in {path}, required the {FILE} of one search")
    return max(1, round(fmean(row["drawn"] for row in rows)))


def aggregate_of(cfg: SearchConfig, scorer: StepScorer | None) -> Aggregate:
    """What the scores of a path's steps become.

    Raises:
        ValueError: it is to follow from what the scorer's labels mean, and the scorer does not say.
    """
    how = cfg.search.aggregate
    if how != "auto":
        return how
    if scorer is None:
        return "min"
    if scorer.labels not in OF_LABELS:
        assert cfg.scorer is not None
        raise ValueError(
            f"scorer: aggregate auto, and {cfg.scorer.path} does not say what its labels mean; "
            "required search.aggregate: last (value) or min (correctness)"
        )
    return OF_LABELS[scorer.labels]


def _check_room(cfg: SearchConfig, sampler: AnswerSampler) -> None:
    """That the longest path fits into what is kept.

    Raises:
        ValueError: it does not.
    """
    from r1engine.rollout.local.generator import LocalGenerator

    assert isinstance(sampler.generator, LocalGenerator)
    tokens = cfg.max_prompt_tokens + cfg.rollout.max_tokens_at(0)
    needed, found = sampler.generator.bytes_of(tokens) / 2**30, cfg.search.cache_gib
    if 0 < found < needed:
        raise ValueError(f"search.cache_gib: one path of {tokens:,} tokens needs {needed:.2g} GiB, found {found:g}")


def _search_all(
    cfg: SearchConfig,
    world: World,
    files: SearchFiles,
    crew: Crew,
    questions: PromptTable,
    what: tuple[str, Search, Aggregate],
    progress: Progress,
) -> None:
    """One search of every question that lacks it."""
    name, settings, how = what
    done = world.from_first(lambda: files.done(name))
    prompts = [prompt for prompt in questions if prompt.id not in done]
    limits = _limits(cfg)
    if name == DIFFICULTY:  # samples that no search has, of which nothing is valued
        crew, limits = replace(crew, scorer=None), replace(limits, step=1)
    lockstep = Lockstep(crew, settings, limits, how, cfg.seed)
    progress.phase(name)
    progress.start(len(done), len(done) + len(prompts))
    begun, marked, counters = time.monotonic(), 0, _Counters(crew)
    with files.part(name, world.rank) as part:
        try:
            if crew.scorer is not None:
                crew.scorer.clear()
            world.wait()  # a server forgets nothing while another rank asks it
            for number, tree in enumerate(lockstep.run(prompts[world.rank :: world.size], progress.advance), start=1):
                part.write(row_of(name, settings, tree))
                counters.note(files, name, world.rank)
                marked += any(len(node.steps) > 1 or node.depth > 1 for node in tree.nodes)
                if number == LOOKED_AT and not marked and settings.max_steps > 1:
                    required = f"required a mark that occurs in completions (0 of {LOOKED_AT} first questions have one)"
                    raise ValueError(f"{_marks(cfg)}, {required}")
                progress.step(len(done) + number, {"drawn": float(tree.spent.drawn)})
            if prompts and not any(world.everyones(marked)) and settings.max_steps > 1:
                progress.note(f"{_marks(cfg)}, which no completion of {len(prompts)} questions has")
        except RuntimeError as error:
            raise RunFailed(f"{cfg.run_dir}: {error}; what is done is kept, and the same command goes on") from error
    progress.note(f"  {name}: {len(prompts)} questions in {time.monotonic() - begun:.1f} s")


def _marks(cfg: SearchConfig) -> str:
    return f"steps.marks: found {', '.join(map(repr, cfg.steps.marks))}"


def _limits(cfg: SearchConfig) -> DrawLimits:
    rollout = cfg.rollout
    return DrawLimits(Sampling(rollout.temperature, rollout.top_p, rollout.top_k), rollout.max_tokens_at(0))


class _Counters:
    """What the models have run since the last note of it."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._run, self._scored, self._time = self._now()

    def _now(self) -> tuple[int | None, int | None, float]:
        scored = self._crew.scorer.tokens_run if self._crew.scorer is not None else 0
        return self._crew.generator.tokens_run, scored, time.monotonic()

    def note(self, files: SearchFiles, name: str, rank: int) -> None:
        """Write it down, and count from now on."""
        run, scored, at = self._now()
        policy = run - self._run if run is not None and self._run is not None else None
        scorer = scored - self._scored if scored is not None and self._scored is not None else None
        files.spent(name, rank, {"policy": policy, "scorer": scorer, "seconds": at - self._time})
        self._run, self._scored, self._time = run, scored, at


def row_of(name: str, settings: Search, tree: Tree) -> Row:
    """A searched question as a line of search.jsonl."""
    question = tree.prompt.question
    found = candidates(tree)
    chosen = {how: choose([one for _, one in found], how, partial(same_answer, question)) for how in CHOICES}
    winner = chosen[settings.choose]
    return {
        "search": name,
        "id": tree.prompt.id,
        "question": question.text,
        "reference": question.answer,
        "answer": found[winner][0].answer if winner is not None else None,
        "node": found[winner][0].number if winner is not None else None,
        "verdict": found[winner][0].verdict if winner is not None else "wrong",
        "verdicts": {how: found[i][0].verdict if i is not None else "wrong" for how, i in chosen.items()},
        "right": sum(node.samples for node, _ in found if node.verdict == "right"),
        "decided": sum(node.samples for node, _ in found if node.verdict != "undecided"),
        "ended": sum(node.samples for node, _ in found),
        "drawn": tree.spent.drawn,
        "rounds": tree.spent.rounds,
        "cut": tree.is_cut,
        "nodes": list(tree.rows()),
    }


def _conclude(cfg: SearchConfig, files: SearchFiles) -> Row:
    """Whole files, the table and the page; returns what the stage has to tell."""
    rows = files.merge([*cfg.searches()])
    table = table_of(rows, files.totals(), [name for name in cfg.searches() if name != DIFFICULTY])
    table["envelope"] = envelope_of(rows, table)
    put_json(cfg.run_dir / "summary.json", table)
    text = f"{markdown(table)}{envelope_text(table['envelope'])}"
    put_text(cfg.run_dir / "table.md", text)
    assert cfg.model.path is not None
    write_page(cfg, rows, table, load_tokenizer(cfg.model.path))
    notes = [*text.splitlines(), f"page: {cfg.run_dir / 'report.html'}"]
    for name, found in table["searches"].items():
        if found["without_answer"]:
            limit = f"(max_steps {cfg.search.max_steps}, max_tokens {cfg.rollout.max_tokens_at(0)})"
            count = f"{found['without_answer']} of {found['questions']}"
            notes.append(f"search {name}: {count} searches ended without an answer {limit}")
        if found["undecided"]:
            count = f"{found['undecided']} of {found['questions']}"
            notes.append(f"search {name}: {count} answers are undecided, and in no accuracy")
    told = {f"accuracy {name}": found["accuracy"] for name, found in table["searches"].items()}
    return told | {f"drawn {name}": found["drawn"] for name, found in table["searches"].items()} | {"notes": notes}


def _identity(cfg: SearchConfig, digests: dict[str, str]) -> dict[str, Any]:
    """What the searches depend on."""
    settings = json.loads(json.dumps(cfg.model_dump(mode="json")))
    kept = {key: settings[key] for key in ("seed", "template", "system", "max_prompt_tokens", "steps", "compare")}
    search_keys = {k: v for k, v in settings["search"].items() if k not in ("questions_at_once", "cache_gib")}
    drawing = {key: settings["rollout"][key] for key in ("engine", "temperature", "top_p", "top_k", "max_tokens")}
    return {"digests": digests, **kept, "search": search_keys, "rollout": drawing}
