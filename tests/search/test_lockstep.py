"""Many searches in one: each as it would be alone, everything counted, values and verdicts where they belong."""

from pathlib import Path

import pytest
import torch
from model_folders import save_model, save_scored

from r1engine.batch import Prompt
from r1engine.config import StepScorerSection
from r1engine.config.search import Search
from r1engine.data.question import Question
from r1engine.hf.folder import weights_of
from r1engine.hf.tokenizer import load_tokenizer, stop_tokens
from r1engine.rewards import Scorer, ScorerSettings
from r1engine.rollout import Sampling
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.sampling.searching import row_of
from r1engine.search.asks import Expand
from r1engine.search.lockstep import Crew, DrawLimits, Lockstep
from r1engine.search.scorer import open_scorer
from r1engine.search.steps import StepMarks
from r1engine.search.tree import StepPath, Tree
from r1kernels import cpu_lib

MANY = [Prompt(i, [2 + i % 5, 7, 11 + i % 3], "", Question("q", "1", reward="math")) for i in range(51)]
PROMPTS = MANY[:9]
STOP = frozenset({1})


class LastDigits:
    """Values a step by its last token but the stop token: a scorer outside of the engine, whose values are known."""

    labels, tokens_run = "value", 0

    def score(self, paths: list[StepPath]) -> list[list[float]]:
        return [[self.of(step) for step in path.steps[path.scored :]] for path in paths]

    def clear(self) -> None:
        pass

    @staticmethod
    def of(step: tuple[int, ...]) -> float:
        return ([token for token in step if token != 1] or [0])[-1] % 17 / 17


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("model")
    save_model(folder, "qwen2")
    generator = LocalGenerator(folder, seed=3, slots=16, device=torch.device("cpu"), dtype=torch.float32)
    generator.load_weights(weights_of(folder))
    marks = StepMarks(load_tokenizer(folder), ["3", "7"])
    with Scorer(ScorerSettings(workers=1)) as grader:
        yield Crew(generator, LastDigits(), grader, marks, STOP)


def run(crew: Crew, prompts: list[Prompt], *, cache: int = 0, **keys) -> dict[int, Tree]:
    crew.generator.keep_steps(cache)
    cfg = Search.model_validate({"max_steps": 4} | keys)
    lockstep = Lockstep(crew, cfg, DrawLimits(Sampling(), max_tokens=30), "last", seed=0)
    return {tree.prompt.id: tree for tree in lockstep.run(prompts)}


SETTINGS = [
    {"method": "best_of", "n": 4},
    {"method": "beam", "n": 4, "width": 2},
    {"method": "dvts", "n": 4, "width": 2, "lookahead": 1},
    {"method": "mcts", "width": 3, "simulations": 16},
]


@pytest.mark.parametrize("keys", SETTINGS, ids=lambda keys: keys["method"])
def test_a_search_alone_is_the_same_search_in_company_whatever_is_kept(crew, keys):
    together = run(crew, PROMPTS[:6], cache=2**20, questions_at_once=4, **keys)
    assert sorted(together) == list(range(6))
    for number in (0, 4):
        (alone,) = run(crew, [PROMPTS[number]], **keys).values()
        assert list(alone.rows()) == list(together[number].rows())
        assert alone.spent == together[number].spent


@pytest.mark.skipif(cpu_lib.library_path() is None, reason="_cpu.so is not built: values are equal up to rounding")
def test_a_search_alone_is_in_every_bit_the_same_search_among_fifty_others(crew, tmp_path):
    save_scored(tmp_path, "qwen3")
    scorer = open_scorer(StepScorerSection(path=tmp_path), torch.device("cpu"), load_tokenizer(tmp_path))
    valued = Crew(crew.generator, scorer, crew.grader, crew.marks, crew.stop)
    keys = {"method": "mcts", "width": 2, "simulations": 6}
    together = run(valued, MANY, cache=2**20, **keys)
    assert len(together) == 51 and len({node.value for tree in together.values() for node in tree.nodes}) > 200
    for number in (0, 17, 50):
        scorer.clear()
        (alone,) = run(valued, [MANY[number]], **keys).values()
        assert list(alone.rows()) == list(together[number].rows())
        assert alone.spent == together[number].spent


@pytest.mark.parametrize("keys", SETTINGS, ids=lambda keys: keys["method"])
def test_values_are_the_scorers_and_every_drawn_token_is_counted(crew, keys, monkeypatch):
    counted = []
    draw = crew.generator.draw
    monkeypatch.setattr(
        crew.generator, "draw", lambda drafts, *a, **k: (draw(drafts, *a, **k), counted.extend(drafts))[0]
    )
    trees = run(crew, PROMPTS[:3], cache=2**20, **keys)
    assert sum(tree.spent.drawn for tree in trees.values()) == sum(len(draft.tokens) for draft in counted)
    assert any(tree.ended() for tree in trees.values())
    for tree in trees.values():
        for node in tree.nodes[1:]:
            if node.steps:
                assert node.scores == tuple(map(LastDigits.of, node.steps))
                assert len(tree.tokens(node)) == node.length <= 30
                assert node.depth <= 4 or keys["method"] == "best_of"
        assert all(node.verdict is not None for node in tree.ended())
        assert all(node.answer is None for node in tree.ended() if node.finish == "length")


def test_with_kept_steps_no_token_runs_twice(crew):
    keys = {"method": "beam", "n": 8, "width": 4}

    def tokens_run(cache: int) -> tuple[int, int]:
        before = crew.generator.tokens_run
        trees = run(crew, PROMPTS, cache=cache, **keys)
        return crew.generator.tokens_run - before, sum(tree.spent.drawn for tree in trees.values())

    kept, drawn = tokens_run(2**24)
    again, same = tokens_run(0)
    assert drawn == same
    assert kept <= drawn + sum(len(prompt.tokens) for prompt in PROMPTS) < again
    assert crew.generator.kept_bytes()[0] == 0  # a search that has ended leaves nothing


def test_a_whole_completion_is_cut_into_the_steps_that_a_step_by_step_draw_has(crew):
    (tree,) = run(crew, [PROMPTS[1]], method="best_of", n=6).values()
    for node in tree.ended():
        tokens = tree.tokens(node)
        ends = crew.marks.ends(tokens, STOP)
        assert [len(step) for step in node.steps[:-1]] == [b - a for a, b in zip([0, *ends], ends[:-1], strict=False)]
        assert node.depth == max(1, len(ends))


def test_a_budget_ends_a_search_after_its_round(crew):
    (tree,) = run(crew, [PROMPTS[0]], method="mcts", width=4, simulations=50, budget_tokens=20).values()
    assert tree.is_cut and tree.spent.drawn >= 20
    (whole,) = run(crew, [PROMPTS[0]], method="mcts", width=4, simulations=50).values()
    assert not whole.is_cut and whole.spent.drawn > tree.spent.drawn


def test_without_a_scorer_every_step_counts_the_same(crew):
    bare = Crew(crew.generator, None, crew.grader, crew.marks, crew.stop)
    (tree,) = run(bare, [PROMPTS[0]], method="best_of", n=3).values()
    assert {node.value for node in tree.ended()} == {1.0}


def test_the_search_of_the_docs_runs(crew, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    save_model(tmp_path, "qwen2")
    names = {
        "Expand": Expand,
        "Crew": Crew,
        "StepMarks": StepMarks,
        "stop_tokens": stop_tokens,
        "DrawLimits": DrawLimits,
    }
    names |= {"Sampling": Sampling, "Lockstep": Lockstep, "Search": Search, "row_of": row_of}
    given = {"generator": crew.generator, "scorer": crew.scorer, "grader": crew.grader, "folder": tmp_path}
    given |= {"tokenizer": load_tokenizer(tmp_path), "prompts": PROMPTS[:1]}
    exec(code.replace("max_tokens=512", "max_tokens=30").replace('";"', '"3"'), found := names | given)
    assert found["row"]["drawn"] > 0 and found["row"]["nodes"] and found["tree"].root.drawn == 4
