"""The front of the rewards: which rule a record gets, what its score holds, what is computed in workers."""

from __future__ import annotations

import asyncio
import sys

import pytest
from reward_records import record

from r1engine.rewards import Score, Scorer, ScorerSettings
from r1engine.rewards.workers.pool import WorkerPool


@pytest.fixture(scope="module")
def scorer():
    with Scorer(ScorerSettings(workers=1, deadline_seconds=60, with_language=False)) as made:
        yield made


def boxed(answer: str, think: str = "a") -> str:
    return f"<think>{think}</think><answer>\\boxed{{{answer}}}</answer>"


def grade(scorer: Scorer, reward: str, completion: str, answer: str = "", **fields: str) -> Score:
    return scorer.score([record(reward, completion, answer, **fields)])[0]


@pytest.mark.parametrize(
    ("reward", "completion", "answer", "verdict", "components", "reason"),
    [
        ("math", boxed("5"), "5", "right", {"format": 1, "accuracy": 1}, "same number"),
        ("math", "\\boxed{5}", "5", "right", {"format": 0, "accuracy": 1}, "same number; format: found no <think>"),
        ("math", boxed("6"), "5", "wrong", {"format": 1, "accuracy": 0}, "6 is not 5"),
        ("math", boxed("x+1"), "1+x", "right", {"format": 1, "accuracy": 1}, "the same function"),
        ("math", boxed("9^{9^{9}}"), "5", "undecided", {"format": 1}, "the answer has a power in an exponent"),
        (
            "math",
            "hm",
            "5",
            "wrong",
            {"format": 0, "accuracy": 0},
            "no answer block and no \\boxed{}; format",
        ),
        ("choice", boxed("B"), "b", "right", {"format": 1, "accuracy": 1}, "same choice"),
        ("choice", boxed("C"), "B", "wrong", {"format": 1, "accuracy": 0}, "found C, required B"),
        ("choice", boxed("C"), "7", "undecided", {"format": 1}, "the reference is no choice letter"),
        ("exact", boxed("a b"), " a  b", "right", {"format": 1, "accuracy": 1}, "same text"),
        ("exact", boxed("A b"), "a b", "wrong", {"format": 1, "accuracy": 0}, "another text"),
        ("format", boxed("5"), "", "right", {"format": 1}, "well-formed"),
        ("format", "5", "", "wrong", {"format": 0}, "found no <think>"),
    ],
)
def test_record_gets_the_rule_it_names(scorer, reward, completion, answer, verdict, components, reason):
    score = grade(scorer, reward, completion, answer)
    assert (score.verdict, score.components) == (verdict, components)
    assert score.reason.startswith(reason)
    assert score.seconds > 0


def test_language_of_the_thoughts_is_a_reward_of_its_own(scorer):
    chinese = "\u6211\u4eec\u5148\u8bbe\u672a\u77e5\u6570\uff0c\u7136\u540e\u89e3\u65b9\u7a0b\u3002"
    mixed = boxed("5", chinese + "Then we solve the equation and find the answer.")
    score = grade(scorer, "language", mixed, language="zh")
    assert score.verdict == "wrong" and set(score.components) == {"language"}
    assert score.components["language"] == pytest.approx(12 / 21)
    assert score.reason == "57% of 21 words are zh; also 9 Latin script"
    assert grade(scorer, "language", boxed("5", chinese), question=chinese).verdict == "right"
    empty = grade(scorer, "language", boxed("5", "$x=1$"), language="zh")
    assert (empty.verdict, empty.components) == ("undecided", {})
    assert empty.reason == "there are no words outside code and formulas"
    assert grade(scorer, "language", boxed("5", chinese)).reason == "no target language"


def test_language_joins_the_other_components_where_asked_for():
    with Scorer(ScorerSettings(workers=1, deadline_seconds=60, with_language=True)) as scorer:
        english = "We add the two numbers and carry the one."
        done = scorer.score(
            [
                record("math", boxed("1+x", english), "x+1", question="What is the sum of these two numbers?"),
                record("math", boxed("5", english), "5", language="ru"),
                record("math", boxed("5", "$1+1$"), "5", language="ru"),
            ]
        )
    assert [s.components for s in done] == [
        {"format": 1, "accuracy": 1, "language": 1},
        {"format": 1, "accuracy": 1, "language": 0},
        {"format": 1, "accuracy": 1},  # no words: neutral, so no value
    ]


def test_prefilled_think_is_seen_in_the_prompt(scorer):
    text = "a</think><answer>5</answer>"
    assert grade(scorer, "math", text, "5", prompt="... <think>\n").components == {"format": 1, "accuracy": 1}
    assert grade(scorer, "math", text, "5", prompt="...").components == {"format": 0, "accuracy": 1}
    assert grade(scorer, "math", "a \\boxed{5}", "5", prompt="<think>").verdict == "wrong"


def test_blank_think_block_is_a_matter_of_configuration(scorer):
    text = "<think> </think><answer>5</answer>"
    assert grade(scorer, "format", text).reason == "found a blank think block"
    with Scorer(ScorerSettings(workers=1, blank_think_allowed=True)) as lenient:
        assert grade(lenient, "format", text).verdict == "right"


def test_scores_keep_the_order_of_the_records_and_report_progress(scorer):
    records = [record("math", boxed(f"{n}+x" if n % 3 == 0 else str(n)), str(n)) for n in range(60)]
    done = []
    scores = scorer.score(records, on_done=done.append)
    assert [s.verdict for s in scores] == ["wrong" if n % 3 == 0 else "right" for n in range(60)]
    assert done == scores


def test_what_text_settles_starts_no_process():
    scorer = Scorer()
    assert grade(scorer, "math", boxed("5"), "5").verdict == "right"
    assert isinstance(scorer._pool, WorkerPool) and scorer._pool._thread is None
    scorer.close()


def test_missed_deadline_is_undecided_and_spares_the_others():
    # Within every size limit; SymPy alone takes longer to import. The others need no worker.
    slow = "\\sin(x)^{20}\\cos(y)^{20}\\tan(x+y)^{13}"
    with Scorer(ScorerSettings(workers=1, deadline_seconds=0.05)) as scorer:
        scores = scorer.score(
            [
                record("math", boxed(slow), slow.replace("(x+y)", "(y+x)")),
                record("math", boxed("0.5"), "1/2"),
                record("math", boxed("5"), "5"),
            ]
        )
    assert [s.verdict for s in scores] == ["undecided", "right", "right"]
    assert scores[0].reason == "no result within 0.05 s"
    assert scores[0].components == {"format": 1.0}


def test_ten_megabytes_and_broken_unicode_are_graded_like_anything_else(scorer):
    long = grade(scorer, "math", "x" * 10_000_000 + boxed("5"), "5")
    assert (long.verdict, long.components["format"]) == ("right", 0)
    assert grade(scorer, "math", "\\boxed{" * 1_000_000, "5").verdict == "wrong"
    assert grade(scorer, "math", "\\boxed{" * 500_000 + "5" + "}" * 500_000, "5").verdict == "wrong"
    assert grade(scorer, "math", boxed("5" * 100_000), "5").reason == "longer than 2000 characters"
    assert grade(scorer, "math", "<" * 10_000_000, "5").reason.startswith("no answer block")
    assert grade(scorer, "math", boxed("\udcff\ud800"), "5").verdict == "wrong"


def test_works_from_asyncio(scorer):
    async def main() -> list[Score]:
        return await asyncio.gather(*(scorer.run(record("math", boxed(a), "x+1")) for a in ("1+x", "2+x")))

    assert [s.verdict for s in asyncio.run(main())] == ["right", "wrong"]


def test_references_that_no_rule_can_use_are_found(scorer):
    references = [
        "5",
        "\\frac{1+x}{2}",
        "\\sqrt{",
        "B",
        "no solution",
        "1,2,\\ldots,n",
        "9^{9^{9}}",
        "(1, \\sqrt{)",
        "$",
    ]
    records = [record("math", "", reference) for reference in references] + [record("choice", "", "seven")]
    assert [(record.question.answer, problem) for record, problem in scorer.unusable_references(records)] == [
        ("\\sqrt{", "cannot be read"),
        ("1,2,\\ldots,n", "is a pattern with an ellipsis"),
        ("9^{9^{9}}", "has a power in an exponent"),
        ("(1, \\sqrt{)", "cannot be read"),
        ("$", "is blank"),
        ("seven", "is no choice letter"),
    ]


def test_language_detector_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "lingua", None)  # as if it were not there
    with pytest.raises(ValueError, match=r"language_detector lingua is not installed, required: pip install 'r1engine"):
        Scorer(ScorerSettings(detector="lingua"))


def test_unknown_reward_is_refused(scorer):
    with pytest.raises(ValueError, match="Scorer: found reward 'mathz', required one of math, choice, exact"):
        grade(scorer, "mathz", boxed("5"), "5")
