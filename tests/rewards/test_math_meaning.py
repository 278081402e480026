"""Names, words, units, sets and families: a table of pairs for each kind, right ones and their wrong neighbours."""

from __future__ import annotations

import pytest

from r1engine.rewards.math.accuracy import judge

# kind -> verdict -> (answer, reference)
KINDS = {
    "named values agree by name": {
        "right": [
            ("(x,y)=(1,2)", "x=1, y=2"), ("\\begin{cases}x=1\\\\y=2\\end{cases}", "x=1, y=2"),
            ("\\text{width}=4, \\text{length}=6", "\\text{length}=6, \\text{width}=4"),
        ],
        "wrong": [
            ("p=7, q=2", "p=2, q=7"), ("(x,y)=(2,1)", "x=1, y=2"), ("x=1,y=2", "(2,1)"),
            ("x=1 \\text{ and } y=2", "x=2,y=1"),
            ("\\theta=30^\\circ, \\phi=60^\\circ", "\\theta=60^\\circ,\\phi=30^\\circ"), ("a=1,b=2,c=3", "(3,2,1)"),
            ("\\text{width}=4, \\text{length}=6", "\\text{width}=6, \\text{length}=4"), ("x=2;y=1", "x=1;y=2"),
            ("x:1, y:2", "x=2,y=1"), ("x=1\\\\ y=2", "x=2, y=1"), ("a=3,b=5", "a=3,b=6"),
            ("\\mu=5,\\sigma=2", "\\mu=2,\\sigma=5"), ("x=1, y=2, z=3", "x=1, y=3, z=2"), ("x = 1, y = 2", "x = 1"),
        ],
        "undecided": [
            ("x_1=2, x_2=3", "x_1=3, x_2=2"), ("m=2,n=1", "1,2"), ("A=1,B=2", "a=1,b=2"),
        ],
    },
    "words and truth values have an order": {
        "right": [
            ("\\text{True, False}", "\\text{True, False}"), ("True, False", "T, F"), ("T, F", "T, F"),
        ],
        "wrong": [
            ("\\text{True, False, True}", "\\text{True, True, False}"), ("T,T,F", "F,T,T"),
            ("\\text{Yes, No}", "\\text{No, Yes}"), ("Yes, No", "No, Yes"),
            ("\\text{F},\\text{T}", "\\text{T},\\text{F}"),
            ("\u6b63\u786e, \u9519\u8bef", "\u9519\u8bef, \u6b63\u786e"), ("(T,F)", "(F,T)"),
            ("\\text{True}, \\text{False}", "\\text{False}, \\text{True}"),
        ],
        "undecided": [
            ("\\text{red, blue, green}", "\\text{green, blue, red}"), ("Monday, Tuesday", "Tuesday, Monday"),
            ("B, A, C", "A, B, C"),
        ],
    },
    "words that are numbers": {
        "right": [
            ("7\\text{ thousand}", "7000"), ("4 \\text{ dozen}", "48"), ("\\$2.5 \\text{ million}", "2500000"),
            ("45 \\text{ percent}", "45\\%"), ("45 \\text{ percent}", "0.45"), ("one dozen", "12"),
            ("two hundred", "200"), ("2 lakh", "200000"), ("three million", "3000000"), ("3 thousandths", "0.003"),
            ("\\$5k", "5000"), ("-3 \\text{ million}", "-3000000"), ("half a million", "500000"),
            ("\\frac{1}{2}\\text{ dozen}", "6"), ("5 dozen eggs", "60"),
        ],
        "wrong": [
            ("1.2 million", "1.2"), ("\\$2.5 \\text{ million}", "2.5"), ("3\u4e07", "3"), ("5\u4ebf", "5"),
            ("3 \\text{ halves}", "3"), ("5M", "5"), ("quarter million", "250000"), ("5 dozen eggs", "5"),
        ],
        "undecided": [
            ("2 \\text{ score}", "2"),
        ],
    },
    "qualifiers are no units": {
        "right": [
            ("2\\text{ cubed}", "8"), ("8 \\text{ below zero}", "-8"), ("5 or more", "5 or more"), ("exactly 5", "5"),
            ("5 \\text{ in total}", "5"),
        ],
        "wrong": [
            ("8 \\text{ below zero}", "8"), ("\\text{at least } 5", "5"), ("5 \\text{ factorial}", "5"),
            ("\u96f6\u4e0b5", "5"), ("5 \\text{ or } 6", "5"), ("5 \\text{ up to } 10", "5"), ("twice 5", "5"),
            ("6 \\text{ or more}", "5 \\text{ or more}"), ("between 4 and 6", "5"),
        ],
        "undecided": [
            ("7 \\text{ or fewer}", "7"), ("7 \\text{ and above}", "7"), ("5\u4ee5\u4e0a", "5"),
            ("5 \\text{ minus}", "5"), ("20 \\text{ percent off}", "20"), ("5 \\text{ inverse}", "5"),
            ("5 \\text{ doubled}", "5"), ("5 \\text{ (mod 7)}", "5"), ("5 \\text{ times as much}", "5"),
            ("5 \\text{ under par}", "5"),
        ],
    },
    "Chinese": {
        "right": [
            ("8\u53ea", "8"), ("100\u5143", "100"), ("x=1\u6216x=2", "1,2"), ("x=1 \u6216 x=2", "2,1"),
            ("\uff083\uff0c4\uff09", "(3,4)"), ("3\uff1a4", "3:4"), ("\u7b54\u6848\u4e3a12", "12"),
            ("\u7b54\uff1a\u4e00\u5171\u670912\u4eba", "12"),
            ("\u7b49\u8170\u4e09\u89d2\u5f62", "\u7b49\u8170\u4e09\u89d2\u5f62"), ("\u4e59", "\u4e59"),
            ("\uff0d\uff11\uff12", "-12"), ("3\u5c0f\u65f620\u5206\u949f", "200\u5206\u949f"), ("a\uff0cb", "a,b"),
            ("5\u30016", "5,6"), ("2\u221a3\u5398\u7c73", "2\\sqrt{3}"),
        ],
        "wrong": [
            ("24\u5e73\u65b9\u7c73", "24\u5e73\u65b9\u5398\u7c73"), ("x=1\u6216x=2", "1,3"), ("A", "B"),
            ("\u65e0\u89e3", "5"), ("50%", "0.05"), ("x\uff1e3", "x<3"), ("k=1\uff0cb=2", "k=2\uff0cb=1"),
            ("\u7b2c5\u4e2a", "5"), ("\u4e0d\u53d8", "\u53d8\u5927"),
        ],
    },
    "sets and intervals": {
        "right": [
            ("\\text{all real numbers}", "(-\\infty,\\infty)"), ("x\\in\\mathbb{R}", "(-\\infty,+\\infty)"),
            ("]0,1]", "(0,1]"), ("[0,1[", "[0,1)"), ("5>x>2", "2<x<5"), ("x \\geq 2", "2 \\leq x"),
            ("\\{x|x>2\\}", "\\{x : x>2\\}"), ("\\{x | 1<x<3\\}", "(1,3)"), ("\\{x | x>3\\}", "(3,\\infty)"),
            ("\\{x \\in \\mathbb{R} : x > 3\\}", "\\{x: x>3\\}"), ("\\langle 3,4\\rangle", "(3,4)"),
            ("3\\geqslant x", "x\\leqslant 3"), ("m>2", "x>2"),
        ],
        "wrong": [
            ("\\{x\\mid x>2\\}", "\\{x: x<2\\}"), ("x<3", "(3,\\infty)"), ("(1,2)\\cup(3,4)", "(1,2)\\cup(3,5)"),
            ("\\begin{pmatrix}3&4\\end{pmatrix}", "(4,3)"), ("[1,2]", "[1,2)"), ("\\{1,2\\}", "(1,2)"),
            ("(-\\infty,\\frac12]", "(-\\infty,0.6]"), ("(2,-2)", "-2<x<2"), ("\\mathbb{Z}", "\\text{all integers}"),
        ],
        "undecided": [
            ("x\\neq1", "(-\\infty,1)\\cup(1,\\infty)"), ("(0, 1]", "{x : 0 < x <= 1}"),
        ],
    },
    "units": {
        "right": [
            ("7 pears", "7"), ("EUR 7", "7"), ("\\text{USD } 7", "7"), ("9\\pi \\text{ square meters}", "9\\pi"),
            ("5x \\text{ meters}", "5x"), ("60 \\text{ km/h}", "60 \\text{ kilometers per hour}"),
            ("2 \\text{ hours } 15 \\text{ minutes}", "2.25 \\text{ hours}"),
            ("5 \\text{ ft } 6 \\text{ in}", "5.5 \\text{ ft}"),
            ("5 \\text{ ft } 6 \\text{ in}", "66 \\text{ inches}"), ("seven apples", "7"),
            ("1 \\text{ L}", "1000 \\text{ cm}^3"), ("12 square feet", "12"), ("20 km per hour", "20"),
            ("7\\ \\mathrm{cm}", "7"), ("5 \\text{m}/\\text{s}", "5"), ("5 \\frac{\\text{miles}}{\\text{hour}}", "5"),
            ("\u00a5500", "500"),
        ],
        "wrong": [
            ("5x \\text{ meters}", "5y"), ("3 kg", "3 lbs"), ("3m", "3"), ("5 abc", "5"), ("5 xy", "5"), ("5ab", "5"),
        ],
        "undecided": [
            ("100 \\text{ apples}", "100 \\text{ oranges}"),
        ],
    },
    "families and conventions": {
        "right": [
            ("x=\\frac{\\pi}{6}+2k\\pi, k\\in\\mathbb{Z}", "\\frac{\\pi}{6}+2n\\pi"),
            ("\\frac{\\pi}{6}+2k\\pi, \\frac{5\\pi}{6}+2k\\pi", "\\frac{\\pi}{6}+2n\\pi, \\frac{5\\pi}{6}+2n\\pi"),
            ("n\\pi \\text{ where } n \\text{ is an integer}", "k\\pi"), ("C(6,2)", "15"), ("{}_6C_2", "15"),
            ("_6C_2", "15"), ("^6C_2", "15"), ("A_5^2", "20"), ("\\vec{i}+2\\vec{j}-\\vec{k}", "(1,2,-1)"),
            ("\\mathbf{i}+2\\mathbf{j}", "(1,2)"), ("\\hat{i}-3\\hat{j}", "\\langle 1,-3\\rangle"),
            ("12:00", "12:00"), ("3:4", "\\frac34"), ("\\text{no real solutions}", "\\text{no solution}"),
            ("k\\pi/2", "n\\pi/2"),
        ],
        "wrong": [
            ("2k\\pi, k\\in\\mathbb{Z}", "n\\pi, n\\in\\mathbb{Z}"),
            ("\\frac{\\pi}{4}+k\\pi", "\\frac{\\pi}{3}+n\\pi"), ("\\text{does not exist}", "5"), ("C(6,2)", "12"),
            ("2:30", "2:35"), ("1:2:3", "1:3:2"), ("0:1", "1:0"), ("y=Ce^{2x}", "y=Ae^{2x}"), ("2n", "2k"),
        ],
    },
}  # fmt: skip
ROWS = [
    pytest.param(answer, reference, verdict, id=f"{kind}: {answer} for {reference}")
    for kind, verdicts in KINDS.items()
    for verdict, pairs in verdicts.items()
    for answer, reference in pairs
]


@pytest.mark.parametrize(("answer", "reference", "verdict"), ROWS)
def test_verdict_follows_what_an_answer_means(answer, reference, verdict):
    assert judge(answer, reference)[0] == verdict
