"""TeX that prints the same, written one way: arguments in braces, no styling, no spacing commands.

Each table has a row a command; what no table names stays as it is.
"""

from __future__ import annotations

import re

from r1engine.rewards.math.size import MAX_DEPTH

# Commands that only change how things look: dropped.
_DROPPED = frozenset((
    "displaystyle", "textstyle", "scriptstyle", "scriptscriptstyle", "limits", "nolimits", "left", "right",
    "middle", "big", "Big", "bigg", "Bigg", "bigl", "Bigl", "biggl", "Biggl", "bigr", "Bigr", "biggr", "Biggr",
    "bigm", "Bigm", "tiny", "scriptsize", "footnotesize", "small", "normalsize", "large", "Large", "LARGE", "huge",
    "Huge", "bf", "bfseries", "it", "itshape", "sl", "em", "sf", "tt", "boldmath", "unboldmath", "mdseries",
    "upshape", "centering", "nonumber", "notag", "hfill", "hline", "null", "rm", "cal", "relax", "strut",
    "mathstrut", "noindent", "protect", "ensuremath", "nobreak", "allowbreak",
))  # fmt: skip
_SPACES = frozenset((
    "quad", "qquad", "enspace", "thinspace", "thickspace", "medspace", "space", "newline", "nobreakspace",
))  # fmt: skip
# command -> number of arguments, of which the last is kept bare
_STYLES = dict.fromkeys((
    "boldsymbol", "bm", "pmb", "mathbf", "mathit", "mathsf", "mathtt", "mathnormal", "mathop", "underline", "boxed",
    "fbox", "framebox", "displaylines", "mathord", "mathrel", "smash",
), 1) | dict.fromkeys((
    "textcolor", "colorbox", "style", "class", "href", "cssId",
), 2)  # fmt: skip
# command -> number of arguments, all of them dropped
_WITHOUT_TRACE = {**dict.fromkeys((
    "color", "hspace", "vspace", "phantom", "hphantom", "vphantom", "label", "tag", "cancel", "bcancel", "xcancel",
    "sout", "mspace",
), 1), "cancelto": 2}  # fmt: skip
# Text, whatever its shape.
_TEXTS = frozenset((
    "text", "textbf", "textrm", "textit", "textsf", "texttt", "textsl", "textsc", "textup", "textnormal", "emph",
    "mbox", "hbox",
))  # fmt: skip
_SAME = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le", "geq": "ge",
    "leqslant": "le", "geqslant": "ge", "leqq": "le", "geqq": "ge", "ne": "neq", "lt": "<", "gt": ">", "lvert": "|",
    "rvert": "|", "vert": "|", "mid": "|", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "colon": ":",
    "varnothing": "emptyset", "cdotp": "cdot", "ast": "cdot", "degree": "circ", "to": "rightarrow",
    "implies": "Rightarrow", "Longrightarrow": "Rightarrow", "iff": "Leftrightarrow", "arcctg": "arccot", "tg": "tan",
    "ctg": "cot", "arctg": "arctan", "thickapprox": "approx", "simeq": "approx", "lnot": "neg", "wedge": "land",
    "vee": "lor", "bar": "overline", "bigcup": "cup", "bigcap": "cap", "euro": "\u20ac",
    "pounds": "\u00a3", "yen": "\u00a5",
}  # fmt: skip
_FUNCTIONS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln",
    "lg", "exp", "gcd", "lcm", "max", "min", "lim", "det", "deg", "dim",
))  # fmt: skip
_ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1, "overline": 1, "dot": 1, "mathbb": 1, "vec": 1, "hat": 1, "text": 1,
              "mathrm": 1, "operatorname": 1}  # fmt: skip
_LETTERS_KEPT = re.compile(r"\\(?:math)?bf\s*\{?\s*([RNZQC])\s*\}?(?![A-Za-z])")  # a bold R is the set of the reals
_UNIT_VECTORS = frozenset(("i", "j", "k"))  # a bold i is no imaginary unit
_ROMAN = re.compile(r"\{\s*\\(?:rm|cal)(?![a-zA-Z])\s*~?([^{}]*)\}|\\rm(?![a-zA-Z])\s*~?\s*([A-Za-z]+)")
_BREAK = re.compile(r"(?:\\\\(?:\[[^\]]*\])?\s*)+$|^(?:\\\\\s*)+(?=\S)")

_JOINED = re.compile(r"([dtc]?frac|sqrt|[dt]?binom)([A-Za-z]+)")
_SIGNS = {"\\!": "", "\\-": "", "\\/": "", "\\,": " ", "\\;": " ", "\\:": " ", "\\ ": " ", "\\>": " "}
_STARTS = frozenset("0123456789\\abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")  # of an operand
_TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|\d+(?:\.\d+)?|\s+|.", re.DOTALL)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_LOOSE = re.compile(
    r"\\(?:[,;:! ]|(?:frac|binom|sqrt|mathbb)\s*[^{\s])|[\^_]\s*[^{\s]|\}\s*[\d\\A-Za-z]|\{\s|\s\}|~|\\\\\s*$|^\s*\\\\"
)
# With these alone, and every argument in braces, there is nothing to do.
_TIDY = frozenset((
    "frac", "sqrt", "pi", "cdot", "times", "text", "infty", "cup", "pm", "le", "ge", "neq", "in", "alpha", "beta",
    "theta", "circ", "mathbb", "sin", "cos", "tan", "log", "ln", "binom",
))  # fmt: skip


def tidy(text: str) -> str:
    """`text` without styling and spacing, every argument in braces: `\\dfrac 59` is `\\frac{5}{9}`, `x^2` `x^{2}`."""
    names = _COMMAND.findall(text)
    if (names and not _TIDY.issuperset(names)) or _LOOSE.search(text):
        text = _BREAK.sub("", text.strip())
        text = _ROMAN.sub(lambda match: f"\\mathrm{{{match[1] or match[2]}}}", text)
        text = _LETTERS_KEPT.sub(r"\\mathbb{\1}", text)
        text = _Rewriter(text).all()
    return text


class _Rewriter:
    """Reads tokens from left to right and writes them tidily."""

    def __init__(self, text: str) -> None:
        self.tokens = [match[0] for match in _TOKEN.finditer(text)]
        self.at = 0
        self.depth = 0  # of arguments in arguments

    def all(self) -> str:
        parts = []
        while self.at < len(self.tokens):
            parts.append(self.next())
        return "".join(parts)

    def next(self) -> str:
        """The next token with its arguments, rewritten; as it is where the nesting is deep."""
        token = self.tokens[self.at]
        self.at += 1
        if self.depth > MAX_DEPTH:
            return token
        self.depth += 1
        written = self.rewritten(token)
        self.depth -= 1
        return written

    def rewritten(self, token: str) -> str:
        if token in ("^", "_"):
            return f"{token}{{{self.exponent() if token == '^' else self.number() or self.argument()}}}"
        if token == "~" or token.isspace():
            return " "
        if token == "{":
            return self.group()
        if token[0] != "\\" or len(token) == 1:
            return token
        if not token[1].isalpha():
            return self.sign(token)
        return self.command(token[1:].rstrip("*"))

    def sign(self, token: str) -> str:
        before, following = self.tokens[self.at - 2] if self.at > 1 else "", self.tokens[self.at : self.at + 1]
        if token == "\\!":  # a negative space also swallows the blanks behind it: 10,\\! 080
            self.peek()
        elif token == "\\," and before.isdigit() and following and re.fullmatch(r"\d{3}(?:\.\d+)?", following[0]):
            return ""  # 1\\,234 is one number
        return _SIGNS.get(token, token)

    def command(self, name: str) -> str:
        if joined := _JOINED.fullmatch(name):  # \\fracx3: no space before the argument
            name = joined[1]
            self.tokens.insert(self.at, joined[2])
        name = _SAME.get(name, name)
        if name in ("left", "right") and self.peek() == ".":
            self.at += 1
            return " "
        if name in _DROPPED or name in _SPACES:
            return " "
        if name in _WITHOUT_TRACE:
            for _ in range(_WITHOUT_TRACE[name]):
                self.argument()
            return self.coloured() if name == "color" else " "
        if name in _STYLES:
            return self.styled(name)
        if name in _TEXTS:
            name = "text"
        if name in ("{", "}"):
            return f"\\{name}"
        if not name[0].isalpha():
            return name
        if name == "lg":
            return "\\log_{10} "
        if name == "log" and self.peek() == "_":
            return self.logarithm()
        if name == "sqrt" and self.peek() == "[":
            return f"\\sqrt{self.optional()}{{{self.radicand()}}}"
        if name == "sqrt":
            return f"\\sqrt{{{self.radicand()}}}"
        if name in ("frac", "binom") and (spaced := self.spaced_digits()):
            return f"\\{name}{{{spaced[0]}}}{{{spaced[1]}}}"
        if name in ("mathrm", "operatorname"):
            return _upright(name, self.argument())
        if name in _ARGUMENTS:
            return f"\\{name}" + "".join(f"{{{self.argument()}}}" for _ in range(_ARGUMENTS[name]))
        # A command ends where no letter follows.
        following = self.tokens[self.at] if self.at < len(self.tokens) else ""
        return f"\\{name}" + (" " if following[:1].isalpha() else "")

    def coloured(self) -> str:
        """What \\color{red} stands before: a group loses its braces, unless a power or an index hangs on it."""
        if self.peek() != "{":
            return " "
        inner = self.argument()
        return f"{{{inner}}}" if self.peek() in ("^", "_") else inner

    def styled(self, name: str) -> str:
        for _ in range(_STYLES[name] - 1):
            self.argument()
        inner = self.argument()
        if name in ("mathbf", "bm", "boldsymbol") and inner in _UNIT_VECTORS:
            return f"\\vec{{{inner}}}"
        if name == "mathbf" and inner == "e":  # a vector, no number
            return "\\mathbf{e}"
        return inner

    def peek(self) -> str:
        """The next token that is no space; spaces before it are skipped."""
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def group(self) -> str:
        """What follows a brace, with both braces."""
        is_style = self.peek()[1:] in _DROPPED  # {\\bf 1, 2} is no set
        parts = []
        while self.at < len(self.tokens) and self.tokens[self.at] != "}":
            parts.append(self.next())
        closed = self.at < len(self.tokens)
        self.at += 1
        inner = "".join(parts).strip()
        return inner if is_style and closed and self.peek() not in ("^", "_") else "{" + inner + "}" * closed

    def argument(self) -> str:
        """A group without its braces, or one token: of a number its first digit."""
        token = self.peek()
        if token == "{":
            self.at += 1
            group = self.group()
            return group[1:].removesuffix("}").strip() if group[:1] == "{" else group
        if len(token) > 1 and token[0].isalnum():
            self.tokens[self.at] = token[1:]
            return token[0]
        return self.next() if token and token != "}" else ""

    def number(self) -> str | None:
        """All digits of a number, or None."""
        token = self.peek()
        if not token[:1].isdigit():
            return None
        self.at += 1
        return token

    def exponent(self) -> str:
        """Of x^10 the 10, though TeX would print x^1 0; of x^-2 the -2, of e^-x the -x; of x^(1/2) the 1/2."""
        if self.peek() in ("-", "+") and self.at + 1 < len(self.tokens) and self.tokens[self.at + 1][0] in _STARTS:
            sign = self.next()
            return sign + (self.number() or self.argument())
        return self.radicand()

    def radicand(self) -> str:
        """Of \\sqrt12 the 12, though TeX would print \\sqrt1 2; of \\sqrt(x+1) what the bracket holds."""
        if self.peek() != "(":
            return self.number() or self.argument()
        depth, parts = 0, []
        while self.at < len(self.tokens):
            parts.append(self.next())
            depth += (parts[-1] == "(") - (parts[-1] == ")")
            if depth == 0:
                return "".join(parts)[1:-1]
        return "".join(parts)

    def spaced_digits(self) -> tuple[str, str] | None:
        """The numbers of `\\frac 5 12`: where a space parts them, nobody means (5/1) 2."""
        self.peek()
        first, space, second = (*self.tokens[self.at : self.at + 3], "", "", "")[:3]
        if not (first.isdigit() and len(first) == 1 and space.isspace() and second.isdigit()):
            return None
        self.at += 3
        return first, second

    def optional(self) -> str:
        parts: list[str] = []
        while self.at < len(self.tokens) and parts[-1:] != ["]"]:
            parts.append(self.next())
        return "".join(parts)

    def logarithm(self) -> str:
        """\\log_28 is the logarithm of 8; \\log_10 100 has the base 10."""
        self.at += 1
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.at += 1
            following = self.peek()
            if not (following[:1].isalnum() or following[:1] in ("\\", "(", "{")):
                return f"\\log_{{{token[0]}}}{{{token[1:]}}}"
            return f"\\log_{{{token}}} "
        return f"\\log_{{{self.argument()}}} "


def _upright(name: str, inner: str) -> str:
    """A function by its command, the numbers e and i by their letters, anything else as it is."""
    if inner in _FUNCTIONS and not (name == "mathrm" and inner in ("min", "sec", "deg")):  # these are units
        return f"\\{inner} "
    return inner if inner in ("e", "i") else f"\\{name}{{{inner}}}"
