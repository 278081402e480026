"""Steps of the embedded generator: where a draw ends, and that keys and values that were kept change no token."""

import weakref
from dataclasses import replace

import pytest
import torch
from model_folders import save_model
from paged_generator import local_generator
from tokenizers import Tokenizer, models

from r1engine.batch import Prompt
from r1engine.data.question import Question
from r1engine.hf.folder import weights_of
from r1engine.hf.tokenizer import PromptTokenizer, load_tokenizer
from r1engine.rollout import Sampling
from r1engine.rollout.draft import Draft, end_at_step
from r1engine.rollout.local import pages
from r1engine.rollout.local.cache import KVCache, bytes_of
from r1engine.rollout.local.decoder import Prefill
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.rollout.local.kv_store import KVStore
from r1engine.search.steps import StepMarks
from r1kernels import cpu_lib

QUESTIONS = [Prompt(0, [5, 6, 7, 8], "", Question("")), Prompt(3, [9, 10], "", Question(""))]
MARKS = ["3"]  # of the words w3, w13, w23, ...


def grow(generator: LocalGenerator, marks: StepMarks, *, keeps: bool) -> dict[tuple, Draft]:
    """A tree of three levels: three draws of each question, then three from each of two of its steps, and again."""
    live = [(prompt, (-1,)) for prompt in QUESTIONS]
    found = {}
    for level in range(3):
        drafts = []
        for number, (prompt, origins) in enumerate(live):
            for child in range(3):
                stream = 1000 * level + 10 * number + child
                drafts.append(Draft(prompt, child, 0, stream, 12, origins=origins if keeps else ()))
        with_origins = [origins for _, origins in live for _ in range(3)]
        generator.draw(drafts, Sampling(), stop_after=marks)
        found |= {(draft.prompt.id, draft.stream): draft for draft in drafts}
        live = []
        for question in QUESTIONS:
            goes_on = [
                (draft, origins)
                for draft, origins in zip(drafts, with_origins, strict=True)
                if draft.prompt.id == question.id and draft.finish != "stop"
            ]
            for draft, origins in goes_on[:2]:
                prompt = replace(draft.prompt, tokens=draft.prompt.tokens + draft.tokens)
                live.append((prompt, (*origins, draft.stream)))
    return found


def num_tokens(drafts: dict[tuple, Draft]) -> int:
    return sum(len(draft.tokens) for draft in drafts.values())


@pytest.mark.parametrize(
    ("name", "num_pages"),
    [
        ("qwen2", None),
        ("qwen2", 9),  # of 16 tokens: two of the longest drafts
        *(pytest.param(name, None, marks=pytest.mark.rotating) for name in ("qwen3", "llama", "deepseek", "qwen3-moe")),
        pytest.param("deepseek", 9, marks=pytest.mark.rotating),
    ],
)
def test_kept_steps_change_no_token_and_nothing_runs_twice(tmp_path, monkeypatch, name, num_pages):
    monkeypatch.setattr(pages, "PAGE_TOKENS", 16)
    save_model(tmp_path, name)
    marks = StepMarks(load_tokenizer(tmp_path), MARKS)
    plain = local_generator(tmp_path)
    expected = grow(plain, marks, keeps=False)
    assert {draft.finish for draft in expected.values()} >= {"step"}
    generator = local_generator(tmp_path, num_pages=num_pages)
    budgets = {"all": 10**9, "few": generator.bytes_of(40), "none": 1}
    run = {}
    for budget, size in budgets.items():
        generator.keep_steps(size)
        before = generator.tokens_run
        found = grow(generator, marks, keeps=True)
        run[budget] = generator.tokens_run - before
        assert {key: draft.tokens for key, draft in found.items()} == {k: d.tokens for k, d in expected.items()}
        is_exact = generator._decoder._is_compiled and num_pages is None
        for key, draft in found.items():
            assert draft.logp == (expected[key].logp if is_exact else pytest.approx(expected[key].logp, abs=2e-5))
        assert generator.kept_bytes()[1] <= size
    prompts = sum(len(prompt.tokens) for prompt in QUESTIONS)
    assert run["all"] <= prompts + num_tokens(expected) < plain.tokens_run
    assert run["all"] < run["few"] <= run["none"]


@pytest.mark.parametrize("name", ["qwen2", "deepseek"])  # compiled, and with a mask of what a row has
def test_a_draw_does_not_see_what_the_draw_before_left_in_the_cache(tmp_path, name):
    save_model(tmp_path, name)

    def drawn(generator: LocalGenerator) -> list[Draft]:
        drafts = [Draft(QUESTIONS[i % 2], i, 0, i, 6 + i) for i in range(7)]  # more than slots
        generator.draw(drafts, Sampling())
        return drafts

    expected, generator = drawn(local_generator(tmp_path)), local_generator(tmp_path)
    longer = [Draft(Prompt(1, [11] * 9, "", Question("")), i, 0, i, 20) for i in range(5)]
    generator.draw(longer, Sampling())
    assert [(one.tokens, one.logp) for one in drawn(generator)] == [(one.tokens, one.logp) for one in expected]


def test_what_is_kept_is_forgotten_with_its_question_its_weights_and_its_sleep(tmp_path):
    save_model(tmp_path, "qwen2")
    generator = local_generator(tmp_path)
    marks = StepMarks(load_tokenizer(tmp_path), MARKS)
    generator.keep_steps(10**9)
    with generator.awake():
        grow(generator, marks, keeps=True)
        whole = generator.kept_bytes()[0]
        generator.forget(0)
        assert 0 < generator.kept_bytes()[0] < whole
        generator.forget(3)
        assert generator.kept_bytes()[0] == 0
        grow(generator, marks, keeps=True)
        generator.load_weights(weights_of(tmp_path))
        assert generator.kept_bytes()[0] == 0
        grow(generator, marks, keeps=True)
    assert generator.kept_bytes()[0] == 0


def test_a_step_ends_where_the_whole_completion_has_its_first_mark(tmp_path):
    save_model(tmp_path, "qwen2")
    generator, tokenizer = local_generator(tmp_path), load_tokenizer(tmp_path)
    for texts in (MARKS, ["4 w"]):  # the second is never one token
        marks = StepMarks(tokenizer, texts)
        whole = [Draft(QUESTIONS[0], i, 0, i, 40) for i in range(8)]
        steps = [Draft(QUESTIONS[0], i, 0, i, 40) for i in range(8)]
        generator.draw(whole, Sampling())
        generator.draw(steps, Sampling(), stop_after=marks)
        assert "step" in {draft.finish for draft in steps}
        for one, step in zip(whole, steps, strict=True):
            end = marks.ends(one.tokens, frozenset({1}))[0] if one.tokens[0] != 1 else 0
            expected = end if step.finish == "step" else len(one.tokens)
            assert step.tokens == one.tokens[:expected]
            assert (step.finish == "step") == marks.is_end(step.tokens)


def test_an_interrupted_draw_lets_go_of_what_waits(tmp_path):
    save_model(tmp_path, "qwen2")
    generator, marks = local_generator(tmp_path), StepMarks(load_tokenizer(tmp_path), MARKS)
    generator.keep_steps(10**9)
    found = grow(generator, marks, keeps=True)
    step = next(d for d in found.values() if d.finish == "step" and d.origins == (-1,))
    prompt = replace(step.prompt, tokens=step.prompt.tokens + step.tokens)
    drafts = [Draft(prompt, i, 0, 10**4 + i, 12, origins=(-1, step.stream)) for i in range(9)]
    generator.draw(drafts, Sampling(), stop_after=marks, should_stop=lambda: True)
    assert not generator._store._pinned
    generator.draw(drafts, Sampling(), stop_after=marks)
    assert all(draft.finish for draft in drafts)


@pytest.mark.parametrize("num_pages", [None, 30])
def test_what_is_kept_of_an_interrupted_draft_is_its_own(tmp_path, monkeypatch, num_pages):
    # New weights drop what is kept, the question's too; then the drafts go on, each from its own tokens.
    monkeypatch.setattr(pages, "PAGE_TOKENS", 16)
    save_model(tmp_path, "qwen2")
    marks = StepMarks(load_tokenizer(tmp_path), MARKS)

    def drawn(size: int) -> list[Draft]:
        generator, steps = local_generator(tmp_path, num_pages=num_pages), iter(range(1000))
        generator.keep_steps(size)
        drafts = [Draft(QUESTIONS[0], i, 0, i, 40, origins=(-1,)) for i in range(5)]
        generator.draw(drafts, Sampling(), stop_after=marks, should_stop=lambda: next(steps) == 2)
        assert sum(bool(draft.tokens and not draft.finish) for draft in drafts) > 1
        generator.load_weights(weights_of(tmp_path))
        generator.draw(drafts, Sampling(), stop_after=marks)
        children = []
        for draft in drafts:
            prompt = replace(draft.prompt, tokens=draft.prompt.tokens + draft.tokens)
            streams, origins = range(100 + 10 * draft.stream, 103 + 10 * draft.stream), (-1, draft.stream)
            children += [Draft(prompt, i, 0, stream, 12, origins=origins) for i, stream in enumerate(streams)]
        generator.draw(children, Sampling(), stop_after=marks)
        return drafts + children

    is_exact = cpu_lib.library_path() is not None and num_pages is None
    for found, wanted in zip(drawn(10**9), drawn(0), strict=True):
        assert found.tokens == wanted.tokens
        assert found.logp == (wanted.logp if is_exact else pytest.approx(wanted.logp, abs=2e-5))


def test_prefixes_are_gone_when_what_is_kept_goes_into_rows(tmp_path):
    # A GPU has room for one of them.
    save_model(tmp_path, "qwen2")
    generator, prefixes, alive = local_generator(tmp_path, slots=1), [], []
    prefill = generator._decoder.prefill

    def watched(prompts: list[list[int]]) -> Prefill:
        found = prefill(prompts)
        prefixes.append(weakref.ref(found))
        return found

    generator._decoder.prefill = watched
    generator.keep_steps(10**9)
    generator.draw([Draft(QUESTIONS[0], 0, 0, 0, 3, origins=(-1,))], Sampling())
    drafts = [Draft(prompt, 0, 0, 1, 3, origins=(-1,)) for prompt in QUESTIONS]  # the first starts from what is kept
    generator.draw(drafts, Sampling(), on_ended=lambda _: alive.append(prefixes[-1]() is not None))
    assert len(prefixes) == 2 and alive == [True, False]


def test_the_oldest_steps_go_first_and_never_one_that_others_follow():
    cache = KVCache.__new__(KVCache)
    cache.layers = [torch.zeros(2, 1, 1, 64, 2)]
    size = bytes_of(cache, 1)
    store = KVStore(4 * size)

    def keep(stream: int, *origins: int) -> None:
        prompt = Prompt(0, list(range(1 + len(origins))), "", Question(""))
        stop = 1 if stream == -1 else len(origins) + 1
        store.keep(Draft(prompt, 0, 0, 0, 9, origins=origins), stream, cache, 0, stop)

    def kept() -> set[int]:
        return {step for _, step in store._segments}

    keep(-1, -1)
    assert kept() == {-1} and store.num_bytes == size
    for stream in (1, 2, 3):
        keep(stream, -1, *([] if stream < 3 else [1]))
    assert kept() == {-1, 1, 2, 3}
    keep(4, -1, 1)  # room for one: 2 is the oldest that nothing follows
    assert kept() == {-1, 1, 3, 4}
    keep(5, -1, 1, 4)
    assert kept() == {-1, 1, 4, 5}
    assert store.peak_bytes == store.num_bytes == 4 * size


def test_what_a_server_draws_is_cut_behind_the_first_step():
    words = {f"w{i}": i for i in range(60)}
    tokenizer = PromptTokenizer(Tokenizer(models.WordLevel(words, unk_token="w0")))

    def ended(tokens: list[int], finish: str, texts: list[str]) -> tuple:
        draft = Draft(QUESTIONS[0], 0, 0, 0, 9, list(tokens), [0.0] * len(tokens), [(1, len(tokens))], finish)
        end_at_step(draft, StepMarks(tokenizer, texts), frozenset({1}))
        assert len(draft.logp) == len(draft.tokens) == draft.versions[0][1]
        return draft.tokens, draft.finish, draft.cut

    assert ended([4, 13], "stop", ["13"]) == ([4, 13], "step", 0)
    assert ended([4, 5, 1], "stop", ["13"]) == ([4, 5, 1], "stop", 0)
    assert ended([4, 5], "length", ["13"]) == ([4, 5], "length", 0)
    assert ended([1], "stop", ["13"]) == ([1], "stop", 0)
    assert ended([4, 5, 6, 7, 1], "stop", ["5 w6"]) == ([4, 5, 6], "step", 2)
    assert ended([4, 5, 6, 7], "length", ["5 w6"]) == ([4, 5, 6], "step", 1)
    assert ended([4, 13], "stop", ["99"]) == ([4, 13], "", 0)  # the server's token ends no step: it goes on
