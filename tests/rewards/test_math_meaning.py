"""Names, words, units, sets and families: a table of pairs for each kind, right ones and their wrong neighbours."""

from __future__ import annotations

import pytest
from verdict_tables import rows

from r1engine.rewards.math.accuracy import judge

# kind -> verdict -> (answer, reference)
KINDS = {
    "named values agree by name": {
        "right": [
            ("5 = p", "5"), ("f(t)=3t", "y=3t"),
            ("\\begin{cases}x=1\\\\y=2\\end{cases}", "x=1, y=2"), ("m=1,n=2", "1,2"),
            ("\\sin A=\\frac35, \\cos A=\\frac45", "\\cos A=\\frac45,\\sin A=\\frac35"),
            ("\\begin{cases}x=2\\\\y=1\\end{cases}", "\\begin{cases}y=1\\\\x=2\\end{cases}"),
        ],
        "wrong": [
            ("p=5", "q=6"), ("\\log_{4}(8)=\\frac32", "\\log_{9}(81)=2"),
            ("p=7, q=2", "p=2, q=7"), ("(x,y)=(2,1)", "x=1, y=2"), ("x=1 \\text{ and } y=2", "x=2,y=1"),
            ("\\theta=30^\\circ, \\phi=60^\\circ", "\\theta=60^\\circ,\\phi=30^\\circ"), ("a=1,b=2,c=3", "(3,2,1)"),
            ("\\text{width}=4, \\text{length}=6", "\\text{width}=6, \\text{length}=4"), ("x=2;y=1", "x=1;y=2"),
            ("x:1, y:2", "x=2,y=1"), ("a=3,b=5", "a=3,b=6"), ("\\mu=5,\\sigma=2", "\\mu=2,\\sigma=5"),
            ("u=-1, v=4", "u=4, v=-1"), ("\\lambda=2,\\mu=3", "\\lambda=3,\\mu=2"), ("x=1 \\quad y=2", "x=1, y=2"),
            ("A=(1,2), B=(3,4)", "A=(3,4), B=(1,2)"), ("(2,1)", "x=1, y=2"), ("\\{x=1, y=2\\}", "\\{x=2,y=1\\}"),
            ("boys = 12, girls = 15", "boys=15, girls=12"),
        ],
        "undecided": [
            ("p=5", "q=5"),
            ("x_1=2, x_2=3", "x_1=3, x_2=2"), ("A=1,B=2", "a=1,b=2"), ("X=1,Y=2", "x=1,y=2"),
        ],
    },
    "words and truth values have an order": {
        "right": [
            ("\\text{True, False}", "\\text{True, False}"), ("True, False", "T, F"),
            ("\\text{T, T, F}", "\\text{T, T, F}"), ("\\text{true},\\text{false}", "T,F"),
        ],
        "wrong": [
            ("T,T,F", "F,T,T"), ("\\text{F},\\text{T}", "\\text{T},\\text{F}"), ("(T,F)", "(F,T)"),
            ("\\text{True}, \\text{False}", "\\text{False}, \\text{True}"),
            ("\\text{Yes}, \\text{Yes}, \\text{No}", "\\text{Yes}, \\text{No}, \\text{Yes}"),
            ("\u5bf9, \u9519", "\u9519, \u5bf9"), ("Y, N, Y", "N, Y, Y"), ("T, F", "T, F, T"),
            ("\\text{True and False}", "\\text{False and True}"), ("(\\text{T},\\text{F})", "(\\text{F},\\text{T})"),
        ],
        "undecided": [
            ("\\text{red, blue, green}", "\\text{green, blue, red}"), ("Monday, Tuesday", "Tuesday, Monday"),
            ("B, A, C", "A, B, C"), ("\\text{odd, even}", "\\text{even, odd}"),
            ("increasing, decreasing", "decreasing, increasing"), ("C, A, B", "A, B, C"),
        ],
    },
    "words that are numbers": {
        "right": [
            ("4 \\text{ dozen}", "48"), ("1.2 million", "1200000"), ("2.5 \\text{ million dollars}", "\\$2,500,000"),
            ("5 \\text{ million}", "5{,}000{,}000"), ("5\u4ebf", "500000000"), ("2 \\text{ thousand people}", "2000"),
            ("half a million", "500000"), ("7 hundred", "700"), ("\\text{9 thousand}", "9000"),
            ("\\text{12 percent}", "0.12"), ("6 \\text{ thousand}", "6000.0"), ("5\\text{-million}", "5"),
            ("one hundred", "100"), ("4.5\u4ebf", "450000000"), ("2\\frac12 \\text{ million}", "2500000"),
            ("3 \\text{ hundred thousand}", "300000"),
        ],
        "wrong": [
            ("\\$2.5 \\text{ million}", "2.5"), ("5\u4ebf", "5"), ("7 hundred", "7"), ("one million", "1"),
            ("3\u5343", "3"), ("2\u767e", "2"),
        ],
        "undecided": [
            ("5\\text{k}", "5"), ("12 \\text{ percent}", "12"),
        ],
    },
    "qualifiers are no units": {
        "right": [
            ("8 \\text{ below zero}", "-8"), ("5 \\text{ factorial}", "120"), ("about 5", "5"),
            ("5 \\text{ square}", "5"), ("3 \\text{ squared}", "9"), ("3 \\text{ cubed}", "27"),
            ("6 \\text{ left}", "6"),
        ],
        "wrong": [
            ("less than 5", "5"), ("5 \\text{ remainder } 2", "5"), ("5 \\text{ or } 6", "5"), ("negative 5", "5"),
            ("3 \\text{ squared}", "3"), ("\\text{minimum } 6", "6"), ("6 \\text{ modulo } 7", "6"),
            ("6 \\text{ plus } 1", "6"),
        ],
        "undecided": [
            ("7 \\text{ or greater}", "7"), ("3 \\text{ minimum}", "3"), ("5 \\text{ in debt}", "5"),
            ("9 \\text{ or above}", "9"), ("9 \\text{ or over}", "9"), ("9 \\text{ and under}", "9"),
            ("6 \\text{ below}", "6"), ("6 \\text{ down}", "6"), ("6 \\text{ more}", "6"),
        ],
    },
    "Chinese": {
        "right": [
            ("3.5\u5343\u514b", "3.5"), ("50\u7c73/\u5206", "50"), ("15\u5206\u949f", "15"),
            ("x=1 \u6216 x=2", "2,1"), ("1\u62162", "1,2"), ("\uff5b1\uff0c2\uff5d", "\\{1,2\\}"),
            ("\u65e0\u89e3", "\\emptyset"), ("\uff13\uff0e\uff15", "3.5"), ("\uff17\uff0f\uff18", "7/8"),
            ("150\u5143", "150\u5143"), ("20\u7c73", "20"), ("6\u672c", "6"), ("\u7ea6\u4e3a24", "24"),
            ("\u7532", "\u7532"), ("\u65e0\u89e3", "\\emptyset"), ("\uff0d\uff11\uff0f\uff12", "-1/2"),
        ],
        "wrong": [
            ("50%", "0.05"), ("x\uff1e3", "x<3"), ("k=1\uff0cb=2", "k=2\uff0cb=1"), ("6\u672c", "7"),
            ("x=2\uff0cy=3", "x=3\uff0cy=2"), ("\u7532", "\u4e19"), ("\u6b63\u6570", "\u8d1f\u6570"),
            ("x\uff1c1", "x>1"), ("\u7b2c3", "3"),
        ],
    },
    "sets and intervals": {
        "right": [
            ("\\text{all real numbers}", "(-\\infty,\\infty)"), ("all real numbers", "\\mathbb{R}"),
            ("x \\geq 2", "2 \\leq x"), ("\\{x|x>2\\}", "\\{x : x>2\\}"), ("\\{x | x>3\\}", "(3,\\infty)"),
            ("\\begin{pmatrix}3\\\\4\\end{pmatrix}", "(3,4)"), ("(2,5)", "\\{x: 2<x<5\\}"),
            ("\\{x\\,|\\,x\\leqslant 3\\}", "\\{x \\mid x \\le 3\\}"), ("\\mathbf{R}", "\\mathbb{R}"),
            ("]2,5]", "(2,5]"), ("3\\geq x>-1", "-1<x\\le 3"), ("x>-1, x<3", "-1<x<3"),
            ("\\{x \\in \\mathbb{R} \\mid x<5\\}", "\\{x\\mid x<5\\}"),
        ],
        "wrong": [
            ("(3,\\infty)", "x>4"), ("x\\ne 1", "x \\neq 2"), ("\\begin{pmatrix}3&4\\end{pmatrix}", "(4,3)"),
            ("\\R", "\\mathbb{R}"), ("3\\geq x>-1", "-1\\le x<3"), ("\\{x|x<5\\}", "\\{x|x\\le5\\}"),
            ("\\mathbb{R} \\backslash \\{3\\}", "\\mathbb{R}\\setminus\\{3\\}"), ("x\\in(1,5)", "[1,5]"),
        ],
        "undecided": [
            ("\\mathbb{R}\\setminus\\{3\\}", "x \\neq 3"), ("0 < a < 1", "(0,1)"), ("2<x\\leq 3", "x\\in(2,3]"),
        ],
    },
    "units": {
        "right": [
            ("4\\% \\text{ interest}", "4\\%"),
            ("\\text{USD } 7", "7"), ("10 \\text{ m/s}", "36 \\text{ km/h}"),
            ("9.8 \\, \\text{m/s}^2", "9.8 \\text{ m/s}^{2}"),
            ("2 \\text{ hours } 15 \\text{ minutes}", "135 \\text{ minutes}"), ("3 m", "3"),
            ("\\$20 \\text{ per hour}", "20"), ("5 \\frac{\\text{miles}}{\\text{hour}}", "5"),
            ("8 green marbles", "8"), ("25\\pi \\mathrm{~cm}^{2}", "25\\pi"), ("25 \\pi \\text{ units}^2", "25\\pi"),
            ("15 \\text{ km/hr}", "15 \\text{ km/h}"), ("54 \\text{ km/h}", "15 \\text{ m/s}"),
            ("2 hours 45 minutes", "165 minutes"), ("5 km east", "5"), ("5 \\text{ sq. cm}", "5 \\text{ cm}^2"),
        ],
        "wrong": [
            ("7 pears", "8"), ("60 \\text{ mph}", "60 \\text{ km/h}"), ("3 kg", "3 lbs"),
            ("2x \\text{ dollars}", "3x"), ("54 \\text{ km/h}", "54 \\text{ m/s}"), ("2 \\text{ m}", "2 \\text{ cm}"),
            ("5 pq", "5"), ("5 \\text{ cubic meters}", "5 \\text{ m}^2"),
        ],
        "undecided": [
            ("5 \\text{ a.m.}", "5 \\text{ p.m.}"),
        ],
    },
    "families and conventions": {
        "right": [
            ("2k\\pi", "2n\\pi"), ("x=\\frac{\\pi}{6}+2k\\pi, k\\in\\mathbb{Z}", "\\frac{\\pi}{6}+2n\\pi"),
            ("\\text{infinite}", "\\infty"), ("P(5,2)", "20"), ("A_5^2", "20"), ("3:4", "\\frac34"),
            ("\\frac{3\\pi}{2}+k\\pi, k\\in\\mathbb{Z}", "\\frac{\\pi}{2}+n\\pi,n\\in\\mathbb{Z}"),
            ("\\{k\\pi : k\\in\\mathbb{Z}\\}", "\\{n\\pi : n\\in\\mathbb{Z}\\}"),
            ("\\text{negative infinity}", "-\\infty"), ("7C3", "35"), ("A_4^2", "12"), ("35", "C(7,3)"),
            ("2\\vec{i}-3\\vec{j}", "(2,-3)"), ("\\ln|x|+C", "C+\\ln|x|"), ("y=ce^{x}", "y=Ce^x"),
        ],
        "wrong": [
            ("DNE", "\\infty"), ("\\text{does not exist}", "5"), ("C(6,2)", "12"), ("2:00", "12:00"),
            ("2n+1", "2n-1"), ("\\infty", "-\\infty"), ("6:4", "2:3"), ("0", "\\emptyset"), ("1:00", "13:00"),
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize(("answer", "reference", "verdict"), rows(KINDS))
def test_verdict_follows_what_an_answer_means(answer, reference, verdict):
    assert judge(answer, reference)[0] == verdict
