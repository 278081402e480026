"""Chinese words in and around answers, each with its meaning behind it. `words`, `numerals` and `units` use them."""

from __future__ import annotations

CONCLUSIONS = (  # before an answer
    "\u6240\u4ee5",  # so
    "\u56e0\u6b64",  # therefore
    "\u6545",  # hence
    "\u7efc\u4e0a",  # in sum
    "\u5219",  # then
    "\u5373",  # that is
    "\u89e3\u5f97",  # solving gives
    "\u5f97",  # get
    "\u5e94\u9009",  # should choose
    "\u6545\u9009",  # so choose
    "\u9009\u62e9",  # choose
    "\u9009",  # choose
)
ADJECTIVES = (  # before one of NOUNS
    "\u6700\u7ec8",  # final
    "\u6b63\u786e",  # correct
    "\u53c2\u8003",  # reference
    "\u672c\u9898",  # of this question
    "\u8be5\u9898",  # of that question
    "\u8fd9\u9053\u9898",  # of this question
)
NOUNS = (  # name an answer
    "\u7b54\u6848",  # answer
    "\u7ed3\u679c",  # result
    "\u7ed3\u8bba",  # conclusion
    "\u503c",  # value
    "\u7b54",  # answer
    "\u89e3",  # solution
)
COPULAS = (  # between NOUNS and the answer
    "\u662f",  # is
    "\u4e3a",  # is
    "\u7b49\u4e8e",  # equals
    "\u5e94\u4e3a",  # should be
    "\u5e94\u8be5\u662f",  # should be
    "\u5c31\u662f",  # just is
)
TOTALS = (  # before a number
    "\u4e00\u5171\u6709",  # there are altogether
    "\u603b\u5171\u6709",  # there are altogether
    "\u5171\u6709",  # there are altogether
    "\u4e00\u5171",  # altogether
    "\u603b\u5171",  # altogether
    "\u5171\u8ba1",  # in total
    "\u5171",  # in all
    "\u7b49\u4e8e",  # equals
)
OPTIONS = (  # beside the letter of a choice
    "\u9009\u9879",  # option
    "\u9879",  # option
    "\u7684",  #
    "\u6709",  # are
    "\u5e94\u8be5",  # should
)
OR = ("\u6216\u8005", "\u6216\u662f", "\u6216")
APPROXIMATELY = (  # before a number
    "\u7ea6\u4e3a",  # is about
    "\u5927\u7ea6\u662f",  # is about
    "\u5927\u7ea6",  # about
    "\u5927\u6982",  # about
    "\u7ea6",  # about
)
JOINED = (  # between the items of a list
    "\u6216\u8005",  # or
    "\u6216\u662f",  # or
    "\u6216",  # or
    "\u4ee5\u53ca",  # and
    "\u5e76\u4e14",  # and
    "\u8fd8\u6709",  # and also
    "\u548c",  # and
    "\u4e0e",  # and
    "\u53ca",  # and
    "\u4e14",  # and
)
NEGATIVES = (  # make the number behind them negative
    "\u96f6\u4e0b",  # below zero
    "\u8d1f",  # minus
)
QUALIFIERS = (  # make the value before them another one, or say how it is meant
    "\u4ee5\u4e0a",  # or more
    "\u4ee5\u4e0b",  # or less
    "\u4ee5\u5185",  # within
    "\u4ee5\u5916",  # beyond
    "\u81f3\u5c11",  # at least
    "\u6700\u591a",  # at most
    "\u81f3\u591a",  # at most
    "\u4e0d\u5230",  # less than
    "\u8d85\u8fc7",  # more than
    "\u5de6\u53f3",  # or so
    "\u96f6\u4e0b",  # below zero
    "\u591a",  # more than
    "\u4f59",  # odd
    "\u51e0",  # some
    "\u534a",  # and a half
    "\u500d",  # times
    "\u6298",  # tenths of the price
    "\u6210",  # tenths
    "\u5c11",  # less
    "\u524d",  # before
    "\u540e",  # after
    "\u5916",  # outside
    "\u5185",  # inside
    "\u4e0b",  # below
    "\u4e0a",  # above
    "\u8d1f",  # minus
    "\u7684",  # of
    "\u4e0d",  # not
    "\u6216",  # or
)
OPERATORS = {  # phrase -> LaTeX of the value `v` that it makes
    "\u7684\u5e73\u65b9": "({v})^{{2}}",  # squared
    "\u7684\u7acb\u65b9": "({v})^{{3}}",  # cubed
}
MEANINGS = {  # word -> the English one of its row in `words`
    "\u6b63\u786e": "true",
    "\u6b63\u786e\u7684": "true",
    "\u5bf9": "true",
    "\u5bf9\u7684": "true",
    "\u221a": "true",
    "\u9519\u8bef": "false",
    "\u9519\u8bef\u7684": "false",
    "\u9519": "false",
    "\u9519\u7684": "false",
    "\u4e0d\u6b63\u786e": "false",
    "\u4e0d\u5bf9": "false",
    "\u662f": "yes",
    "\u662f\u7684": "yes",
    "\u5426": "no",
    "\u4e0d\u662f": "no",
    "\u65e0\u7a77\u5927": "infinity",
    "\u65e0\u7a77": "infinity",
    "\u6b63\u65e0\u7a77": "infinity",
    "\u8d1f\u65e0\u7a77": "-infinity",
    "\u4e0d\u5b58\u5728": "does not exist",
    "\u65e0\u5b9a\u4e49": "undefined",
    "\u65e0\u610f\u4e49": "undefined",
    "\u9012\u589e": "increasing",
    "\u5355\u8c03\u9012\u589e": "increasing",
    "\u9012\u51cf": "decreasing",
    "\u5355\u8c03\u9012\u51cf": "decreasing",
}
EMPTY = (  # no solution
    "\u65e0\u89e3",  # without solution
    "\u65b9\u7a0b\u65e0\u89e3",  # the equation has no solution
    "\u65e0\u5b9e\u6570\u89e3",  # without real solution
    "\u65e0\u5b9e\u6570\u6839",  # without real root
    "\u65e0\u5b9e\u6839",  # without real root
    "\u6ca1\u6709\u89e3",  # has no solution
    "\u7a7a\u96c6",  # empty set
)
REALS = (  # all real numbers
    "\u5168\u4f53\u5b9e\u6570",  # all
    "\u4e00\u5207\u5b9e\u6570",  # every
    "\u4efb\u610f\u5b9e\u6570",  # any
    "\u6240\u6709\u5b9e\u6570",  # all
    "\u5b9e\u6570\u96c6",  # the set of
    "\u5b9e\u6570",  # real numbers
)
INTEGER_DECLARED = (  # behind the parameter of a family
    "\u4e3a\u6574\u6570",  # is an integer
    "\u662f\u6574\u6570",  # is an integer
    "\u4e3a\u4efb\u610f\u6574\u6570",  # is any integer
)

INTEGER = "\u6574\u6570"
DIGITS = {sign: value for value, sign in enumerate("\u96f6\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d")} | {
    "\u3007": 0, "\u4e24": 2, "\u5169": 2,
}  # fmt: skip
TENS = {"\u5341": 10, "\u767e": 100, "\u5343": 1000}
MYRIADS = {"\u4e07": 10**4, "\u842c": 10**4, "\u4ebf": 10**8, "\u5104": 10**8}
DOZEN = "\u6253"
POINT, PARTS_OF = "\u70b9", "\u5206\u4e4b"  # of a decimal; of a fraction, whose denominator comes first
PER = "\u6bcf"
SQUARE, CUBIC = "\u5e73\u65b9", "\u7acb\u65b9"
UNITS = {  # name -> the English one
    "\u6beb\u7c73": "mm",
    "\u5398\u7c73": "cm",
    "\u516c\u5206": "cm",
    "\u5206\u7c73": "dm",
    "\u7c73": "m",
    "\u516c\u5c3a": "m",
    "\u5343\u7c73": "km",
    "\u516c\u91cc": "km",
    "\u91cc": "li",
    "\u6beb\u514b": "mg",
    "\u514b": "g",
    "\u5343\u514b": "kg",
    "\u516c\u65a4": "kg",
    "\u65a4": "jin",
    "\u5428": "tonne",
    "\u79d2": "second",
    "\u79d2\u949f": "second",
    "\u5206\u949f": "minute",
    "\u5206": "minute",
    "\u5c0f\u65f6": "hour",
    "\u65f6": "hour",
    "\u5929": "day",
    "\u65e5": "day",
    "\u5468": "week",
    "\u661f\u671f": "week",
    "\u4e2a\u6708": "month",
    "\u6708": "month",
    "\u5e74": "year",
    "\u6beb\u5347": "ml",
    "\u5347": "l",
    "\u516c\u9877": "hectare",
    "\u7f8e\u5143": "dollar",
    "\u5143": "yuan",
    "\u5757": "yuan",
    "\u5757\u94b1": "yuan",
    "\u4eba\u6c11\u5e01": "yuan",
    "\u89d2": "jiao",
    "\u6bdb": "jiao",
    "\u6b27\u5143": "euro",
    "\u5ea6": "degree",
    "\u5f27\u5ea6": "radian",
    "\u6444\u6c0f\u5ea6": "celsius",
    "\u534e\u6c0f\u5ea6": "fahrenheit",
    "\u725b": "N",
    "\u725b\u987f": "N",
    "\u7126": "J",
    "\u7126\u8033": "J",
    "\u74e6": "W",
    "\u5343\u74e6": "kW",
    "\u5e15": "Pa",
    "\u5b89": "A",
    "\u5b89\u57f9": "A",
    "\u4f0f": "V",
    "\u4f0f\u7279": "V",
    "\u5355\u4f4d": "unit",
}
