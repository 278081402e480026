"""Files of labelled steps: each form by hand, and what is none of them is named."""

import json

import pytest

from r1engine.data.steps import read_steps

KI = "\u043a\u0438"


def completion(text, rating, flagged=None):
    return {"text": text, "rating": rating, "flagged": flagged}


def prm800k(*steps, finish="solution"):
    """Steps as (completions, chosen index or what a human wrote)."""
    made = [
        {
            "completions": completions,
            "human_completion": chosen if isinstance(chosen, str | dict) else None,
            "chosen_completion": chosen if isinstance(chosen, int) else None,
        }
        for completions, chosen in steps
    ]
    return {"labeler": "x", "question": {"problem": "Q?"}, "label": {"steps": made, "finish_reason": finish}}


OWN = {"id": "17/3", "question": "Q?", "steps": ["a;", "b"], "labels": [1, None], "tokens": [[3, 4], [5]]}
SHEPHERD = {
    "input": f"Q, 1 {KI[0]}? Step 1: 16+3 = 19. {KI}\nStep 2: 9*2 = $18. The answer is: 18 {KI}",
    "label": f"Q, 1 {KI[0]}? Step 1: 16+3 = 19. +\nStep 2: 9*2 = $18. The answer is: 18 -",
}
BENCH = {"id": "gsm8k-0", "problem": "Q?", "steps": ["a", "b", "c"], "label": 1, "final_answer_correct": False}
TRL = {"prompt": "Q?", "completions": ["a", "b"], "labels": [True, False]}


def read(tmp_path, *rows, name="steps.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_steps(path))


def test_each_form_becomes_steps_with_labels(tmp_path):
    own, shepherd, bench, fine, trl = read(
        tmp_path, {"steps_file": 1}, OWN, SHEPHERD, BENCH, BENCH | {"label": -1}, TRL
    )
    assert (own.question, own.steps, own.labels, own.tokens) == ("Q?", ("a;", "b"), (1.0, None), ((3, 4), (5,)))
    assert own.place.endswith("steps.jsonl:2")
    assert shepherd.question == f"Q, 1 {KI[0]}?" and shepherd.labels == (1.0, 0.0) and shepherd.is_of_rollouts
    assert shepherd.steps == ("Step 1: 16+3 = 19.", "Step 2: 9*2 = $18. The answer is: 18")
    assert bench.labels == (1.0, 0.0, None) and not bench.is_of_rollouts
    assert fine.labels == (1.0, 1.0, 1.0)
    assert (trl.question, trl.steps, trl.labels) == ("Q?", ("a", "b"), (1.0, 0.0))


def test_the_alternatives_of_prm800k_are_paths_of_their_own(tmp_path):
    # The shape of the example in its README: two steps with one completion, then alternatives of which none is chosen.
    one = prm800k(
        ([completion("a", 0)], 0),
        ([completion("b", 1)], 0),
        ([completion("c", -1), completion("d", 0), completion("e", 1, True)], None),
        finish="found_error",
    )
    found = [(row.steps, row.labels) for row in read(tmp_path, one)]
    assert found == [
        (("a", "b"), (1.0, 1.0)),
        (("a", "b", "c"), (None, None, 0.0)),  # a label counts once
        (("a", "b", "d"), (None, None, 1.0)),
    ]
    two = prm800k(([completion("a", -1)], {"text": "human", "rating": None}), ([completion("b", 1)], 0))
    gone = prm800k(([completion("a", 1)], 0), finish="bad_problem")
    found = [(row.steps, row.labels) for row in read(tmp_path, gone, two)]
    assert found == [(("human", "b"), (None, 1.0)), (("a",), (0.0,))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (OWN | {"labels": [1]}, "found 2 steps and 1 labels, required equally many"),
        (OWN | {"labels": [1, 1.5]}, r"labels holds 1\.5, required numbers in \[0, 1\]"),
        (OWN | {"tokens": [[1]]}, "found 2 steps and the tokens of 1"),
        (OWN | {"tokens": [[1], ["x"]]}, "required a list of token ids"),
        (OWN | {"steps": ["a", ""]}, "steps is .*required a list of texts that are not empty"),
        (OWN | {"question": " "}, "question is ' '"),
        (SHEPHERD | {"label": SHEPHERD["label"].replace("+\n", "?\n")}, "label differs from input before mark 1"),
        (SHEPHERD | {"input": "Step 1: a", "label": "Step 1: a"}, "found 0 marks"),
        (BENCH | {"label": 3}, "label is 3, required -1 or the index of one of 3 steps"),
        (prm800k(([completion("a", 2)], 0)), "rating is 2, required -1, 0 or 1"),
        ({"question": {}, "label": {}}, "required a row of PRM800K"),
        ({"text": "a"}, r"found no field 'question'.*required `question`, `steps` and `labels`, or a row of PRM800K"),
    ],
)
def test_a_row_that_is_none_is_named_with_its_line(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"steps\.jsonl:2: .*{message}"):
        read(tmp_path, OWN, row)


def test_a_file_without_solutions_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no solution with labelled steps"):
        read(tmp_path, {"steps_file": 1})
