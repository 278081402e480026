"""Reward models: losses by hand, what is read and left out, and how a prompt and a response are written."""

import json
import math

import pytest
import torch
from chat_folders import KINDS, save_tokenizer
from model_folders import save_model
from transformers import PreTrainedTokenizerFast

from r1engine.batch import RowShape, Sequence, TokenOutputs, pack_units
from r1engine.config import ConfigError, RewardModelConfig
from r1engine.data.comparisons import read_comparisons
from r1engine.data.rated import RatedForm, form_of_folder, form_to_train
from r1engine.data.rated_table import RatedTable
from r1engine.data.reading import Reading
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.rewards.rated import rendered
from r1engine.stages.check import check_data, check_rows
from r1engine.stages.inputs import format_of, write_ratings
from r1engine.stages.reward_loss import pairwise, pointwise

# ------------------------------------------------------------------ losses


def row_of(units: list[list[int]], values: list[float], multiple: int = 1):
    """A row of texts of these lengths; the score of token t of the row is t."""
    weight = 1 / len(units)
    made = [
        [Sequence([5] * n, n - 1, weight, advantage=v) for n in unit] for unit, v in zip(units, values, strict=True)
    ]
    row = pack_units(made, RowShape(64, multiple=multiple))[0][0]
    zeros = torch.zeros(len(row.tokens))
    return row, TokenOutputs(zeros, zeros, score=torch.arange(len(row.tokens)).float().requires_grad_())


@pytest.mark.parametrize("multiple", [1, 16])  # with padding behind the pairs
def test_the_pairwise_loss_by_hand(multiple):
    # Texts of 3, 2, 2, 1 tokens: scored at tokens 2, 4 (chosen, rejected) and 6, 7.
    row, outputs = row_of([[3, 2], [2, 1]], [1.0, 3.0], multiple)
    loss, sums = pairwise(outputs, row, margin=0.5, center=0.1)
    wanted = [math.log(1 + math.exp(2 + 0.5)) + 0.1 * 36, math.log(1 + math.exp(1 + 1.5)) + 0.1 * 169]
    assert loss.item() == pytest.approx(sum(wanted) / 2, rel=1e-6)
    loss.backward()
    grad = outputs.score.grad
    assert grad.nonzero().ravel().tolist() == [2, 4, 6, 7]  # the last token of each text and no other
    slope = [1 / (1 + math.exp(-2.5)) for _ in range(2)]
    assert grad[2].item() == pytest.approx(0.5 * (-slope[0] + 0.2 * 6), rel=1e-5)
    assert grad[7].item() == pytest.approx(0.5 * (slope[1] + 0.2 * 13), rel=1e-5)
    assert {k: v.item() for k, v in sums.items()} == pytest.approx(
        {"accuracy": 0, "difference": -1.5, "chosen": 4, "rejected": 5.5}
    )


def test_ties_count_half_and_a_row_without_pairs_is_zero():
    row, outputs = row_of([[3, 2]], [0.0])
    tie = outputs._replace(score=outputs.score * 0)
    assert pairwise(tie, row)[1]["accuracy"].item() == 0.5 and pairwise(tie, row)[0].item() == pytest.approx(
        math.log(2)
    )
    empty = pack_units([], RowShape(64, multiple=4))[0][0]
    zeros = torch.zeros(4, requires_grad=True)
    for loss in (
        pairwise(TokenOutputs(zeros, zeros, score=zeros), empty),
        pointwise(TokenOutputs(zeros, zeros, score=zeros), empty),
    ):
        assert loss[0].item() == 0 and all(value.item() == 0 for value in loss[1].values())
        loss[0].backward()


def test_the_pointwise_loss_by_hand():
    row, outputs = row_of([[3], [2]], [1.0, 0.0])  # scored at tokens 2 (safe) and 4 (unsafe)
    loss, sums = pointwise(outputs, row)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(4))) / 2)
    loss.backward()
    assert outputs.score.grad.nonzero().ravel().tolist() == [2, 4]
    assert {k: v.item() for k, v in sums.items()} == {"accuracy": 0.5, "score": 3.0}
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(theirs.item())


# ------------------------------------------------------------------ data


@pytest.fixture(scope="module", params=["chatml", "headers"])
def model(request, tmp_path_factory):
    """A model with a chat template; that of "headers" writes a BOS, and so does its tokenizer."""
    folder = tmp_path_factory.mktemp("rated") / request.param
    save_model(folder, "qwen2", vocab_size=320, eos_token_id=None, pad_token_id=None)
    return save_tokenizer(folder, KINDS[request.param])


def settings(model, path, loss="pairwise", **data) -> RewardModelConfig:
    options = {"train": path, "max_tokens": 120} | data
    return RewardModelConfig(model={"path": model}, data=options, reward_model={"loss": loss})


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table_of(cfg, folder) -> RatedTable:
    form = format_of(cfg)
    rated = form_to_train(form, load_tokenizer(cfg.model.folder))
    return RatedTable(write_ratings(cfg, cfg.data.train_file, folder, form, rated, "key"))


def test_a_rated_text_is_the_template_s_and_what_a_server_makes_of_it(model, tmp_path):
    theirs = PreTrainedTokenizerFast.from_pretrained(model)
    talk = [{"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "two"}]
    talk += [{"role": "user", "content": "and 2+2?"}]
    thoughts = "<think>long</think> It is 4."
    rows = [{"prompt": prompt, "chosen": thoughts, "rejected": "5"} for prompt in ("and 2+2?", talk)]
    cfg = settings(model, write(tmp_path / "pairs.jsonl", *rows))
    table, end = table_of(cfg, tmp_path / "tokens"), KINDS[model.name].end
    for index, messages in enumerate([talk[-1:], talk]):
        for tokens, answer in zip(table.at(index).texts, ("It is 4.", "5"), strict=True):  # the summary alone
            answered = [*messages, {"role": "assistant", "content": answer}]
            wanted = theirs.apply_chat_template(answered, tokenize=False).rstrip("\n")
            assert wanted.endswith(end)
            assert tokens == theirs(wanted, add_special_tokens=False).input_ids
    rated = form_to_train(format_of(cfg), load_tokenizer(model))
    text = rendered(rated.template, "and 2+2?", "It is 4.")
    assert theirs(text).input_ids == table.at(0).texts[0]  # as a server does it, which adds its BOS
    # From the folder of the finished model it is the same.
    (model / "rated_template.txt").write_text(rated.template)
    assert form_of_folder(model, None).tokens([rated.head("and 2+2?")], ["It is 4."]) == [table.at(0).texts[0]]
    (model / "rated_template.txt").unlink()


def test_pairs_that_cannot_be_trained_on_are_left_out_and_too_many_are_refused(model, tmp_path):
    fine = [{"prompt": f"say {i}", "chosen": "good", "rejected": "bad", "delta": i, "domain": "x"} for i in range(16)]
    special = KINDS[model.name].special[-1]
    bad = [
        {"prompt": "same", "chosen": "<think>a</think>equal", "rejected": "<think>b</think> equal"},
        {"prompt": "long", "chosen": "x" * 200, "rejected": "y"},
        {"prompt": "forged", "chosen": f"I am{special}the best", "rejected": "y"},
        {"prompt": "silent", "chosen": "<think>for ever", "rejected": "y"},
    ]
    path = write(tmp_path / "pairs.jsonl", *fine, *bad)
    table = table_of(settings(model, path, max_dropped=0.2), tmp_path / "tokens")
    assert len(table) == 16 and table.values.tolist() == list(range(16)) and table.domains == ["x"]
    assert table.lengths().tolist() == [[len(t) for t in table.at(i).texts] for i in range(16)]
    for words in ("4 of 20 pairs (20.0%)", "1 have equal tokens", "1 have more than data.max_tokens = 120 tokens",
                  f"1 hold {special}, a token of", "1 have a response without a summary"):  # fmt: skip
        assert words in table.left_out
    places = [json.loads(line)["place"] for line in (tmp_path / "tokens/key/dropped.jsonl").read_text().splitlines()]
    assert sorted(places) == [f"{path}:{n}" for n in (17, 18, 19, 20)]
    assert check_data(settings(model, path, max_dropped=0.2)) == [f"left out: {table.left_out}"]
    with pytest.raises(ConfigError, match=r"at most data\.max_dropped = 19\.0% may be left out"):
        check_data(settings(model, path, max_dropped=0.19))


def test_labels_see_the_whole_response(model, tmp_path):
    row = {"prompt": "say", "response": "<think>hm</think>no", "safe": True}
    cfg = settings(model, write(tmp_path / "labels.jsonl", row, row | {"safe": False}), "pointwise")
    table = table_of(cfg, tmp_path / "tokens")
    assert table.values.tolist() == [1.0, 0.0] and table.lengths().shape == (2, 1)
    assert "<think>hm</think>no" in PreTrainedTokenizerFast.from_pretrained(model).decode(table.at(0).texts[0])


PAIR = {"prompt": "say", "chosen": "a", "rejected": "b"}
LABEL = {"prompt": "say", "response": "a", "safe": True}


@pytest.mark.parametrize(
    ("loss", "row", "message"),
    [
        ("pairwise", {"prompt": "say", "chosen": "a"}, "found no field 'rejected'"),
        ("pairwise", LABEL, "these are labels: reward_model.loss = pointwise"),
        ("pointwise", PAIR, "these are pairs: reward_model.loss = pairwise"),
        ("pairwise", PAIR | {"chosen": " "}, "chosen is ' ', required a text that is not empty"),
        ("pairwise", PAIR | {"delta": -1}, "delta is -1, required a number >= 0"),
        ("pairwise", PAIR | {"delta": True}, "delta is True, required a number"),
        ("pairwise", PAIR | {"prompt": []}, r"prompt is \[\], required a list that is not empty"),
        ("pairwise", PAIR | {"prompt": [{"role": "assistant", "content": "x"}]}, r"prompt\[0\].role is 'assistant'"),
        ("pointwise", LABEL | {"safe": "yes"}, "safe is 'yes', required true or false"),
        ("pointwise", LABEL | {"safe": 1}, "safe is 1, required true or false"),
        ("pointwise", LABEL | {"domain": ""}, "domain is '', required a text"),
    ],
)
def test_a_row_that_is_none_is_named_with_its_line(tmp_path, loss, row, message):
    path = write(tmp_path / "rows.jsonl", PAIR if loss == "pairwise" else LABEL, row)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:2: .*{message}"):
        check_rows(settings(tmp_path, path, loss))


def test_parquet_rows_are_read_as_lines_are(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    talk = [{"role": "user", "content": "say"}]
    parquet.write_table(pyarrow.Table.from_pylist([PAIR | {"prompt": talk, "delta": 2.0}]), tmp_path / "p.parquet")
    (found,) = read_comparisons(tmp_path / "p.parquet", "pairwise")
    assert (found.prompt, found.responses, found.value) == (talk, ("a", "b"), 2.0)


def test_pairs_of_whole_conversations_are_read_by_columns(tmp_path):
    asked, better, worse = (
        {"role": "user" if text == "say" else "assistant", "content": text} for text in ("say", "a", "b")
    )
    path = write(tmp_path / "rows.jsonl", {"chosen": [asked, better], "rejected": [asked, worse], "score": {"gap": 2}})
    columns = {
        "prompt": "chosen.0.content",
        "chosen": "chosen",
        "rejected": "rejected.-1.content",
        "delta": "score.gap",
    }
    (found,) = read_comparisons(path, "pairwise", Reading(columns))
    assert (found.prompt, found.responses, found.value) == ([asked], ("a", "b"), 2.0)
    with pytest.raises(
        ConfigError, match=r"rows\.jsonl:1: data\.columns: found no column 'prompt' for prompt, only chosen"
    ):
        check_rows(settings(tmp_path, path, "pairwise", columns={"prompt": "prompt"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"columns": {"question": "q"}}}, r"data\.columns: found question, required some of prompt, chosen"),
        ({"reward_model": {"loss": "pointwise", "margin": 1.0}}, r"reward_model\.margin: found 1\.0, required 0"),
        ({"max_row_tokens": 200}, r"max_row_tokens: found 200, required >= 240 = 2 x data\.max_tokens 120"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RewardModelConfig(**{"data": {"max_tokens": 120}} | changes)


def test_the_paper_s_numbers_are_the_defaults():
    cfg = RewardModelConfig()
    assert (cfg.reward_model.batch_size, cfg.reward_model.epochs, cfg.data.max_tokens) == (256, 1, 8192)
    assert (cfg.optimizer.lr, cfg.optimizer.schedule, cfg.sees) == (6e-6, "constant", "summary")
    assert RewardModelConfig(reward_model={"loss": "pointwise"}).sees == "response"


def test_a_template_needs_a_prompt_and_behind_it_a_response(model):
    for template in ("{prompt}", "{response}{prompt}", "{prompt}{prompt}{response}"):
        with pytest.raises(ValueError, match=r"required (one )?\{prompt\}"):
            RatedForm(template, load_tokenizer(model))
    with pytest.raises(ValueError, match=r"rated_template\.txt: no such file, required is the text"):
        form_of_folder(model, None)
