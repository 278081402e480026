"""The accuracy rule: which answer counts, and when it is right, wrong or undecided."""

from __future__ import annotations

import threading

import pytest

from r1engine.rewards.extract import MAX_ANSWER_CHARACTERS, final_answer
from r1engine.rewards.math.accuracy import judge, judge_at_once, reference_problem_at_once
from r1engine.rewards.math.size import MAX_CHARACTERS

# ---- which answer counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think><answer>5</answer>", "5"),
        ("<think>a</think><answer> so \\boxed{5} </answer>", "5"),
        ("<think>a</think> It is \\boxed{5}.", "5"),
        ("\\boxed{5}", "5"),  # a base model that does not think
        ("<answer>5</answer>", "5"),
        ("<think>\\boxed{1}</think>\\boxed{2}", "2"),  # thoughts do not count
        ("<think>a</think><think>b</think><answer>5</answer>", "5"),
        ("<think>a</think>\\boxed{1} or \\boxed{2}", "2"),  # the last box
        ("<think>a</think><answer>1</answer><answer>2</answer>", "2"),  # the last block
        ("<think>a</think>\\boxed{9}<answer>1</answer>", "1"),  # the block before a box outside
        ("<think>a</think><answer>1</answer>\\boxed{9}", "1"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{a} then \\boxed{\\text{b {c}}}", "\\text{b {c}}"),
    ],
)
def test_final_answer_is(text, answer):
    assert final_answer(text) == (answer, "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no answer block and no \\boxed{}"),
        ("the answer is 5", "no answer block and no \\boxed{}"),
        ("<think>\\boxed{5}</think>done", "no answer block and no \\boxed{}"),
        ("<think>\\boxed{5}", "the think block is not closed"),
        ("<think>a<answer>5</answer>", "the think block is not closed"),
        ("<think>a</think><answer>5</answer><think>", "the think block is not closed"),
        ("<think>a</think><answer>5", "the answer block is not closed"),
        ("<think>a</think><answer>1</answer><answer>5", "the answer block is not closed"),
        ("\\boxed{1} \\boxed{5", "the last \\boxed{ is not closed"),
        ("\\boxed{1\\}", "the last \\boxed{ is not closed"),
        ("\\boxed 5", "the last \\boxed{ is not closed"),
        ("<think>a</think><answer> </answer>", "the answer is blank"),
        ("\\boxed{}", "the answer is blank"),
    ],
)
def test_there_is_no_final_answer(text, why):
    assert final_answer(text) == (None, why)


def test_prefilled_think_block_must_be_closed():
    assert final_answer("so 5 \\boxed{5}", think_prefilled=True) == (None, "the think block is not closed")
    assert final_answer("so 5</think>\\boxed{5}", think_prefilled=True) == ("5", "")


# ---- verdicts --------------------------------------------------------------------------------------------------

RIGHT = [
    ("5", "5"),
    ("5.0", "5"),
    ("+5", "5"),
    ("- 5", "-5"),
    ("\u22125", "-5"),
    ("007", "7"),
    ("1,000", "1000"),
    ("1{,}000.5", "1000.5"),
    ("$\\frac{1}{2}$", "0.5"),
    ("\\dfrac12", "1/2"),
    ("1 1/2", "3/2"),
    ("-1\\frac{1}{2}", "-1.5"),
    ("The answer is 7.", "7"),
    ("x = 7", "7"),
    ("y=2x+1", "2x+1"),
    ("B", "B"),
    ("(B)", "B"),
    ("no solution", "\\text{No solution}"),
    ("10\\text{ cm}", "10"),  # a unit may be missing
    ("10", "10 cm"),
    ("90^\\circ", "90"),
    ("\\$5", "5"),
    ("50 percent", "50\\%"),
    ("10%", "0.1"),
    ("\\left( 1, \\frac{1}{2} \\right)", "(1,0.5)"),
    ("2, 1", "\\{1,2\\}"),
    ("1,2", "(1,2)"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    ("12_3", "12_{3}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("3\\times 10^5", "300000"),
]
RIGHT_BY_MATH_VERIFY = [
    ("x+1", "1+x"),
    ("\\sqrt{2}", "\\frac{2}{\\sqrt 2}"),
    ("1/3+1/6", "1/2"),
    ("1.414214", "\\sqrt{2}"),
    ("1,-1", "\\pm 1"),
    ("\\begin{pmatrix}1\\\\x+2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2+x \\end{pmatrix}"),
]
WRONG = [
    ("", "5"),
    ("6", "5"),
    ("0.3333", "1/3"),  # decimals are not rounded
    ("12.0000000001", "12"),
    ("1 2 3 4 5 6 7", "7"),
    ("3 4", "7"),  # read as a sum
    ("x=1=2=7", "7"),
    ("5 or 6", "5"),
    ("5,6", "5"),
    ("\\{5\\}", "5"),
    ("(1,2)", "\\{1,2\\}"),
    ("(2,1)", "(1,2)"),
    ("(1,2]", "(1,2)"),
    ("[1,2)", "(1,2]"),
    ("1,2", "1,2,2"),
    ("1,1,2", "1,2,2"),
    ("1,1", "1,2"),
    ("1,2", "1,2,3"),
    ("7%", "10"),
    ("12_4", "12_3"),
    ("11_3", "12"),
    ("C", "B"),
    ("two solutions", "no solution"),
    ("0.5\\ldots", "0.5"),
    ("\\sqrt{", "2\\sqrt{2}"),
    ("__import__('os').system('true')", "5"),
    ("-\\infty", "\\infty"),
    ("\u0661", "1"),  # an Arabic-Indic digit one
    ("1/\u0662", "1/2"),
    ("hello", "10\\%"),
    ("x+y=3", "(1,2)"),
    ("$", "5"),
    ("\\frac{1}{0}", "1"),
]
WRONG_THOUGH_MATH_VERIFY_ROUNDS_IT = [
    ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
    ("\\frac{1}{200!}", "\\frac{1}{204!}"),
    ("\\frac{2^{2005}+1}{3\\cdot 2^{2006}}", "\\frac{1}{3\\cdot 2^{2006}}"),
    ("10^{-7}+10^{-8}", "10^{-7}"),
    ("10^{-20}+10^{-30}", "10^{-20}"),
    ("1-1/\\mathrm e", "1+1/\\mathrm e"),
    ("3x-y+13=0", "3x+4y+14=0"),
]
UNDECIDED = [
    ("5", "", "the reference is blank"),
    (".", "$", "the reference is blank"),
    ("\\sqrt{2}\\%", "\\sqrt{2}", "the same value with and without percent"),
    ("5", "\\sqrt{", "the reference cannot be read"),
    ("10%", "10", "the same number with and without percent"),
    ("100\\text{ apples}", "100 people", "units differ: apple and people"),
    ("12_3", "12", "the same digits with and without a base"),
    ("x>3", "(3,\\infty)", "an interval against an inequality"),
    ("1,2,\\ldots,n", "1,3,5,\\ldots,2n-1", "the reference is a pattern with an ellipsis"),
    ("act", "cat", "the same letters in another order"),
    ("9^{9^{9^9}}", "5", "the answer has a power in an exponent"),
    ("9**9**9", "5", "the answer has a power in an exponent"),
    ("9^9^9", "5", "the answer has a power in an exponent"),
    ("2^{1+9^9}", "5", "the answer has a power in an exponent"),
    ("2^{99999}", "5", "the answer has an exponent above 4000"),
    ("\\frac{x^{800}-1}{x-1}", "1", "the answer has an exponent above 60"),
    ("100000000!", "5", "the answer has a factorial of more than 1000 or of a factorial"),
    ("((20!)!)!", "5", "the answer has a factorial of more than 1000 or of a factorial"),
    ("2^{10!}", "5", "the answer has a factorial in an exponent"),
    ("\\sum_{k=1}^{10000} k", "55", "the answer has a sum, product or binomial of large numbers"),
    ("\\binom{10^9}{5}", "5", "the answer has a sum, product or binomial of large numbers"),
    ("(" * 60 + "1" + ")" * 60, "5", "the answer has more than 50 brackets inside each other"),
    ("1" * 401 + "+x", "5", "the answer has a number of more than 400 digits"),
    ("1+" * MAX_CHARACTERS, "5", f"the answer is an expression of more than {MAX_CHARACTERS} characters"),
    ("5" * (MAX_ANSWER_CHARACTERS + 1), "5", f"longer than {MAX_ANSWER_CHARACTERS} characters"),
]


@pytest.mark.parametrize(("answer", "reference"), RIGHT)
def test_right_without_math_verify(answer, reference, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)  # importing it would raise
    assert judge(answer, reference)[0] == "right"


BY_VALUES = ("the same number", "the same function", "the same equation")


@pytest.mark.parametrize(("answer", "reference"), RIGHT_BY_MATH_VERIFY)
def test_right_by_math_verify(answer, reference):
    verdict, reason = judge(answer, reference)
    assert verdict == "right" and reason in (*BY_VALUES, "equal by Math-Verify")


@pytest.mark.parametrize(("answer", "reference"), [*WRONG, *WRONG_THOUGH_MATH_VERIFY_ROUNDS_IT])
def test_wrong(answer, reference):
    assert judge(answer, reference)[0] == "wrong"


@pytest.mark.parametrize(("answer", "reference", "reason"), UNDECIDED)
def test_undecided_says_why(answer, reference, reason):
    assert judge(answer, reference) == ("undecided", reason)


def test_long_numbers_compare_exactly():
    assert judge("1" * 900, "1" * 900)[0] == "right"
    assert judge("1" * 900, "1" * 899 + "2")[0] == "wrong"


@pytest.mark.parametrize("answer", ["", " ", "$", ".", "\\text{}"])
def test_answer_of_which_nothing_is_left_is_blank(answer):
    assert judge(answer, "5") == ("wrong", "the answer is blank")


@pytest.mark.parametrize(
    "part",
    [
        "\\frac",
        "\\text{",
        "\\sqrt[",
        "^{",
        "\\color{red}",
        "**",
        "x=1,",
        "so ",
        "\u9009and ",
        "five ",
        "x\u00b2",
        "m/s ",
        "(1,",
        "\\\\ ",
    ],
)
def test_what_repeats_without_end_is_never_right_and_raises_nothing(part):
    answer = (part * MAX_ANSWER_CHARACTERS)[: MAX_ANSWER_CHARACTERS - 1]
    for found, required in ((answer, "5"), ("5", answer), (answer + "z", "x+1")):
        decided = judge_at_once(found, required)
        assert decided is None or decided[0] != "right"
    reference_problem_at_once(answer)


def test_judging_works_off_the_main_thread():
    # Math-Verify's own time limits use SIGALRM and raise there.
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(judge("x+1", "1+x")[0]))
    thread.start()
    thread.join()
    assert verdicts == ["right"]
