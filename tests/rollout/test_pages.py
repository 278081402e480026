"""Keys and values in pages: what is in them, who has them, and that they change no token, however few there are."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_folders import save_model
from paged_generator import local_generator

from r1engine.batch import Prompt
from r1engine.data.question import Question
from r1engine.hf.architecture import read_architecture
from r1engine.hf.kv_shape import kv_bytes
from r1engine.rollout import Sampling
from r1engine.rollout.draft import Draft
from r1engine.rollout.local import memory, pages
from r1engine.rollout.local.cache import KVCache
from r1engine.rollout.local.pages import PagedCache
from r1kernels import paged_attention

CPU = torch.device("cpu")
PAGE = 16


@pytest.fixture(autouse=True)
def short_pages(monkeypatch):
    for module in (pages, memory):
        monkeypatch.setattr(module, "PAGE_TOKENS", PAGE)


def groups(max_tokens: int = 60) -> list[Draft]:
    """Four samples of each of three prompts, shorter and longer than pages."""
    prompts = [Prompt(i, [2 + (7 * i + j) % 90 for j in range(n)], "", Question("")) for i, n in enumerate((3, 16, 37))]
    return [Draft(prompt, i, 0, i, max_tokens) for prompt in prompts for i in range(4)]


@pytest.mark.parametrize(
    "name",
    ["qwen2", "deepseek", *(pytest.param(name, marks=pytest.mark.rotating) for name in ("qwen3", "qwen3-moe"))],
)
@pytest.mark.parametrize("num_pages", [7, 13, 100])  # of a sequence of 97 tokens, of two, of all
def test_pages_change_no_token_however_few_there_are(tmp_path, name, num_pages):
    save_model(tmp_path, name)
    wanted, found = groups(), groups()
    local_generator(tmp_path, slots=6).draw(wanted, Sampling())
    counts = []
    generator = local_generator(tmp_path, slots=6, num_pages=num_pages)
    generator.draw(found, Sampling(), on_tokens=counts.append)
    assert (generator.moved > 0) == (num_pages < 100)
    assert [(one.tokens, one.finish, one.versions) for one in found] == [
        (one.tokens, one.finish, one.versions) for one in wanted
    ]
    assert sum(counts) == sum(len(one.tokens) for one in found)
    for one, other in zip(found, wanted, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)  # sums in another order
        assert (one.experts is None) == (other.experts is None)
        assert one.experts is None or torch.equal(one.experts, other.experts)
    # Everything came back; only the last prompt's full pages wait for more samples of it.
    last = generator.cache._last[1].tolist() if generator.cache._last else []
    assert sorted([*generator.cache._free, *last]) == list(range(1, num_pages + 1))


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
@torch.inference_mode()
def test_the_kernel_itself_reads_what_the_decoder_has(tmp_path, monkeypatch, name):
    # Views of fused projections, halves of a layer, heads of 20 numbers; by Triton's interpreter.
    monkeypatch.setattr(pages, "paged_attention", partial(paged_attention, impl="triton"))
    save_model(tmp_path, name, num_hidden_layers=2)
    decoder = local_generator(tmp_path)._decoder
    shape = {"rows": 3, "limit": 60, "dtype": torch.float32}
    caches = PagedCache(decoder.arch, **shape, pages=12, device=CPU), KVCache(decoder.arch, **shape)
    prefill, rows = decoder.prefill([[5] * 31, [6], [7] * 16]), np.arange(3)
    positions = np.array(prefill.lengths)
    for cache in caches:
        cache.fill(rows, prefill.kv, rows, positions, [0, 1, 2])
    for tokens in ([2, 3, 4], [9, 8, 7]):
        assert all(cache.reserve(positions) for cache in caches)
        found, wanted = (decoder.step(torch.tensor(tokens), torch.from_numpy(positions), c)[0] for c in caches)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        positions = positions + 1


def test_nothing_is_computed_twice_and_the_oldest_draft_always_goes_on(tmp_path):
    save_model(tmp_path, "qwen2", eos_token_id=96)  # never drawn
    plain, generator = local_generator(tmp_path, slots=6), local_generator(tmp_path, slots=6, num_pages=9)
    ended = []
    plain.draw(groups(), Sampling())
    generator.draw(groups(), Sampling(), on_ended=lambda draft: ended.append((draft.prompt.id, draft.stream)))
    assert generator.tokens_run == plain.tokens_run
    assert generator.moved > 0
    assert ended.index((0, 0)) == 0  # all are of one length: it was the first to begin, and waited for nobody


def test_an_interrupted_draw_goes_on_with_the_same_tokens(tmp_path):
    save_model(tmp_path, "qwen3")
    wanted, found = groups(), groups()
    local_generator(tmp_path).draw(wanted, Sampling())
    generator, steps = local_generator(tmp_path, num_pages=8), iter(range(1000))
    while not all(draft.finish for draft in found):
        before = sum(len(draft.tokens) for draft in found)
        generator.draw(found, Sampling(), should_stop=lambda: next(steps) % 25 == 24)
        assert sum(len(draft.tokens) for draft in found) > before
    assert generator.moved > 0
    assert [draft.tokens for draft in found] == [draft.tokens for draft in wanted]


def new_cache(tmp_path, rows: int, num_pages: int, limit: int = 100, name: str = "qwen2") -> PagedCache:
    save_model(tmp_path, name)
    arch = read_architecture(tmp_path)
    return PagedCache(arch, rows=rows, limit=limit, pages=num_pages, device=CPU, dtype=torch.float32)


def random_kv(cache: PagedCache, prompts: int, length: int) -> list[torch.Tensor]:
    parts, _, heads, _, dim = cache.layers[0].shape
    return [torch.randn(parts, prompts, heads, length, dim) for _ in cache.layers]


def test_samples_of_a_prompt_share_its_full_pages(tmp_path):
    cache = new_cache(tmp_path, rows=8, num_pages=40)
    length, kv = 2 * PAGE + 5, random_kv(cache, 2, 2 * PAGE + 5)

    def start(rows: list[int], prompt: int) -> None:
        count = len(rows)
        assert cache.may_start([length] * count, [prompt] * count, 0) == count
        cache.fill(np.array(rows), kv, np.array([prompt] * count), np.array([length] * count), [prompt] * count)

    start([0, 1, 2, 3], 0)
    assert len(cache._free) == 40 - (2 + 4)  # of full pages one each, of the last one a copy each
    start([4], 0)  # later
    assert len(cache._free) == 40 - (2 + 5)
    cache.release([0, 1, 2, 3])
    assert len(cache._free) == 40 - (2 + 1)
    start([5, 6], 1)
    cache.release([4])
    assert len(cache._free) == 40 - (2 + 2)
    for row in (5, 6):
        assert torch.equal(cache.copy(row, 0, length), torch.stack(kv)[:, :, 1])


def test_as_many_start_as_leave_a_page_for_each_and_one_in_any_case(tmp_path):
    cache = new_cache(tmp_path, rows=8, num_pages=10)
    assert cache.may_start([PAGE + 1] * 8, list(range(8)), 0) == 3  # 3 of 2 pages, and 3 to come: 9
    assert cache.may_start([PAGE + 1] * 8, list(range(8)), 4) == 2  # 2 of 2 pages, and 6 to come
    assert cache.may_start([PAGE + 1] * 8, [0] * 8, 0) == 4  # a page for all, one each, one each to come
    assert cache.may_start([10 * PAGE], [0], 0) == 1
    assert cache.may_start([10 * PAGE], [0], 1) == 0


@pytest.mark.parametrize("name", ["qwen2", pytest.param("deepseek", marks=pytest.mark.rotating)])
def test_any_order_of_events_leaves_each_row_its_own_numbers(tmp_path, name):
    # Against whole tensors of every row: starts, steps, moves, ends, to the host and back.
    cache, draw = new_cache(tmp_path, rows=6, num_pages=9, name=name), np.random.default_rng(0)
    torch.manual_seed(0)
    rows: list[torch.Tensor] = []  # [layers, parts, heads, T, dim] of each live row
    aside: list[torch.Tensor] = []
    seen = set()
    for number in range(400):
        event = draw.choice(["start", "step", "step", "end"], p=[0.15, 0.4, 0.4, 0.05])
        if event == "start" and len(rows) < 6:
            length = int(draw.integers(1, 60))
            if aside and cache.may_start([aside[-1].shape[3]], [None], len(rows)):
                kv = aside.pop()
                cache.restore([len(rows)], list(kv))
                rows.append(kv)
                seen.add("restored")
            elif cache.may_start([length], [number], len(rows)):
                kv = random_kv(cache, 1, length)
                cache.fill(np.array([len(rows)]), kv, np.array([0]), np.array([length]), [number])
                rows.append(torch.stack(kv)[:, :, 0])
        elif event == "step" and rows and max(kv.shape[3] for kv in rows) < 100:
            positions = np.array([kv.shape[3] for kv in rows])
            while not cache.reserve(positions):
                assert len(rows) > 1
                aside.append(torch.stack(cache.set_aside(len(rows) - 1, rows.pop().shape[3])))
                positions = positions[:-1]
                seen.add("set aside")
            attend = cache.attention(torch.from_numpy(positions))
            num_parts, heads = rows[0].shape[1:3]
            new = torch.randn(len(cache.layers), len(rows), num_parts * heads, rows[0].shape[4])
            for layer, key_value in enumerate(new):
                attend(layer, torch.randn(len(rows), 4, rows[0].shape[4]), key_value)
            parts = new.unflatten(2, (num_parts, heads)).unsqueeze(4)
            rows = [torch.cat([kv, parts[:, row]], dim=3) for row, kv in enumerate(rows)]
        elif event == "end" and rows:
            gone = int(draw.integers(len(rows)))
            cache.release([gone])
            if gone < len(rows) - 1:
                cache.move(np.array([len(rows) - 1]), np.array([gone]), rows[-1].shape[3])
            rows[gone] = rows[-1]
            rows.pop()
        for row, kv in enumerate(rows):
            assert torch.equal(cache.copy(row, 0, kv.shape[3]), kv)
            start = int(draw.integers(kv.shape[3]))
            assert torch.equal(cache.copy(row, start, kv.shape[3]), kv[:, :, :, start:])
    assert seen == {"set aside", "restored"}
    cache.release(range(len(rows)))
    assert cache.may_start([PAGE], ["another"], 0) == 1
    assert sorted(cache._free) == list(range(1, 10))


def test_a_copy_of_a_row_needs_room_for_itself_and_one_layer(tmp_path):
    cache = new_cache(tmp_path, rows=1, num_pages=40, limit=600)
    cache.restore([0], [part[:, 0] for part in random_kv(cache, 1, 500)])
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            made.extend(found if isinstance(found, (list, tuple)) else [found])
            return found

    with Watch():
        copied = cache.copy(0, 5, 500)
    of_all_layers = [one for one in made if one.untyped_storage().nbytes() >= copied.nbytes]
    pools = {layer.data_ptr() for layer in cache.layers}
    assert {one.untyped_storage().data_ptr() for one in of_all_layers} - pools == {copied.data_ptr()}


def test_rows_without_a_sequence_touch_nobodys_page_only(tmp_path):
    cache = new_cache(tmp_path, rows=4, num_pages=12)
    kv, rows = random_kv(cache, 4, 20), np.arange(4)
    cache.fill(rows, kv, rows, np.full(4, 20), [0, 1, 2, 3])
    cache.reserve(np.full(4, 20))
    cache.release([2, 3])  # the table still names their pages
    before = [layer.clone() for layer in cache.layers]
    dim, heads = cache.layers[0].shape[4], cache.layers[0].shape[2]
    attend = cache.attention(torch.tensor([20, 20, -1, -1]))
    mixed = attend(0, torch.randn(4, 2 * heads, dim), torch.randn(4, 2 * heads, dim))
    assert not mixed[2:].any() and mixed[:2].any()
    changed = (cache.layers[0] != before[0]).nonzero()[:, 1].unique().tolist()
    own = [int(cache.table[row, 20 // PAGE]) for row in (0, 1)]
    assert sorted(changed) == sorted([pages.NOBODYS, *own])


# ---- how many there are ----------------------------------------------------------------------------------------

# Qwen2.5-7B in bfloat16: 57,344 bytes a token.
QWEN = SimpleNamespace(
    num_layers=28,
    num_kv_heads=4,
    num_heads=28,
    head_dim=128,
    hidden_size=3584,
    intermediate_size=18944,
    vocab_size=152064,
    mla=None,
    moe=None,
)
# Moonlight-16B: 31,104 bytes of latents a token.
MOONLIGHT = SimpleNamespace(
    num_layers=27,
    num_heads=16,
    head_dim=192,
    hidden_size=2048,
    intermediate_size=11264,
    vocab_size=163840,
    mla=SimpleNamespace(kv_rank=512, rope_dim=64, value_dim=128),
    moe=SimpleNamespace(top_k=6, intermediate_size=1408, shared_size=2816),
)
WANTED = {"rows": 64, "longest": 32768, "prefill": 8192, "size": 2}


def test_pages_for_all_or_what_there_is_room_for_and_no_fewer_than_one_sequence(monkeypatch, caplog):
    monkeypatch.setattr(memory, "PAGE_TOKENS", 64)
    monkeypatch.setattr(pages, "PAGE_TOKENS", 64)
    caplog.set_level("INFO")
    assert memory.pages_that_fit(QWEN, **WANTED, free=150 * 10**9) == 64 * 512
    assert not caplog.records
    # Of 54 GB: 1.87 for prompts and 0.03 for one layer of them, 0.31 for logits, 0.07 for what goes to the host.
    few = memory.pages_that_fit(QWEN, **WANTED, free=60 * 10**9)
    assert few * 64 * 57344 == pytest.approx(51.7e9, rel=2e-3)
    assert "room for keys and values of 901760 tokens, not for 64 sequences of 32768" in caplog.text
    assert few // 512 == 27  # sequences of 32,768 tokens, as many as with rows of one length
    mixed = few * 64 / (8192 + 32)  # of 8,192 on average and half a page
    assert int(mixed) == 109
    refused = r"32768 tokens takes 1\.75 GiB .* beside 2\.\d+ GiB for prompts and logits, found 2\.51 GiB"
    with pytest.raises(RuntimeError, match=refused + r".*required are .*slots, .*cache_gib, or rollout\.engine=sglang"):
        memory.pages_that_fit(QWEN, **WANTED, free=3 * 10**9)


def test_latents_are_reckoned_by_their_size(monkeypatch):
    monkeypatch.setattr(memory, "PAGE_TOKENS", 64)
    monkeypatch.setattr(pages, "PAGE_TOKENS", 64)
    assert kv_bytes(MOONLIGHT, 2) == 27 * (512 + 64) * 2
    found = memory.pages_that_fit(MOONLIGHT, rows=203, longest=8192, prefill=8192, size=2, free=60 * 10**9)
    assert found * 64 // (8192 + 32) == 202  # sequences of 8,192 tokens on average and half a page
