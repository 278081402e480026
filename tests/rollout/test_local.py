"""The embedded generator against transformers on the same weights, and against itself in other arrangements."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch.overrides import TorchFunctionMode

from r1engine.batch import Completion, Prompt
from r1engine.data.question import Question
from r1engine.rollout import Sampling, generate
from r1engine.rollout.local import compiled
from r1engine.rollout.local.cache import FIRST_TOKENS, KVCache
from r1engine.rollout.local.generator import LocalGenerator
from r1kernels import cpu_lib

VOCAB, STOP = 99, 1
CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": VOCAB,
    "eos_token_id": STOP,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # at this size: one wavelength is kept, one divided by 8, the rest are between
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,  # the longest sequence here has 99 tokens
}
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-bias-tied": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "llama": ("Llama", {"num_key_value_heads": 1}),
    "llama3-scaling": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "qwen2-linear": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "llama3-scaling-tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
}


def save_model(folder: Path, name: str = "qwen2", **changes: object) -> torch.nn.Module:
    """A random model of a family, saved with a tokenizer whose token i is the word w<i>."""
    family, options = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**(SIZES | options | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros, which would hide a swap
                torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.add_special_tokens(["w0", "w1"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def new_generator(folder: Path, model: torch.nn.Module, *, slots: int = 64, seed: int = 7) -> LocalGenerator:
    generator = LocalGenerator(folder, seed=seed, slots=slots, device=CPU, dtype=torch.float32)
    generator.load_weights(model.state_dict().items())
    return generator


def new_prompt(index: int, tokens: list[int]) -> Prompt:
    return Prompt(id=index, tokens=tokens, text="", question=Question(""))


def prompts_of_different_lengths() -> list[Prompt]:
    return [new_prompt(i, [2 + (5 * i + j) % 97 for j in range(1 + 7 * i)]) for i in range(5)]


def by_name(completions: list[Completion], *, has_logp: bool = False) -> dict[tuple[int, int], list[float]]:
    return {(c.prompt.id, c.sample): [*c.tokens, *(c.logp if has_logp else ())] for c in completions}


@torch.no_grad()
def logp_error(model: torch.nn.Module, completion: Completion, temperature: float = 1.0) -> float:
    """Largest distance of the reported log-probabilities from those of transformers."""
    start = len(completion.prompt.tokens)
    tokens = torch.tensor([completion.prompt.tokens + completion.tokens])
    logp = torch.log_softmax(model(tokens).logits[0] / temperature, dim=-1)
    expected = logp[start - 1 : -1].gather(1, tokens[0, start:, None]).squeeze(1)
    return (torch.tensor(completion.logp) - expected).abs().max().item()


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_logp_agrees_with_transformers(tmp_path, monkeypatch, name, is_compiled):
    if is_compiled and cpu_lib.library_path() is None:
        pytest.skip("_cpu.so is not built: no C++ compiler")
    model = save_model(tmp_path, name, **({"num_attention_heads": 6} if is_compiled else {}))  # heads of 8, else of 12
    if not is_compiled:
        monkeypatch.setattr(compiled, "is_compiled", lambda *_: False)
    generator = new_generator(tmp_path, model, slots=4)  # fewer than the 10 sequences: rows are refilled
    if not FAMILIES[name][1].get("attention_bias"):  # nobody compiles o_proj with a bias
        assert generator._decoder._is_compiled == is_compiled
    prompts = prompts_of_different_lengths()
    completions = generate(
        generator, prompts, num_samples=2, step=3, max_tokens=70, sampling=Sampling(temperature=0.8, top_p=0.9)
    )
    assert [(c.prompt.id, c.sample) for c in completions] == [(i, j) for i in range(5) for j in range(2)]
    assert max(len(c.tokens) for c in completions) == 70
    for completion in completions:
        assert logp_error(model, completion, temperature=0.8) < 2e-5  # 1.1e-5 on some CPUs


def test_a_growing_cache_keeps_its_contents(tmp_path):
    model = save_model(tmp_path, max_position_embeddings=600, eos_token_id=VOCAB)  # never drawn
    generator = new_generator(tmp_path, model, slots=2)
    completions = generate(generator, [new_prompt(0, [5, 6, 7])], num_samples=3, step=1, max_tokens=500)
    assert all(len(c.tokens) > 1.5 * FIRST_TOKENS for c in completions)  # past the first and the second growth
    assert max(logp_error(model, completion) for completion in completions) < 1e-5


def test_older_rope_keys_mean_the_same(tmp_path):
    model = save_model(tmp_path, "llama3-scaling")
    args = {"num_samples": 1, "step": 0, "max_tokens": 40}
    expected = generate(new_generator(tmp_path, model), prompts_of_different_lengths(), **args)
    rope = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    edit_config(tmp_path, rope_parameters=None, rope_scaling=rope, rope_theta=LLAMA3["rope_theta"])
    completions = generate(new_generator(tmp_path, model), prompts_of_different_lengths(), **args)
    assert [c.logp for c in completions] == [c.logp for c in expected]


@pytest.mark.parametrize("slots", [1, 3, 7, 64])
@pytest.mark.parametrize("heads", [4, 6])  # PyTorch and compiled
def test_tokens_do_not_depend_on_slots_order_or_company(tmp_path, heads, slots):
    model = save_model(tmp_path, num_attention_heads=heads)
    prompts = prompts_of_different_lengths()
    generator = new_generator(tmp_path, model, slots=slots)
    has_logp = generator._decoder._is_compiled
    for sampling in (Sampling(), Sampling(temperature=0.7, top_p=0.9)):
        args = {"num_samples": 3, "step": 5, "max_tokens": 30, "sampling": sampling}
        expected = by_name(generate(new_generator(tmp_path, model), prompts, **args), has_logp=has_logp)
        assert by_name(generate(generator, prompts[::-1], **args), has_logp=has_logp) == expected
        alone = by_name(generate(generator, prompts[2:3], **args), has_logp=has_logp)
        assert alone == {key: tokens for key, tokens in expected.items() if key[0] == 2}


def test_every_part_of_the_address_changes_the_sample(tmp_path, model):
    def draw(prompt_id: int = 0, *, seed: int = 7, step: int = 0) -> list[list[int]]:
        generator = new_generator(tmp_path, model, seed=seed)
        completions = generate(generator, [new_prompt(prompt_id, [5, 6])], num_samples=2, step=step, max_tokens=20)
        return [c.tokens for c in completions]

    assert draw() == draw()
    drawn = [*draw(), *draw(1), *draw(seed=8), *draw(step=1)]
    assert len({tuple(tokens) for tokens in drawn}) == 8


def test_a_prompt_that_occurs_again_draws_other_samples(tmp_path, model):
    prompt = new_prompt(0, [5, 6])
    completions = generate(new_generator(tmp_path, model), [prompt, prompt], num_samples=2, step=0, max_tokens=20)
    assert len({tuple(c.tokens) for c in completions}) == 4


def test_generation_leaves_the_global_random_state_alone(tmp_path, model):
    before, numpy_before = torch.random.get_rng_state(), str(np.random.get_state())
    generate(new_generator(tmp_path, model), [new_prompt(0, [5])], num_samples=2, step=0, max_tokens=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy_before  # ends with the position in the stream


def test_a_completion_ends_at_a_stop_token_or_at_the_limit(tmp_path, model):
    stops = {STOP, 7, 8, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "w9"}}))
    completions = generate(
        new_generator(tmp_path, model),
        prompts_of_different_lengths(),
        num_samples=20,
        step=0,
        max_tokens=30,
    )
    assert {c.tokens[-1] for c in completions if not c.truncated} == stops
    assert {c.truncated for c in completions} == {True, False}
    for completion in completions:
        assert not stops & set(completion.tokens[:-1])
        assert len(completion.logp) == len(completion.tokens) <= 30
        assert completion.truncated == (completion.tokens[-1] not in stops)
        assert not completion.truncated or len(completion.tokens) == 30
        spoken = completion.tokens if completion.truncated else completion.tokens[:-1]
        assert completion.text == " ".join(f"w{token}" for token in spoken if token > 1)  # w0 and w1 are special


def test_on_tokens_counts_every_token_and_one_token_is_enough(tmp_path, model):
    counts: list[int] = []
    generator = new_generator(tmp_path, model, slots=4)
    completions = generate(
        generator,
        prompts_of_different_lengths(),
        num_samples=3,
        step=0,
        max_tokens=17,
        on_tokens=counts.append,
    )
    assert sum(counts) == sum(len(c.tokens) for c in completions)
    single = generate(generator, prompts_of_different_lengths(), num_samples=3, step=0, max_tokens=1)
    assert [c.tokens for c in single] == [c.tokens[:1] for c in completions]


class CountEmbedded(TorchFunctionMode):
    """Counts the tokens that enter the transformer."""

    num_tokens = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.embedding:
            self.num_tokens += args[0].numel()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("slots", [2, 7, 64])
def test_no_token_is_computed_twice_or_after_the_end(tmp_path, model, slots):
    # A prompt once for its 6 samples, although 2 slots take them in three rounds; then each token but the last.
    prompts = [new_prompt(i, [5 + i] * 9) for i in range(4)]
    generator = new_generator(tmp_path, model, slots=slots)
    with CountEmbedded() as count:
        completions = generate(generator, prompts, num_samples=6, step=0, max_tokens=40)
    assert len({len(c.tokens) for c in completions}) > 3
    assert count.num_tokens == 4 * 9 + sum(len(c.tokens) - 1 for c in completions)


def test_a_refresh_replaces_the_weights_in_place(tmp_path, model):
    generator = new_generator(tmp_path, model)
    places = [layer.attention.qkv.data_ptr() for layer in generator._decoder.weights.layers]
    prompt = new_prompt(0, [5, 6, 7])
    before = generate(generator, [prompt], num_samples=1, step=0, max_tokens=10)[0]
    generator.load_weights((name, 0.5 * tensor) for name, tensor in model.state_dict().items())
    after = generate(generator, [prompt], num_samples=1, step=0, max_tokens=10)[0]
    assert (before.versions, after.versions) == (((1, 10),), ((2, 10),))
    assert before.logp != after.logp
    assert places == [layer.attention.qkv.data_ptr() for layer in generator._decoder.weights.layers]
    generator.load_weights(model.state_dict().items())
    assert generate(generator, [prompt], num_samples=1, step=0, max_tokens=10)[0].logp == before.logp


def test_a_refresh_names_everything_that_is_wrong(tmp_path, model):
    generator = new_generator(tmp_path, model)
    weights = list(model.state_dict().items())
    weights = [(name, tensor) for name, tensor in weights if name != "model.layers.1.mlp.up_proj.weight"]
    weights[0] = (weights[0][0], weights[0][1][:, :-1])
    weights += [weights[-1], ("model.layers.2.mlp.up_proj.weight", torch.zeros(1))]
    with pytest.raises(ValueError) as error:
        generator.load_weights(weights)
    assert str(error.value) == (
        "load_weights: model.embed_tokens.weight is (99, 47), required is (99, 48); lm_head.weight comes twice; "
        "model.layers.2.mlp.up_proj.weight is unknown; model.layers.1.mlp.up_proj.weight is missing"
    )
    assert generator.weight_version == 1
    with pytest.raises(RuntimeError, match="the weights are incomplete"):
        generate(generator, [new_prompt(0, [5])], num_samples=1, step=0, max_tokens=1)


def test_a_tied_head_may_come_if_it_is_the_embedding(tmp_path):
    model = save_model(tmp_path, "qwen2-tied")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    generator = new_generator(tmp_path, model)
    generator.load_weights(weights.items())
    head = weights["model.embed_tokens.weight"]
    generator.load_weights([("lm_head.weight", head), *weights.items()])
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        generator.load_weights([*weights.items(), ("lm_head.weight", head + 1)])


def test_no_cache_survives_generate(tmp_path, model):
    def num_caches() -> int:
        return sum(type(thing) is KVCache for thing in gc.get_objects())

    generator = new_generator(tmp_path, model)
    inside: list[int] = []
    with generator.awake():
        generate(
            generator,
            [new_prompt(0, [5])],
            num_samples=2,
            step=0,
            max_tokens=4,
            on_tokens=lambda _: inside.append(num_caches()),
        )
    gc.collect()
    assert set(inside) == {1}
    assert num_caches() == 0


def test_no_prompts_give_no_completions(tmp_path, model):
    assert generate(new_generator(tmp_path, model), [], num_samples=2, step=0, max_tokens=4) == []


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        ([], {}, "prompt 4 has no tokens"),
        ([99], {}, "prompt 4 has tokens 99 to 99, required is 0 to 98"),
        (
            [5] * 120,
            {},
            "prompt 4 has 120 tokens, with max_tokens=9 that is 129; the model has max_position_embeddings=128",
        ),
        ([5], {"max_tokens": 0}, "max_tokens is 0, required is at least 1"),
        ([5], {"num_samples": 0}, "num_samples is 0, required is at least 1"),
    ],
)
def test_a_bad_request_is_refused(tmp_path, model, tokens, changes, message):
    args = {"num_samples": 1, "step": 0, "max_tokens": 9} | changes
    with pytest.raises(ValueError) as error:
        generate(new_generator(tmp_path, model), [new_prompt(4, tokens)], **args)
    assert str(error.value) == f"generate: {message}" or str(error.value).startswith(f"generate: {message},")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, required is above 0"),
        ({"top_p": 0.0}, "top_p is 0.0, required is above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1, required is at least 0"),
    ],
)
def test_sampling_out_of_range_is_refused(setting, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        Sampling(**setting)


def test_the_whole_context_can_be_used(tmp_path, model):
    completion = generate(
        new_generator(tmp_path, model, seed=1),
        [new_prompt(0, [5] * 127)],
        num_samples=1,
        step=0,
        max_tokens=1,
    )[0]
    assert len(completion.tokens) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel', required is one of Qwen2ForCausalLM"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope', required is 'default', 'linear',"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "key 'factor' is missing"),
        ({"use_sliding_window": True}, "use_sliding_window is true, required is full attention"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', required is 'silu'"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"num_key_value_heads": 3}, "4 heads, 3 key/value heads, 12 rotated dimensions; heads must be a multiple"),
        ({"eos_token_id": None}, "no eos_token_id in generation_config.json or config.json"),
    ],
)
def test_a_model_that_cannot_be_computed_is_refused(tmp_path, model, changes, message):
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        LocalGenerator(tmp_path, seed=0, slots=1, device=CPU, dtype=torch.float32)
    assert message in str(error.value)


def test_an_incomplete_folder_is_refused(tmp_path, model):
    def build(slots: int = 1) -> LocalGenerator:
        return LocalGenerator(tmp_path, seed=0, slots=slots, device=CPU, dtype=torch.float32)

    with pytest.raises(ValueError, match="slots is 0, required is at least 1"):
        build(slots=0)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        build()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: key 'rms_norm_eps' is missing"):
        build()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        build()


def test_samples_follow_the_distribution(tmp_path, model):
    prompt = new_prompt(0, [5, 6, 7])
    completions = generate(new_generator(tmp_path, model), [prompt], num_samples=4000, step=0, max_tokens=1)
    with torch.no_grad():
        probs = torch.softmax(model(torch.tensor([prompt.tokens])).logits[0, -1], dim=-1)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in completions]), minlength=VOCAB)
    likely = probs > 0.002  # at least 8 expected
    deviations = (counts - 4000 * probs)[likely] / (4000 * probs * (1 - probs))[likely].sqrt()
    assert deviations.abs().max() < 4.5
