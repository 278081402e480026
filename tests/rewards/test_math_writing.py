"""The same value written in other ways, and other values written much like it: a table of pairs for each kind."""

from __future__ import annotations

import pytest

from r1engine.rewards.math.accuracy import judge

# kind -> verdict -> (answer, reference)
KINDS = {
    "TeX arguments without braces": {
        "right": [
            ("\\frac{11}2", "5.5"), ("\\frac{x}3", "x/3"), ("\\frac\\pi 4", "\\pi/4"), ("\\binom62", "15"),
            ("\\tfrac12", "0.5"), ("1\\frac 34", "7/4"), ("\\left[-\\frac12,\\frac 34\\right]", "[-0.5,0.75]"),
            ("\\frac12x+\\frac13y", "\\frac{x}{2}+\\frac{y}{3}"), ("x^{\\frac12}", "\\sqrt{x}"),
            ("e^\\frac12", "\\sqrt{e}"), ("\\dfrac{1}2", "1/2"), ("\\frac{13}{4}", "\\frac{13}4"),
            ("\\sqrt{\\frac23}", "\\frac{\\sqrt6}3"),
            ("\\begin{pmatrix}\\frac12\\\\\\frac13\\end{pmatrix}", "\\begin{pmatrix}1/2\\\\1/3\\end{pmatrix}"),
            ("\\log_28", "3"), ("2^{\\frac13}", "\\sqrt[3]2"), ("\\frac{1}{2}", "\\frac12"),
        ],
        "wrong": [
            ("-\\frac 12", "0.5"), ("\\frac 59", "\\frac{9}{5}"), ("\\frac12", "1/3"), ("\\frac{10}3", "3/10"),
            ("2\\frac12", "1"),
        ],
    },
    "products of powers": {
        "right": [
            ("2^4\\cdot5^2", "400"), ("2^4 5^2", "400"), ("2^2\\times3\\times5^2", "300"),
            ("p^2/q^3", "\\frac{p^2}{q^3}"), ("m^{10}n^{3}", "n^3m^{10}"), ("\\frac{x^2y^3}{z^4}", "x^2y^3z^{-4}"),
            ("e^{2x}x^3", "x^3e^{2x}"), ("e^{-x^{2}}", "e^{-x^2}"), ("e^{x^2+1}", "e^{1+x^2}"),
            ("a^2b^2+c^2d^2", "c^2d^2+a^2b^2"), ("i^{51}", "-i"), ("i^{50}", "-1"), ("x^2 y^3", "x^2y^3"),
            ("xe^{-x^2/2}", "xe^{-\\frac{x^2}{2}}"), ("x**2*y**3", "x^2y^3"),
        ],
        "wrong": [
            ("a^3b^2", "a^2b^3"), ("i^{50}", "1"), ("2^{3^2}", "64"),
        ],
    },
    "scientific notation": {
        "right": [
            ("2.5e-3", "0.0025"), ("1e6", "1000000"), ("1e16", "10000000000000000"), ("4.2e+3", "4200"),
            ("4.2e3", "4.2 \\times 10^3"), ("6.02\\times10^{23}", "6.02e+23"), ("1e-05", "10^{-5}"),
            ("10^{-5}", "0.00001"), ("1.0e+02", "100"), ("3.0 \\cdot 10^8", "3e8"),
            ("3.00 \\times 10^8 \\text{ m/s}", "3e8"), ("1e-05 \\text{ m}", "0.00001"), ("0.1", "1e-1"),
            ("1e3", "10^3"), ("123456789012345680000.0", "1.2345678901234568e+20"), ("2e", "2e"),
            ("x = 1e-3", "0.001"),
        ],
        "wrong": [
            ("2e-07", "2e-06"), ("1e-5", "1e5"), ("3e-4", "-0.0003"), ("3e", "3"), ("e^5", "1e5"), ("1e5", "e^5"),
            ("1.6e-19", "1.6 \\times 10^{-18}"),
        ],
    },
    "Unicode mathematics": {
        "right": [
            ("\u00be", "0.75"), ("\u221a(x+1)", "\\sqrt{x+1}"), ("\u221a5/2", "\\frac{\\sqrt{5}}{2}"),
            ("x \u2260 0", "x\\neq 0"), ("3\u00d74", "12"), ("\u00b1\u221a2", "\\pm\\sqrt2"), ("\u00b12", "2,-2"),
            ("10\u2075", "100000"), ("\u03b8", "\\theta"), ("2\u207b\u00b9", "1/2"), ("\u22483.14", "3.14"),
            ("\U0001d465+1", "x+1"), ("x \u2208 [1,2]", "[1,2]"), ("\u230a2.5\u230b", "2"),
            ("\u00bd\u03c0", "\\pi/2"), ("3 \u00b1 \u221a2", "3\\pm\\sqrt{2}"), ("\u25b3ABC", "\\triangle ABC"),
        ],
        "wrong": [
            ("\u00bd", "\\frac{1}{3}"), ("x\u00b3", "x^2"), ("\u221a3", "\\sqrt2"), ("n>3", "n\u22653"),
        ],
        "undecided": [
            ("x\u2192\u221e", "x\\to\\infty"),
        ],
    },
    "digits in groups": {
        "right": [
            ("12\\,345", "12345"), ("1\\ 000\\ 000", "1000000"), ("1 000 000", "1000000"), ("1\u202f234", "1234"),
            ("1\u00a0234", "1234"), ("1~234", "1234"), ("1{,}234{,}567", "1234567"), ("1.234.567", "1234567"),
            ("1_234_567", "1234567"), ("1,23,456", "123456"), ("1 234.5", "1234.5"), ("100 200 300", "100200300"),
            ("-1 234", "-1234"), ("0.123\\,456", "0.123456"), ("x = 1\\,024", "1024"), ("12{,}345", "12,345"),
        ],
        "wrong": [
            ("1 2", "12"), ("1 2 3", "6"), ("0,5", "0.5"), ("3,14", "3.14"), ("1,0000", "10000"), ("10,00", "1000"),
            ("5,000,00", "500000"),
        ],
        "undecided": [
            ("1, 234", "1,234"),
        ],
    },
    "degrees in functions": {
        "right": [
            ("\\tan 45^\\circ", "1"), ("\\sin(60^\\circ)", "\\frac{\\sqrt3}{2}"),
            ("\\sin 60^\\circ", "\\frac{\\sqrt{3}}{2}"), ("\\cos(120^\\circ)", "-0.5"),
            ("\\sin 30^\\circ \\cos 60^\\circ", "1/4"), ("\\cos 60\u00b0", "0.5"),
            ("2\\cos 36^\\circ", "\\frac{1+\\sqrt5}{2}"), ("10\\tan 30^\\circ", "\\frac{10\\sqrt3}{3}"),
            ("\\frac{1}{\\sin 30^\\circ}", "2"), ("180^\\circ", "\\pi"), ("15^\\circ 30'", "15.5^\\circ"),
            ("30\u00b030\u2032", "30.5\u00b0"), ("20^\\circ C", "20"), ("90^\\circ - \\alpha", "90 - \\alpha"),
            ("\\sin 30^{\\circ}", "0.5"), ("\\sin (45^\\circ - 15^\\circ)", "0.5"),
        ],
        "wrong": [
            ("\\sin 30^\\circ", "\\frac{\\sqrt3}2"), ("\\sin 30", "0.5"), ("\\cos 60^\\circ", "60^\\circ"),
            ("90^\\circ", "\\frac{\\pi}{3}"), ("15^\\circ 15'", "15.5^\\circ"),
            ("10^\\circ 20' 30''", "10.341666^\\circ"), ("20^\\circ C", "20^\\circ F"),
        ],
    },
    "repeating decimals": {
        "right": [
            ("0.\\overline{6}", "2/3"), ("0.\\overline{142857}", "1/7"), ("0.8\\overline{3}", "5/6"),
            ("1.\\overline{3}", "4/3"), ("0.\\dot{1}\\dot{2}", "4/33"), ("0.\\dot{1}4285\\dot{7}", "1/7"),
            ("0.1(6)", "1/6"), ("0.333...", "1/3"), ("0.333\\ldots", "1/3"), ("\\overline{AB}", "\\overline{AB}"),
            ("0.\\overline{45}", "5/11"), ("x=0.\\overline{3}", "1/3"), ("0.\\overline{3}\\pi", "\\pi/3"),
            ("2.1\\overline{36}", "47/22"), ("3/11", "0.\\overline{27}"), ("0.272727...", "3/11"),
        ],
        "wrong": [
            ("0.\\overline{3}", "3/10"), ("0.\\overline{3}", "0.3"), ("0.3\\ldots", "1/3"),
            ("0.4\\overline{5}", "5/11"), ("0.\\overset{.}{3}", "1/3"),
        ],
    },
    "a digit, a space, a digit": {
        "right": [
            ("\\log_3 9", "2"), ("\\log_2 8 + 1", "4"), ("\\log_4 8", "3/2"), ("\\log_2 3", "\\log_{2}3"),
            ("2^3 3", "24"), ("3^2 4", "36"), ("C_6^3 2", "40"), ("\\sqrt[3] 8", "2"), ("\\log_2{8}", "3"),
            ("2\\log_2 8", "6"), ("\\log_9 3", "0.5"), ("\\lg 100", "2"), ("\\log 100", "2"), ("10^2 3", "300"),
            ("\\log_5 25 - \\log_2 8", "-1"), ("\\log_23", "\\log_2 3"),
        ],
        "wrong": [
            ("\\log_2 16", "5"), ("\\log_3 5", "\\log_5 3"), ("5 6", "11"), ("5 6", "30"), ("3 4 5", "12"),
        ],
    },
    "styling": {
        "right": [
            ("\\Large 7", "7"), ("\\huge{7}", "7"), ("\\bm{7}", "7"), ("\\\\7", "7"), ("=7", "7"), ("**7**", "7"),
            ("\\mathtt{7}", "7"), ("7,", "7"), ("\\underline{\\mathbf{7}}", "7"), ("\\color{red}{x+1}", "1+x"),
            ("\\boldsymbol{x}+1", "x+1"), ("\\begin{equation}7\\end{equation}", "7"),
            ("\\begin{array}{c}7\\end{array}", "7"), ("\\large\\bf 7", "7"), ("{\\large 7}", "7"),
            ("\\text{ 7 }", "7"), ("\\tag{1} 7", "7"),
        ],
        "wrong": [
            ("\\approx 7", "8"), ("``7``", "7"), ("7!", "7"), ("\\color{red}{7}", "8"), ("\\textbf{7}", "8"),
            ("7 \\checkmark", "7"), ("\\rightarrow 7", "7"),
        ],
    },
    "forms of plain numbers": {
        "right": [
            ("11,111,100", "11,\\! 111,\\! 100"), ("\\$12,345", "\\$12,\\!345"), ("**12,345**", "12345"),
            ("999+1=1,000", "1,000"), ("2 \\times 1,500 = 3,000", "3000"), ("12 dollars", "12"), ("Total = 12", "12"),
            ("12 apples left", "12"), ("The total cost is \\$12", "12"), ("US\\$1,200", "1200"),
            ("$\\$1,200$", "1200"), ("**\\$1,200**", "1200"), ("#### 7", "7"), ("```7```", "7"), ("so 7", "7"),
            ("12 + 0", "12"),
        ],
        "wrong": [
            ("999+1=1,001", "1,000"), ("35 eggs", "36"), ("x + 5 = 12", "12"), ("\\text{12 and 13}", "12"),
            ("7 (apples)", "7"),
        ],
        "undecided": [
            ("12 more", "12"), ("12 % ", "12"),
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
def test_verdict_does_not_depend_on_how_a_value_is_written(answer, reference, verdict):
    assert judge(answer, reference)[0] == verdict
