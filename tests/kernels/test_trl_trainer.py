"""The real GRPOTrainer of TRL, patched and not: the same numbers, from calls that are counted (`make test-trl`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.trl

STEPS = 5
WORDS = [f"w{i}" for i in range(150)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 152, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = Qwen2Config(**sizes, **ids, num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def reward(completion_ids: list[list[int]], **columns: object) -> list[float]:
    return [len(set(ids)) / 8 - sum(ids) % 7 for ids in completion_ids]


def run(folder: Path, out: Path, lora: bool = False, **options: object) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The log of STEPS steps, without seconds, and the trained weights."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    plain = {"per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.04, "learning_rate": 3e-3, "seed": 3}
    config = GRPOConfig(
        output_dir=str(out),
        max_steps=STEPS,
        max_completion_length=8,
        use_cpu=True,
        activation_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"bf16": False} | plain | options),
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": f"{a} {b}"} for a, b in zip(WORDS, WORDS[7:], strict=False)]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        peft_config=peft_config,
    )
    trainer.train()
    log = [{k: v for k, v in row.items() if "time" not in k} for row in trainer.state.log_history if "loss" in row]
    weights = torch.cat([p.detach().flatten().float() for p in trainer.model.parameters() if p.requires_grad])
    return log, weights


CASES: dict[str, dict[str, object]] = {
    **{kind: {"loss_type": kind} for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")},
    "old policy, clipping both sides": {"num_iterations": 2, "epsilon": 0.05, "delta": 1.2, "temperature": 0.7},
    "sequence ratios": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "entropy bonus": {"entropy_coef": 0.1},
    "high-entropy tokens": {"top_entropy_quantile": 0.37},
    "accumulation": {"gradient_accumulation_steps": 4, "loss_type": "dapo"},
    "lora": {"lora": True, "learning_rate": 1e-2},
    "head in float32": {"cast_lm_head_to_fp32": True, "bf16": True},
    "autocast": {"bf16": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_patched_trainer_logs_what_an_unpatched_one_logs(folder, tmp_path, name):
    from r1kernels.integrations import trl

    options = CASES[name]
    wanted, wanted_weights = run(folder, tmp_path / "theirs", **options)
    with trl.patch() as patched:
        found, weights = run(folder, tmp_path / "ours", **options)
    # With a reference at least two calls a step: the reference's and the policy's.
    assert patched.calls["_ChunkedLogProbFunction"] >= 2 * STEPS, str(patched)
    assert patched.notes == []
    rounds = name == "autocast"  # products in bfloat16, added up in another order
    assert len(found) == len(wanted) == STEPS
    for row, wanted_row in zip(found, wanted, strict=True):
        assert row.keys() == wanted_row.keys()
        for key, value in wanted_row.items():
            assert row[key] == pytest.approx(value, rel=2e-2 if rounds else 2e-4, abs=2e-3 if rounds else 2e-6), key
    assert any(abs(row["loss"]) > 5e-5 for row in wanted)  # there was something to compare
    # Adam makes a step of full size of the smallest gradient: where that is rounding, its sign is, too.
    assert (weights - wanted_weights).abs().mean() < (3e-4 if rounds else 1e-6)


def test_everything_is_back_afterwards(folder, tmp_path):
    import trl.trainer.utils as utils
    from trl.experimental.cpo import cpo_trainer

    from r1kernels.integrations import trl

    before = utils._ChunkedLogProbFunction, utils.selective_log_softmax, utils._use_triton
    patched = trl.patch()
    assert "trl.trainer.utils._ChunkedLogProbFunction" in patched.replaced
    assert cpo_trainer.selective_log_softmax is utils.selective_log_softmax is not before[1]
    with pytest.raises(RuntimeError, match=r"trl 1\.\d+\.\d+ is patched already; undo that patch first"):
        trl.patch()
    patched.undo()
    assert (utils._ChunkedLogProbFunction, utils.selective_log_softmax, utils._use_triton) == before
    assert cpo_trainer.selective_log_softmax is before[1]


def test_what_the_ops_do_not_serve_stays_with_trl():
    import trl.trainer.utils as utils

    from r1kernels.integrations import trl

    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    call = hidden, weight, None, torch.arange(5), 0.7, 4, 5.0, 1.3
    wanted = utils._ChunkedLogProbFunction.apply(*call)
    with trl.patch() as patched:
        found = utils._ChunkedLogProbFunction.apply(*call)
        assert patched.calls["_ChunkedLogProbFunction"] == 0
        served = utils._ChunkedLogProbFunction.apply(*call, ("log_probs", "entropy"))
        assert patched.calls["_ChunkedLogProbFunction"] == 1
    assert patched.notes == ["an output layer that is asked for log_sum_sq_probs, mean_logits, is_top1 stays TRL's"]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    torch.testing.assert_close(served[:2], wanted[:2])
    assert served[2:] == (None, None, None)


def test_the_functions_match_trl_for_every_option():
    import trl.trainer.utils as utils

    from r1kernels import integrations

    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 37, generator=draw)
    index = torch.randint(37, (2, 5), generator=draw)
    mask = torch.tensor([[1, 1, 0, 1, 1]] * 2)
    for options in ({}, {"temperature": 0.7}, {"row_mask": mask}, {"temperature": 0.7, "row_mask": mask}):
        found, wanted = (m.selective_log_softmax_and_entropy(logits, index, **options) for m in (integrations, utils))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
