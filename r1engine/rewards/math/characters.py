"""Unicode mathematics as LaTeX: what a model, a web page or an input method writes instead of commands."""

from __future__ import annotations

import re
import unicodedata

from r1engine.rewards.extract import MAX_ANSWER_CHARACTERS

# One row a meaning: LaTeX, then the characters that stand for it. A command ends in a space: no letter may join it.
_LATEX = {
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\u2796",
    "+": "\u2795",
    "/": "\u2044\u2215\u29f8",
    ":": "\u2236\ufe55",
    ",": "\u3001\uff64\u060c",
    ".": "\u3002\uff61",
    "|": "\u2223\u2758",
    "'": "\u2032\u2019\u02b9",
    "''": "\u2033",
    '"': "\u201c\u201d",
    "": "\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\ufeff\ufe0e\ufe0f",  # invisible
    "[": "\u3010",
    "]": "\u3011",
    "^\\circ ": "\u00b0\u00ba\u02da",
    "\\cdot ": "\u00b7\u22c5\u2219\u2022\u2027\u30fb",
    "\\times ": "\u00d7\u2715\u2a2f\u2716",
    "\\div ": "\u00f7\u2797",
    "\\pm ": "\u00b1",
    "\\mp ": "\u2213",
    "\\le ": "\u2264\u2a7d\u2266",
    "\\ge ": "\u2265\u2a7e\u2267",
    "\\neq ": "\u2260",
    "\\approx ": "\u2248\u2243\u2245",
    "\\equiv ": "\u2261",
    "\\sim ": "\u223c\uff5e\u301c",
    "\\propto ": "\u221d",
    "\\infty ": "\u221e",
    "\\emptyset ": "\u2205\u2300",
    "\\in ": "\u2208",
    "\\notin ": "\u2209",
    "\\cup ": "\u222a",
    "\\cap ": "\u2229",
    "\\subset ": "\u2282",
    "\\subseteq ": "\u2286",
    "\\setminus ": "\u2216\u29f5",
    "\\forall ": "\u2200",
    "\\exists ": "\u2203",
    "\\neg ": "\u00ac",
    "\\land ": "\u2227",
    "\\lor ": "\u2228",
    "\\rightarrow ": "\u2192",
    "\\Rightarrow ": "\u21d2\u27f9",
    "\\Leftrightarrow ": "\u21d4\u27fa",
    "\\therefore ": "\u2234",
    "\\angle ": "\u2220",
    "\\triangle ": "\u25b3",
    "\\Delta ": "\u2206",
    "\\perp ": "\u22a5",
    "\\parallel ": "\u2225\u2016",
    "\\langle ": "\u27e8\u2329\u3008",
    "\\rangle ": "\u27e9\u232a\u3009",
    "\\lfloor ": "\u230a",
    "\\rfloor ": "\u230b",
    "\\lceil ": "\u2308",
    "\\rceil ": "\u2309",
    "\\sum ": "\u2211",
    "\\prod ": "\u220f",
    "\\int ": "\u222b",
    "\\partial ": "\u2202",
    "\\nabla ": "\u2207",
    "\\ldots ": "\u2026\u22ef",
    "\\mathbb{R}": "\u211d",
    "\\mathbb{Z}": "\u2124",
    "\\mathbb{N}": "\u2115",
    "\\mathbb{Q}": "\u211a",
    "\\mathbb{C}": "\u2102",
    "cm^{2}": "\u33a0",
    "m^{2}": "\u33a1",
    "km^{2}": "\u33a2",
    "mm^{2}": "\u339f",
    "cm^{3}": "\u33a4",
    "m^{3}": "\u33a5",
    "km^{3}": "\u33a6",
    "mm^{3}": "\u33a3",
}
_GREEK = {
    "alpha": "\u03b1", "beta": "\u03b2", "gamma": "\u03b3", "delta": "\u03b4", "epsilon": "\u03b5", "zeta": "\u03b6",
    "eta": "\u03b7", "theta": "\u03b8", "iota": "\u03b9", "kappa": "\u03ba", "lambda": "\u03bb", "mu": "\u03bc\u00b5",
    "nu": "\u03bd", "xi": "\u03be", "pi": "\u03c0", "rho": "\u03c1", "sigma": "\u03c3", "tau": "\u03c4",
    "upsilon": "\u03c5", "phi": "\u03c6\u03d5", "chi": "\u03c7", "psi": "\u03c8", "omega": "\u03c9",
    "Gamma": "\u0393", "Delta": "\u0394", "Theta": "\u0398", "Lambda": "\u039b", "Xi": "\u039e", "Pi": "\u03a0",
    "Sigma": "\u03a3", "Phi": "\u03a6", "Psi": "\u03a8", "Omega": "\u03a9",
}  # fmt: skip
_TABLE = str.maketrans(
    {sign: latex for latex, signs in _LATEX.items() for sign in signs}
    | {sign: f"\\{name} " for name, signs in _GREEK.items() for sign in signs}
)
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207c\u207d\u207e\u207f\u2071\u02e3",
    "0123456789+-=()nix",
)
_LOWERED = str.maketrans(
    "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089\u208a\u208b\u208c\u208d\u208e\u2099\u2096\u1d62\u2093",
    "0123456789+-=()nkix",
)
_UP, _DOWN = ("[" + "".join(map(chr, table)) + "]+" for table in (_RAISED, _LOWERED))
_RAISED_FRACTION = re.compile(f"({_UP})[\u2044/]({_DOWN})")
_RAISED_RUN, _LOWERED_RUN = re.compile(_UP), re.compile(_DOWN)
_DEGREES = {"\u221a": "", "\u221b": "[3]", "\u221c": "[4]"}
# A root sign reaches over a whole number, a letter, a command or a bracket, and has its degree before it.
_ROOT = re.compile(
    r"([\u2070-\u2079\u00b9\u00b2\u00b3]*)([\u221a\u221b\u221c])\s*(\d+(?:\.\d+)?|\\?[A-Za-z]+|(?=[({]))"
)
_COMPATIBLE = ("<wide>", "<narrow>", "<font>", "<noBreak>", "<compat>", "<small>", "<square>")
_LINED, _DOTTED = re.compile("(?:\\d[\u0304\u0305])+"), re.compile("(\\d)\u0307")  # digits that repeat


def to_latex(text: str) -> str:
    """`text` with Unicode mathematics as LaTeX; what is no mathematics stays. A text in ASCII comes back as it is.

    Digits of other scripts stay, too: nobody writes mathematics half in them. So does a text that would become longer
    than an answer may be.
    """
    if text.isascii():
        return text
    written = text
    text = _LINED.sub(lambda match: f"\\overline{{{match[0][::2]}}}", text)
    text = _DOTTED.sub(r"\\dot{\1}", text)
    text = "".join(map(_plain, text)).translate(_TABLE)
    text = _ROOT.sub(_root, text)
    text = _RAISED_FRACTION.sub(
        lambda match: f"\\frac{{{match[1].translate(_RAISED)}}}{{{match[2].translate(_LOWERED)}}}", text
    )
    text = _RAISED_RUN.sub(lambda match: f"^{{{match[0].translate(_RAISED)}}}", text)
    text = _LOWERED_RUN.sub(lambda match: f"_{{{match[0].translate(_LOWERED)}}}", text)
    return text if len(text) <= MAX_ANSWER_CHARACTERS else written


def _plain(sign: str) -> str:
    """Wide, mathematical and squared forms as what they are forms of; 1/2 in one sign as a fraction."""
    if sign.isascii() or ord(sign) in _TABLE:
        return sign
    tag, *_ = unicodedata.decomposition(sign).split(" ")
    if tag == "<fraction>":
        above, _, below = unicodedata.normalize("NFKC", sign).partition("\u2044")
        return f"\\frac{{{above}}}{{{below}}}" if below else sign
    return unicodedata.normalize("NFKC", sign) if tag in _COMPATIBLE else sign


def _root(match: re.Match[str]) -> str:
    degree = f"[{match[1].translate(_RAISED)}]" if match[1] else _DEGREES[match[2]]
    inside = match[3]
    if inside.isalpha():  # of bare letters only the first: the root of x, times y
        return f"\\sqrt{degree}{{{inside[0]}}}{inside[1:]}"
    return f"\\sqrt{degree}{{{inside}}}" if inside else f"\\sqrt{degree}"
