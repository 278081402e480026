"""Generation one step ahead with the embedded generator: overlap, staleness, accounts, and what a sample remembers."""

import threading
from collections import Counter

import pytest
import torch
from model_folders import save_model

from r1engine.batch import Completion, Prompt, RowShape, Sample, TokenOutputs, pack, to_sequences
from r1engine.config import RlConfig
from r1engine.data.question import Question
from r1engine.data.stream import MixedStream, PromptStream
from r1engine.grpo import objective
from r1engine.ranks import World
from r1engine.rollout import generate
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.rollout.rollouts import Rollouts

QUESTIONS, SIZE, LIMIT = 4, 3, 40
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


class Watched(LocalGenerator):
    """Tells that tokens have come."""

    def draw(self, drafts, sampling, *, on_tokens=None, **options):
        def note(number: int) -> None:
            if on_tokens is not None:
                on_tokens(number)
            self.came.set()

        super().draw(drafts, sampling, on_tokens=note, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, save_model(folder, "qwen2")


def config(staleness: int, oversample: float = 1.0, iterations: int = 12) -> RlConfig:
    return RlConfig(
        steps=iterations,
        rollout={"max_staleness": staleness, "oversample": oversample, "max_tokens": LIMIT},
        grpo={"questions": QUESTIONS, "group_size": SIZE, "minibatches": 1},
    )


def build(model, cfg: RlConfig) -> tuple[Watched, Rollouts]:
    generator = Watched(model[0], seed=3, slots=8, device=CPU, dtype=torch.float32)
    generator.came = threading.Event()
    generator.load_weights(model[1].state_dict().items())
    return generator, Rollouts(generator, stream(), cfg, ALONE)


def stream() -> MixedStream:
    prompts = [Prompt(i, [5 + i % 80, 6, 7], "", Question("")) for i in range(200)]
    return MixedStream(PromptStream(prompts, seed=1, digest=""))


def train(ahead: Rollouts, generator: Watched) -> None:
    """Stands for the updates: lasts until tokens of the next rollout have come."""
    generator.came.clear()
    unfinished = any(not d.finish for q in ahead.questions for d in q.drafts)
    with ahead.drawing():
        assert not unfinished or generator.came.wait(60.0), "nothing is drawn while the trainer works"


def scaled(module: torch.nn.Module, version: int) -> dict[str, torch.Tensor]:
    """Weights that differ from version to version."""
    return {name: tensor * (1 - 0.02 * version) for name, tensor in module.state_dict().items()}


def test_without_staleness_it_is_the_on_policy_rollout(model):
    generator, ahead = build(model, config(0))
    prompts = stream()
    for step in range(2):
        expected = generate(generator, prompts.next(QUESTIONS), num_samples=SIZE, step=step, max_tokens=LIMIT)
        assert ahead.take(step) == expected
        assert ahead.questions == []
        with ahead.drawing():
            pass
        assert ahead.metrics(expected)["staleness/max"] == 0


def test_the_next_rollout_is_drawn_inside_the_updates(model):
    generator, ahead = build(model, config(1))
    first = ahead.take(0)
    train(ahead, generator)  # fails unless tokens come before the block ends
    assert ahead.metrics(first)["tokens_ahead"] > 0
    assert any(draft.tokens for question in ahead.questions for draft in question.drafts)


@pytest.mark.parametrize(("staleness", "oversample"), [(1, 1.0), (2, 1.5), (2, 2.0), (3, 1.25)])
def test_no_token_is_staler_than_allowed_and_every_question_comes_once(model, staleness, oversample):
    cfg = config(staleness, oversample)
    generator, ahead = build(model, cfg)
    seen: Counter[int] = Counter()
    oldest = []
    for step in range(cfg.steps):
        completions = ahead.take(step)
        assert len(completions) == QUESTIONS * SIZE
        seen.update({c.prompt.id for c in completions})
        now = generator.weight_version
        assert all(now - staleness <= version <= now for c in completions for version, _ in c.versions)
        assert all(sum(n for _, n in c.versions) == len(c.tokens) == len(c.logp) for c in completions)
        counts = ahead.metrics(completions)
        oldest.append(counts["staleness/max"])
        dropped = counts.get("questions/dropped_end_of_run", 0)
        assert counts["questions/issued"] == counts["questions/consumed"] + counts["questions/carried"] + dropped
        train(ahead, generator)
        generator.load_weights(scaled(model[1], step + 1).items())
    assert set(seen.values()) == {1} and len(seen) == QUESTIONS * cfg.steps
    assert max(oldest) == min(staleness, 1 if oversample == 1 else 2)  # the bound is reached, so it was tested
    assert ahead.questions == [] and dropped == round(QUESTIONS * oversample) - QUESTIONS


def test_what_is_consumed_is_what_would_have_been_drawn_undisturbed(model):
    # With equal weights a sample depends on its address alone: interruptions and over-sampling choose nothing.
    cfg = config(2, 2.0, iterations=6)
    generator, ahead = build(model, cfg)
    addresses = {}
    consumed = []
    for step in range(cfg.steps):
        consumed += ahead.take(step)
        addresses |= {(d.prompt.id, d.sample): d.step for q in ahead.questions for d in q.drafts}
        train(ahead, generator)
        generator.load_weights(model[1].state_dict().items())
    crossed = [c for c in consumed if len(c.versions) > 1]
    assert len(crossed) > 5
    for c in crossed:
        step = addresses[c.prompt.id, c.sample]
        whole = generate(generator, [c.prompt], num_samples=SIZE, step=step, max_tokens=LIMIT)[c.sample]
        assert c.tokens == whole.tokens and c.truncated == whole.truncated
        assert torch.tensor(c.logp) == pytest.approx(torch.tensor(whole.logp), abs=1e-5)


@torch.no_grad()
def test_a_sample_that_crosses_versions_knows_which_weights_drew_each_token(model):
    generator, ahead = build(model, config(1))
    other = type(model[1])(model[1].config).eval()
    other.load_state_dict(scaled(model[1], 5))
    ahead.take(0)
    train(ahead, generator)
    generator.load_weights(other.state_dict().items())
    crossed = [c for c in ahead.take(1) if len(c.versions) == 2]
    assert crossed
    for c in crossed:
        (_, before), (_, after) = c.versions
        tokens = torch.tensor([c.prompt.tokens + c.tokens])
        start = len(c.prompt.tokens) - 1
        old, new = (
            m(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[start:, 0]
            for m in (model[1], other)
        )
        found = torch.tensor(c.logp)
        assert before + after == len(found)
        assert (found[:before] - old[:before]).abs().max() < 1e-5
        assert (found[before:] - new[before:]).abs().max() < 1e-5
        assert (found - old).abs().max() > 1e-3  # the two can be told apart


def test_a_checkpoint_holds_every_question_and_token(model, tmp_path):
    cfg = config(2, 2.0)
    generator, ahead = build(model, cfg)
    first = ahead.take(0)
    train(ahead, generator)
    generator.load_weights(scaled(model[1], 1).items())
    ahead.save(tmp_path)
    again = build(model, cfg)
    again[1]._prompts.restore(ahead._prompts.state())
    again[1].load(tmp_path)
    again[0].load_weights(scaled(model[1], 1).items())
    assert again[0].weight_version == generator.weight_version == 2
    assert again[1].questions == ahead.questions
    assert any(d.tokens and not d.finish for q in again[1].questions for d in q.drafts)
    second, third = again[1].take(1), again[1].take(2)
    ids = {tuple(sorted({c.prompt.id for c in part})) for part in (first, second, third)}
    assert len({i for part in ids for i in part}) == 3 * QUESTIONS
    assert again[1].metrics(third)["questions/consumed"] == 3 * QUESTIONS


def test_a_checkpoint_goes_on_with_another_number_of_ranks(model, tmp_path):
    cfg = config(2, 2.0)
    generator, ahead = build(model, cfg)
    first = ahead.take(0)
    ahead.save(tmp_path)
    shares = [Rollouts(generator, stream(), cfg, World(rank, 2, CPU)) for rank in range(2)]
    for share in shares:
        share.load(tmp_path)
    assert sorted(q.number for share in shares for q in share.questions) == [q.number for q in ahead.questions]
    assert [len(share.questions) for share in shares] == [QUESTIONS, QUESTIONS]
    counts = shares[0]._counts + shares[1]._counts
    assert counts == +ahead._counts and counts["consumed"] == len({c.prompt.id for c in first})
    for share in shares:
        share._check_accounts({-1 - i for i in range(QUESTIONS // 2)}, QUESTIONS // 2)


def test_what_is_too_stale_after_the_bound_was_lowered_is_dropped_and_replaced(model, tmp_path):
    generator, ahead = build(model, config(2, 2.0))
    ahead.take(0)
    train(ahead, generator)
    for version in (1, 2):
        generator.load_weights(scaled(model[1], version).items())
    ahead.save(tmp_path)
    begun = sum(question.oldest is not None for question in ahead.questions)
    generator, ahead = build(model, config(1))
    ahead.load(tmp_path)
    generator.load_weights(scaled(model[1], 2).items())
    completions = ahead.take(1)
    assert all(version == 3 for c in completions for version, _ in c.versions)
    counts = ahead.metrics(completions)
    assert begun > 0 and counts["questions/dropped_stale"] == begun
    assert counts["questions/issued"] == counts["questions/consumed"] + counts["questions/carried"] + begun


def test_a_question_that_got_lost_stops_the_run(model):
    _, ahead = build(model, config(1))
    ahead.take(0)
    ahead.questions.pop()
    with pytest.raises(RuntimeError, match="questions were lost or doubled"):
        ahead.take(1)


def test_a_token_that_is_too_stale_stops_the_run(model):
    generator, ahead = build(model, config(1))
    ahead.take(0)
    train(ahead, generator)
    ahead._drop_stale = lambda: None  # break the code that keeps the bound
    for version in (1, 2):
        generator.load_weights(scaled(model[1], version).items())
    with pytest.raises(RuntimeError, match=r"has tokens of weights 1, required is at least 2 \(rollout.max_staleness"):
        ahead.take(1)


def test_a_stale_token_has_its_ratio_against_the_policy_that_drew_it():
    cfg = RlConfig(grpo={"clip_eps": 10.0, "kl_coef": 0.0}).grpo
    completion = Completion(
        Prompt(0, [5], "", Question("")), 0, [6, 7], [-1.0, -2.0], "", False, versions=((3, 1), (4, 1))
    )
    ((row,),) = pack(to_sequences([Sample(completion, 1.0)], version=4), RowShape(max_tokens=8))
    assert row.stale.tolist() == [False, True, False]
    logp = torch.tensor([0.0, -0.5, -1.5], requires_grad=True)
    loss, metrics = objective(TokenOutputs(logp, torch.zeros(3)), row, cfg)
    # The first token: exp(-0.5 + 1) under the behaviour policy. The second is the present policy's own: ratio 1.
    assert metrics["ratio"] == pytest.approx(0.5 * torch.tensor(0.5).exp().item() + 0.5)
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([0.0, -0.5 * torch.tensor(0.5).exp().item(), -0.5])
    ((fresh,),) = pack(to_sequences([Sample(completion, 1.0)]), RowShape(max_tokens=8))
    assert fresh.stale is None
