"""The embedded generator on a GPU: steps as CUDA graphs, and completions beside transformers. `pytest -m gpu`."""

import numpy as np
import pytest
import torch

from r1engine.batch import Prompt
from r1engine.data.question import Question
from r1engine.hf.architecture import read_architecture
from r1engine.hf.folder import weights_of
from r1engine.rollout.draft import Draft, Sampling
from r1engine.rollout.local import generator as generator_module
from r1engine.rollout.local import graphs
from r1engine.rollout.local.decoder import Decoder
from r1engine.rollout.local.generator import LocalGenerator
from r1engine.rollout.local.pages import PAGE_TOKENS, PagedCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda", 0)
PROMPTS = [[2, 3, 4], [5, 6], [7, 8, 9, 10], [11, 12], [13]]
WIDE = {"hidden_size": 128, "moe_intermediate_size": 128, "qk_nope_head_dim": 16, "v_head_dim": 16}


# DeepSeek's entry of a token, 512 + 64 numbers, and Moonlight's heads on it.
ENTRY = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 16}
SIZES = {"qwen3": {}, "deepseek": WIDE, "moonlight": WIDE | ENTRY}


@pytest.fixture(params=SIZES)
def model(request, tmp_path):
    from model_folders import save_model

    return tmp_path, save_model(tmp_path, request.param, **SIZES[request.param])


@torch.inference_mode()
def test_graphs_give_the_logits_of_the_decoder(model):
    arch = read_architecture(model[0])
    decoder = Decoder(arch, device=DEVICE, dtype=torch.bfloat16)
    decoder.weights.load(weights_of(model[0]))
    shape = {"rows": 5, "limit": 300, "pages": 30, "device": DEVICE, "dtype": torch.bfloat16}
    caches = [PagedCache(arch, **shape) for _ in range(2)]
    prefill, everyone = decoder.prefill(PROMPTS), np.arange(5)
    for cache in caches:
        cache.fill(everyone, prefill.kv, everyone, np.array(prefill.lengths), list(range(5)))
    steps, positions = graphs.Steps(decoder, caches[0], 5), np.array(prefill.lengths)
    for step in range(3 * graphs.WORTH):
        inputs = np.stack([np.random.default_rng(step).integers(2, 90, 5), positions])
        assert all(cache.reserve(positions) for cache in caches)
        found, _ = steps.step(inputs)
        wanted, _ = decoder.step(*torch.from_numpy(inputs).to(DEVICE), caches[1])
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        positions += 1
    assert steps._graphs


@pytest.mark.parametrize("num_pages", [3, None])  # of a draft and a half; of all
def test_completions_have_the_log_probabilities_of_transformers(model, monkeypatch, num_pages):
    folder, reference = model
    if num_pages is not None:
        monkeypatch.setattr(generator_module, "pages_that_fit", lambda *_, **__: num_pages)
    generator = LocalGenerator(folder, seed=1, slots=4, device=DEVICE, dtype=torch.bfloat16)
    generator.load_weights(weights_of(folder))
    longest = PAGE_TOKENS + 40
    drafts = [Draft(Prompt(i, tokens, "", Question("")), 0, 0, 0, longest) for i, tokens in enumerate(PROMPTS)]
    generator.draw(drafts, Sampling())
    for draft in drafts:
        whole = torch.tensor([draft.prompt.tokens + draft.tokens])
        exact, rounded = (
            torch.log_softmax(m(whole.to(d)).logits[0].float().cpu(), -1)[:-1].gather(1, whole[0, 1:, None])[:, 0]
            for m, d in ((reference, "cpu"), (reference.to(DEVICE, torch.bfloat16), DEVICE))
        )
        reference.to("cpu", torch.float32)
        found = torch.tensor(draft.logp)
        allowed = 3 * (rounded - exact).abs().max() + 2e-2
        assert (found - exact[-len(found) :]).abs().max() <= allowed
