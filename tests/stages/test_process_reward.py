"""Process reward models: losses by hand, where a step's label stands, what is left out, and measures by hand."""

import itertools
import json
import math

import pytest
import torch
from chat_folders import KINDS, save_tokenizer
from model_folders import save_model

from r1engine.batch import RowShape, Sequence, TokenOutputs, pack
from r1engine.config import ConfigError, ProcessRewardConfig
from r1engine.data.step_table import StepTable, learned
from r1engine.evaluation.steps import first_error, process_bench, step_measures
from r1engine.hf.tokenizer import load_tokenizer
from r1engine.stages.check import check_data, check_rows
from r1engine.stages.inputs import format_of, write_step_tokens
from r1engine.stages.process_loss import cross_entropy_of_steps, squared_error_of_steps

# ------------------------------------------------------------------ losses


def row_of(*targets, multiple=1):
    """Two solutions of 4 and 3 tokens, whose tokens count from 10, with these targets."""
    items = [Sequence(list(range(10, 14)), 0, 0.5, targets=targets), Sequence([14, 15, 16], 0, 0.5, targets=())]
    return pack(items, RowShape(64, multiple=multiple))[0][0]


@pytest.mark.parametrize("multiple", [1, 8])
def test_cross_entropy_by_hand(multiple):
    row = row_of((1, 1.0), (3, 0.25), multiple=multiple)
    z = torch.full((len(row.tokens),), 7.0)
    z[1], z[3] = 0.0, 2.0
    z.requires_grad_()
    loss, sums = cross_entropy_of_steps(TokenOutputs(z.detach(), z.detach(), score=z), row)
    assert loss.item() == pytest.approx((0.693147 + 1.626928) / 2, abs=1e-6) and loss.item() == pytest.approx(1.160038)
    loss.backward()
    assert z.grad.nonzero().ravel().tolist() == [1, 3]
    assert z.grad[[1, 3]].tolist() == pytest.approx([-0.25, 0.315399], abs=1e-6)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(z[[1, 3]], torch.tensor([1.0, 0.25]))
    assert loss.item() == pytest.approx(theirs.item())
    sigmoid = 1 / (1 + math.exp(-2))
    assert {k: v.item() for k, v in sums.items()} == pytest.approx(
        {"accuracy": 0.25, "score_right": 0.25, "share_right": 0.5, "score_wrong": sigmoid / 2}
    )


def test_squared_error_by_hand():
    row = row_of((1, 1.0), (3, 0.25))
    z = torch.zeros(len(row.tokens), requires_grad=True)
    loss, _ = squared_error_of_steps(TokenOutputs(z.detach(), z.detach(), score=z), row)
    assert loss.item() == pytest.approx((0.25 + 0.0625) / 2)
    loss.backward()
    assert z.grad[1].item() == pytest.approx(0.5 * 2 * -0.5 * 0.25)


def test_a_score_is_of_the_prefix_with_the_token_that_ends_the_step():
    # A model whose score of a prefix is its last token: the label stands at the token itself, not at the next one.
    row = row_of((1, 0.0), (3, 0.0))
    weighted = row.tokens[row.loss_weight > 0]
    assert weighted.tolist() == [11, 13]
    z = row.tokens.float()
    loss, _ = cross_entropy_of_steps(TokenOutputs(z, z, score=z), row)
    assert loss.item() == pytest.approx((11 + 13) / 2, abs=1e-4)


def test_steps_behind_the_first_error_are_learned_only_as_values():
    nan = math.nan
    assert learned([1, nan, 0, 1, 0], "drop") == [0, 2] and learned([1, nan, 0, 1, 0], "keep") == [0, 2, 3, 4]
    assert learned([0.5, 0.25, nan], "drop") == [0, 1] and learned([nan, 0.0, 0.0], "drop") == [1]


# ------------------------------------------------------------------ measures


def test_process_bench_by_hand():
    found = process_bench([-1, 2, 1, -1], [-1, 2, 0, 1])
    assert found == pytest.approx({"error_accuracy": 1 / 3, "correct_accuracy": 1.0, "f1": 0.5})
    assert process_bench([-1], [-1]) == {"correct_accuracy": 1.0}
    assert process_bench([0, 0], [-1, 1]) == {"error_accuracy": 0.0, "correct_accuracy": 0.0, "f1": 0.0}
    assert first_error([0.9, 0.5, 0.4, 0.1]) == 2 and first_error([0.9]) == -1 and first_error([None, 0.1]) is None


def test_measures_by_hand_and_unknown_labels_count_in_nothing():
    found = step_measures([[0.9, 0.2, 0.7], [0.6, 0.4], [0.5]], [(1.0, 0.0, None), (1.0, 1.0), (None,)])
    assert found["accuracy"] == 0.75 and found["share_right"] == 0.75 and found["auc"] == 1.0
    assert found["score_right"] == pytest.approx((0.9 + 0.6 + 0.4) / 3) and found["score_wrong"] == 0.2
    assert found["rmse"] == pytest.approx(math.sqrt((0.01 + 0.04 + 0.16 + 0.36) / 4))
    # Solution 1: first error 1, said 1; solution 2: none, said 1; solution 3 is unknown.
    assert (found["error_accuracy"], found["correct_accuracy"], found["f1"]) == (1.0, 0.0, 0.0)
    assert step_measures([[0.5]], [(None,)]) == {}
    # Confidence 0.9, 0.8, 0.6, 0.6, of which the last is wrong: bins 0.1 wide from 0.5 on hold 1, 1 and 2.
    wanted = (abs(0.9 - 1) + abs(0.8 - 1) + 2 * abs(0.6 - 0.5)) / 4
    assert found["calibration_error"] == pytest.approx(wanted)


# ------------------------------------------------------------------ data


@pytest.fixture(scope="module", params=["chatml", "headers"])
def model(request, tmp_path_factory):
    """A model with a chat template; that of "headers" writes a BOS, and so does its tokenizer."""
    folder = tmp_path_factory.mktemp("steps") / request.param
    save_model(folder, "qwen2", vocab_size=320, eos_token_id=None, pad_token_id=None)
    return save_tokenizer(folder, KINDS[request.param])


def settings(model, path, **data) -> ProcessRewardConfig:
    options = {"train": path, "max_tokens": 120} | data
    return ProcessRewardConfig(model={"path": model}, data=options, steps={"marks": ["\n\n", ";"]})


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table_of(cfg, folder) -> StepTable:
    return StepTable(write_step_tokens(cfg, cfg.data.train, folder, format_of(cfg), "key"))


ROW = {"question": "What is 1+1?", "steps": ["one;", "and one", "are two"], "labels": [1, 0.5, None]}


def test_steps_are_tokenized_one_by_one_and_end_where_their_last_token_stands(model, tmp_path):
    tokenizer = load_tokenizer(model)
    cfg = settings(model, write(tmp_path / "s.jsonl", ROW, ROW | {"labels": [0, None, None]}))
    table, form = table_of(cfg, tmp_path / "t"), format_of(cfg)
    found = table.at(0)
    prompt = form.encode_prompts([form.prompt("What is 1+1?", "")])[0]
    assert found.tokens[: len(prompt)] == prompt
    starts = [len(prompt), *[last + 1 for last in found.last]]
    texts = [tokenizer.decode(found.tokens[a:b]) for a, b in itertools.pairwise(starts)]
    assert [text.strip(" ") for text in texts] == ["one;", "and one\n\n", "are two"]  # marks are put where none is
    assert starts[-1] == len(found.tokens)
    assert found.labels[:2] == [1.0, 0.5] and math.isnan(found.labels[2])
    assert len(table) == 2 and table.of_rollouts == 0 and table.lengths().tolist() == [len(found.tokens)] * 2


def test_drawn_tokens_are_kept_if_they_are_of_this_tokenizer(model, tmp_path):
    tokenizer = load_tokenizer(model)
    letters = [[tokenizer.encode_continuations([c])[0].ids[0] for c in step] for step in ROW["steps"]]
    drawn = ROW | {"tokens": letters, "source": "rollouts/each"}
    of_another = ROW | {"tokens": [[5], [6], [7]], "labels": [0, 0, 0]}
    table = table_of(settings(model, write(tmp_path / "s.jsonl", drawn, of_another)), tmp_path / "t")
    first, second = table.at(0), table.at(1)
    assert first.tokens[-len(letters[2]) :] == letters[2] and first.last[2] - first.last[1] == len(letters[2])
    assert second.last[2] - second.last[1] < len(letters[2]) and table.of_rollouts == 0.5


def test_a_marker_in_steps_is_left_out_where_the_drawn_tokens_are_not_of_this_tokenizer(model, tmp_path):
    special = KINDS[model.name].special[-1]
    forged = ROW | {"steps": [f"one{special};", "and one", "are two"], "tokens": [[5], [6], [7]]}
    path = write(tmp_path / "s.jsonl", ROW, ROW | {"labels": [0] * 3}, forged)
    table = table_of(settings(model, path, max_dropped=0.4), tmp_path / "t")
    assert len(table) == 2 and f"1 hold {special}, a token of" in table.left_out


def test_what_cannot_be_trained_on_is_left_out_or_refused(model, tmp_path):
    special = KINDS[model.name].special[-1]
    bad = [ROW | {"labels": [None] * 3}, ROW | {"steps": ["x" * 200, "b", "c"]}, ROW | {"question": f"a{special}"}]
    path = write(tmp_path / "s.jsonl", ROW, ROW | {"labels": [0] * 3}, *bad)
    table = table_of(settings(model, path, max_dropped=0.6), tmp_path / "t")
    for words in ("3 of 5 solutions", "1 have no labelled step", "1 have more than data.max_tokens = 120 tokens",
                  f"1 hold {special}, a token of"):  # fmt: skip
        assert words in table.left_out
    with pytest.raises(ConfigError, match=r"at most data\.max_dropped = 50\.0% may be left out"):
        check_data(settings(model, path, max_dropped=0.5))
    alike = write(tmp_path / "alike.jsonl", ROW | {"labels": [1, 1, 1]})
    with pytest.raises(ConfigError, match=r"alike\.jsonl: all labels of steps are 1, required right and wrong steps"):
        check_data(settings(model, alike))
    with pytest.raises(ConfigError, match=r"s\.jsonl:1: found 3 steps and 2 labels"):
        check_rows(settings(model, write(tmp_path / "s.jsonl", ROW | {"labels": [1, 0]})))


def test_a_solution_must_fit_a_row():
    with pytest.raises(ValueError, match=r"max_row_tokens: found 100, required >= 120 = data\.max_tokens 120"):
        ProcessRewardConfig(data={"max_tokens": 120}, max_row_tokens=100)
