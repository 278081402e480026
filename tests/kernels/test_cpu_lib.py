"""The compiled CPU functions (csrc/cpu/) against the formulas in float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from r1engine.model.layers.attention import _rotate
from r1engine.model.layers.cpu_attention import compiled_attention, is_compiled, padded_blocks, padded_sdpa
from r1engine.rollout.local.compiled import ADD, GATE, PANEL, ROWS, from_panels, to_panels
from r1engine.rollout.local.new_tokens import NewTokens
from r1kernels import cpu_lib

ROOT = Path(__file__).resolve().parents[2]
needs_library = pytest.mark.skipif(cpu_lib.library_path() is None, reason="_cpu.so is not built: no C++ compiler")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    ending: int,
    *,
    norm: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    eps: float = 1e-3,
) -> torch.Tensor:
    """[N, outputs] of the compiled product of x [N, D] and weight [outputs, D] (GATE: [2 * outputs, D])."""
    rows, outputs = len(x), len(weight) // (2 if ending == GATE else 1)
    panels = to_panels(x)
    if ending == ROWS:
        to = x.new_full((rows, outputs), torch.nan)
    else:
        to = to_panels(out) if out is not None else x.new_full((len(panels), outputs, PANEL), torch.nan)
    scratch, sizes = torch.empty_like(panels), (rows, x.shape[1], outputs)
    cpu_lib.call("r1_cpu_panel_linear", panels, norm, weight, bias, scratch, to, *sizes, ending, eps)
    return to if ending == ROWS else from_panels(to, rows)


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=3e-6 * float(exact.abs().max()))


@needs_library
@pytest.mark.parametrize("rows", [1, 8, 17, 40, 1850])  # many are taken in parts
@pytest.mark.parametrize("outputs", [1, 12, 29, 64])
def test_product_of_rows_and_weights_is_exact(threads: int, rows: int, outputs: int) -> None:
    x, weight, bias = torch.randn(rows, 72), torch.randn(outputs, 72), torch.randn(outputs)
    norm, before = torch.rand(72), torch.randn(rows, outputs)
    exact = x.double() @ weight.double().t()
    assert_near(product(x, weight, ROWS), exact)
    assert_near(product(x, weight, ADD, out=before), before.double() + exact)
    normed = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-3).sqrt() * norm.double()
    assert_near(product(x, weight, ROWS, norm=norm, bias=bias), normed @ weight.double().t() + bias.double())


@needs_library
@pytest.mark.parametrize("inner", [5, 24, 44])
def test_gated_product_is_exact(threads: int, inner: int) -> None:
    x, weight = torch.randn(19, 64), torch.randn(2 * inner, 64)
    gate, up = (x.double() @ weight.double().t()).chunk(2, dim=1)
    assert_near(product(x, weight, GATE), gate * gate.sigmoid() * up)


@needs_library
def test_a_row_of_a_product_does_not_depend_on_the_others(threads: int) -> None:
    x, weight, norm = torch.randn(37, 96), torch.randn(50, 96), torch.rand(96)
    together = product(x, weight, ROWS, norm=norm)
    for rows in (slice(0, 1), slice(5, 21), slice(36, 37)):
        assert torch.equal(product(x[rows], weight, ROWS, norm=norm), together[rows])


def cached_attention(
    new: NewTokens, qkv: torch.Tensor, norms: tuple, rotations: torch.Tensor, cache: torch.Tensor
) -> torch.Tensor:
    """[N, heads * size]; cache [2, rows, kv_heads, places, size] takes keys and values."""
    (count, total, size), (_, _, kv_heads, capacity, _) = qkv.shape, cache.shape
    heads = total - 2 * kv_heads
    out = torch.empty(-(-count // PANEL), heads * size, PANEL)
    sizes = (count, heads, kv_heads, size, capacity)
    cpu_lib.call("r1_cpu_cached_attention", qkv, *norms, rotations, *new[1:], *cache, out, *sizes, 0.3, 1e-3)
    return from_panels(out, count)


def decoded(positions: list[int]) -> NewTokens:
    at = torch.tensor(positions)
    return NewTokens(at, at, torch.arange(len(at)), at, torch.zeros_like(at))


GOES_ON = NewTokens.behind([[[0] * 3, [0], [0] * 21], [[0] * 40], [[0], [0] * 2]], [33, 0, 150], torch.device("cpu"))


@needs_library
@pytest.mark.parametrize("new", [decoded([0, 187, *range(3, 150, 9)]), GOES_ON], ids=["decoded", "goes on"])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (3, 3, 8), (6, 1, 24), (2, 1, 128)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_attention_of_new_tokens_is_exact(
    threads: int, new: NewTokens, heads: int, kv_heads: int, size: int, has_norm: bool
) -> None:
    rows, capacity = int(new.rows.max()) + 1, 188
    qkv, cache = torch.randn(len(new.ids), heads + 2 * kv_heads, size), torch.randn(2, rows, kv_heads, capacity, size)
    angle = torch.randn(capacity, size // 2)
    rotations, before = torch.polar(torch.ones_like(angle), angle), cache.clone()
    norms = (torch.rand(size), torch.rand(size)) if has_norm else (None, None)
    found = cached_attention(new, qkv, norms, rotations, cache)

    def turned(x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        x = x.double()
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.double()
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotations[new.positions].to(torch.complex128)[:, None]
        return torch.view_as_real(pairs).flatten(-2)

    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    query, key = turned(query, norms[0]), turned(key, norms[1])
    before[:, new.rows, :, new.places] = torch.stack([key.float(), value], dim=1)
    torch.testing.assert_close(cache, before, rtol=1e-5, atol=1e-5)  # the new tokens, and nothing else
    exact = torch.empty(len(qkv), heads, size, dtype=torch.float64)
    for n, (_, position, row, place, past) in enumerate(zip(*(x.tolist() for x in new), strict=True)):
        seen = [*range(past), *range(place - position + past, place + 1)]
        for h in range(heads):
            keys, values = before[:, row, h // (heads // kv_heads), seen].double()
            exact[n, h] = torch.softmax(0.3 * (keys @ query[n, h]), dim=0) @ values
    assert_near(found, exact.flatten(1))


@needs_library
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("heads", [1, 3])  # odd: pairs of them are of one token or of two
def test_attention_of_a_token_does_not_depend_on_the_others(threads: int, heads: int, size: int) -> None:
    # 160 tokens as a prompt, one by one, and those from 90 on behind a prefix, beside others of other lengths.
    angle, qkv = torch.randn(160, size // 2), torch.randn(160, heads + 2, size)
    rotations, cache = torch.polar(torch.ones_like(angle), angle), torch.zeros(2, 1, 1, 160, size)
    whole = NewTokens.behind([[[0] * 160]], [0], torch.device("cpu"))
    expected = cached_attention(whole, qkv, (None, None), rotations, cache)
    alone = cache.clone()
    for at in (0, 5, 64, 159):
        alone[:, :, :, at:] = 0
        assert torch.equal(
            cached_attention(decoded([at]), qkv[at : at + 1], (None, None), rotations, alone)[0], expected[at]
        )
        assert torch.equal(alone[:, :, :, : at + 1], cache[:, :, :, : at + 1])
        alone = cache.clone()
    wide = torch.zeros(2, 2, 1, 190, size)
    wide[:, 1, :, :90] = cache[:, 0, :, :90]
    new = NewTokens.behind([[[0] * 9], [[0] * 30, [0] * 70]], [0, 90], torch.device("cpu"))
    both = torch.cat([torch.randn(9, heads + 2, size), torch.randn(30, heads + 2, size), qkv[90:]])
    assert torch.equal(cached_attention(new, both, (None, None), rotations, wide)[39:], expected[90:])


@needs_library
def test_norm_of_panels_is_exact(threads: int) -> None:
    x, weight = torch.randn(37, 72), torch.rand(72)
    panels = to_panels(x)
    out = torch.empty_like(panels)
    cpu_lib.call("r1_cpu_panel_norm", panels, weight, out, *x.shape, 1e-3)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert_near(from_panels(out, 37), exact)


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Sequence by sequence, with the whole square of scores."""
    outputs, group = [], q.shape[1] // k.shape[1]
    for parts in zip(*(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)), strict=True):
        query, key, value = (x.transpose(0, 1) for x in parts)
        scores = scale * query @ key.repeat_interleave(group, 0).mT
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        outputs.append((weights @ value.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("by", [pytest.param("compiled", marks=needs_library), "padded"])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "size"),
    [
        ([1, 2, 15, 16, 17, 47, 48, 49, 100, 3], 4, 1, 32),  # around the blocks of 16 keys and 48 queries
        ([68] * 3, 4, 2, 64),
        ([300], 3, 3, 16),
        ([5, 1], 2, 2, 48),
    ],
)
def test_packed_attention_and_its_gradients_are_exact(
    threads: int, by: str, lengths: list[int], heads: int, kv_heads: int, size: int
) -> None:
    cu_seqlens, tokens, scale = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths), 0.4
    inputs = [torch.randn(tokens, n, size, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    if by == "compiled":
        assert is_compiled(*inputs)
        out = compiled_attention(*inputs, cu_seqlens, scale)
    else:
        out = padded_sdpa(*inputs, padded_blocks(cu_seqlens), scale)
    grad = torch.randn(heads, tokens, size).transpose(0, 1)  # not contiguous
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = exact_attention(*exact_inputs, cu_seqlens, scale)
    gradients = torch.autograd.grad(out, inputs, grad)
    exact_gradients = torch.autograd.grad(exact, exact_inputs, grad.double())
    for found, wanted in zip((out, *gradients), (exact, *exact_gradients), strict=True):
        assert_near(found.detach(), wanted.detach())


@needs_library
@pytest.mark.parametrize("sign", [1, -1])
def test_rotation_is_that_of_the_formula(threads: int, sign: int) -> None:
    wide = torch.randn(50, 3, 48)
    x, angle = wide[:, :, 16:], torch.randn(50, 1, 16)  # strided, as a part of the fused projection is
    found = _rotate(x, angle.cos(), angle.sin(), sign)
    turn = torch.polar(torch.ones_like(angle).double(), sign * angle.double())
    exact = torch.complex(*x.double().chunk(2, -1)) * turn
    assert_near(found, torch.cat([exact.real, exact.imag], dim=-1))


@needs_library
def test_the_gate_survives_every_float() -> None:
    x = torch.tensor([-torch.inf, -1e30, -100.0, -88.0, -87.0, -0.0, 1e-30, 87.0, 89.0, 1e30, torch.nan])
    weight, ones = torch.tensor([[1.0], [0.0]]), torch.ones(len(x), 1)
    found = product(x[:, None], weight, GATE, norm=None)
    assert found.shape == ones.shape and not found[1:-1].isnan().any()  # up is 0: 0, but for inf * 0 and nan
    panels = torch.stack([x, torch.ones_like(x)], dim=1).repeat_interleave(8, dim=1)
    out = torch.empty(len(x), 8)
    cpu_lib.call("r1_cpu_swiglu", panels.contiguous(), out, len(x), 8)
    exact = x.double() * x.double().sigmoid()
    torch.testing.assert_close(out[1:, 0].double(), exact[1:], rtol=1e-5, atol=1e-36, equal_nan=True)


def drawn(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, logp = torch.full((len(logits),), -1), torch.full((len(logits),), torch.nan)
    cpu_lib.call("r1_cpu_sample", logits, uniform, tokens, logp, *logits.shape, 1 / temperature)
    return tokens, logp


@needs_library
@pytest.mark.parametrize("size", [1, 7, 512, 1003])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_drawn_token_is_where_the_distribution_function_passes_the_uniform(
    threads: int, size: int, temperature: float
) -> None:
    logits, uniform = 3 * torch.randn(300, size), torch.rand(300, dtype=torch.float64)
    tokens, logp = drawn(logits, uniform, temperature)
    exact = (logits.double() / temperature).log_softmax(1)
    torch.testing.assert_close(logp.double(), exact.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    above = exact.exp().cumsum(1).gather(1, tokens[:, None])[:, 0]
    below = above - logp.double().exp()
    assert ((below - 1e-6 <= uniform) & (uniform <= above + 1e-6)).all()  # rounding moves a border a little
    alone = drawn(logits[7:9], uniform[7:9], temperature)
    assert torch.equal(alone[0], tokens[7:9]) and torch.equal(alone[1], logp[7:9])


@needs_library
def test_a_token_without_probability_is_never_drawn_and_nan_stays_visible() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, -200.0, 1.0, -torch.inf]]).repeat(4, 1)
    uniform = torch.tensor([2.0**-53, 0.26, 0.27, 1 - 2.0**-53], dtype=torch.float64)
    assert drawn(logits, uniform, 1.0)[0].tolist() == [1, 1, 4, 4]
    assert drawn(torch.zeros(1, 2), torch.tensor([0.5], dtype=torch.float64), 1.0)[0].item() == 1  # at the border
    assert drawn(torch.tensor([[0.0, torch.nan, 1.0]]), uniform[:1], 1.0)[1].isnan().all()


def test_header_and_python_agree_on_the_interface_version() -> None:
    header = (ROOT / "csrc" / "cpu" / "export.h").read_text()
    assert int(re.search(r"#define R1_CPU_ABI_VERSION (\d+)", header)[1]) == cpu_lib.ABI_VERSION


@pytest.fixture
def fresh_library() -> Iterator[None]:
    cpu_lib._library.cache_clear()
    yield
    cpu_lib._library.cache_clear()


def test_without_the_library_nothing_is_taken_and_the_state_says_why(
    monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:
    monkeypatch.setattr(cpu_lib, "library_path", lambda: None)
    assert not cpu_lib.takes(torch.ones(8))
    assert cpu_lib.state() == "not built (needs a C++ compiler: GCC 12 or Clang); PyTorch computes instead"


def test_without_the_runtime_of_pytorch_the_state_says_so(monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    monkeypatch.setattr(cpu_lib, "_run_team", lambda: None)
    monkeypatch.setattr(cpu_lib, "library_path", lambda: "somewhere/_cpu.so")
    assert cpu_lib.state().startswith("needs AVX2 (x86) and PyTorch's OpenMP runtime, one of them is missing")


@needs_library
def test_another_interface_version_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    monkeypatch.setattr(cpu_lib, "ABI_VERSION", 99)
    with pytest.raises(RuntimeError, match=r"_cpu\.so has interface version 4, 99 is required; run `pip install \.`"):
        cpu_lib.takes(torch.ones(8))


def test_a_file_that_is_no_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:
    file = tmp_path / cpu_lib.FILE_NAME
    file.write_text("text")
    monkeypatch.setattr(cpu_lib, "library_path", lambda: str(file))
    with pytest.raises(RuntimeError, match=r"_cpu\.so cannot be loaded: .*"):
        cpu_lib.takes(torch.ones(8))


@needs_library
def test_only_float32_of_the_cpu_in_one_piece_is_taken() -> None:
    x = torch.ones(8, 8)
    assert cpu_lib.takes(x, x[2:])
    for other in (x.double(), x.bfloat16(), x.t()[:4], x.to("meta")):
        assert not cpu_lib.takes(x, other)
