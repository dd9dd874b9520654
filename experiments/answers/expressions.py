"""Numbers and LaTeX answers in one canonical spelling, and whether two LaTeX answers mean the same."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Iterator
from decimal import Context, Decimal, Inexact, localcontext
from fractions import Fraction
from typing import NamedTuple

MOST_DIGITS = 40  # a longer run of digits is no answer
MOST_PLACES = 400  # more than the decimals of any number here: powers of ten have two digits
LONGEST_VERIFIED = 150  # characters of an answer that is handed to the computer algebra
COSTLIEST_NESTING = 800  # characters times 2 ** depth of the brackets, as which the time to read an answer grows
LARGEST_POWER = 1000  # product of all exponents up to which it is
VERIFY_SECONDS = 1

_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\,|,\\!|\\!|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_CURRENCY_WORD = re.compile(r"\b(?:USD|EUR|GBP|INR|Rs\.?)\s?(?=-?\d)|\bUS(?=\\?\$)")
_PLAIN = {"−": "-", "\u2011": "-", r"\$": "$", r"\%": "%", r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac"}
_SPACING = re.compile(r"(?<!\\)\\[!,;: ]")

# No alternative can match a part of what another one consumes again and again: linear on any input.
_NUMBER = re.compile(
    r"""
    (?P<sign>-[ ]?(?:[$£€¥₹][ ]?)?)?
    (?:
      (?:(?<![A-Za-z\d])(?<!\d[./])(?P<whole>\d{1,15})[ ]?)?
        \\frac[ ]?(?:\{[ ]?(?P<minus>-?)[ ]?(?P<top>\d{1,40})[ ]?\}[ ]?\{[ ]?(?P<bottom>\d{1,40})[ ]?\}
                    |(?P<top1>\d)[ ]?(?P<bottom1>\d))
    | (?<![A-Za-z\d])(?<!\d[./])
      (?:
        (?:(?P<whole2>\d{1,15})[ ])?(?P<top2>\d{1,40})[ ]?/[ ]?(?P<bottom2>\d{1,40})(?![\d/]|\.\d)
      | (?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:,\d\d){1,5},\d{3}(?![\d,])|\d+|(?=\.\d))(?P<decimals>\.\d+)?
        (?:[ ]?(?:\\times|\\cdot|[×x*])[ ]?10[ ]?\^[ ]?\{?(?P<power>-?\d{1,2})\}?|[eE](?P<power2>[-+]?\d{1,2})(?![\w.]))?
        (?!\d|,\d{3}(?!\d)|(?:st|nd|rd|th)\b)
      )
    )
    """,
    re.VERBOSE,
)
_SUBTRACTED_FROM = re.compile(r"[\w)\]}%][ \t]*$")
_MINUS_SIGN_BEFORE_BLANK = re.compile(r"[=:({\[#$*][ \t]*$")
_MINUS_WORD = re.compile(r"(?:\bnegative|(?:^|\bis|\bbe|[=:*#])\s*\bminus)\s+[$£€¥₹]?$", re.IGNORECASE)


class Number(NamedTuple):
    """A number in a text: its canonical spelling and where it stands."""

    value: str
    start: int
    end: int


def plain_numbers(text: str) -> str:
    """The text with one spelling of signs, currencies and fractions, and without separators that are no commas."""
    for written, plain in _PLAIN.items():
        text = text.replace(written, plain)
    return _CURRENCY_WORD.sub("$", _SPACING.sub(" ", _SEPARATOR.sub("", text)))


def find_numbers(text: str) -> Iterator[Number]:
    """The numbers of a text that went through `plain_numbers`, in their order.

    Known: signs, commas (also 1,00,000), decimals, a/b, LaTeX and mixed fractions, powers of ten. Percent signs, currencies
    and units are no part of a number. Ordinals, digits inside words and numbers with too many digits are left out.
    """
    for match in _NUMBER.finditer(text):
        if (value := _value(match)) is not None:
            before = text[max(0, match.start() - 20) : match.start()]
            sign = -1 if _is_negative(match["sign"], before) else 1
            yield Number(canonical_fraction(sign * value), match.start(), match.end())


def _value(match: re.Match[str]) -> Fraction | None:
    """The unsigned number that was matched; None with too many digits or a zero below a fraction bar."""
    top = match["top"] or match["top1"] or match["top2"]
    if top:
        bottom = match["bottom"] or match["bottom1"] or match["bottom2"]
        if not int(bottom):
            return None
        value = int(match["whole"] or match["whole2"] or 0) + Fraction(int(top), int(bottom))
        return -value if match["minus"] else value
    digits, decimals = match["digits"].replace(",", ""), match["decimals"] or ""
    if len(digits) + len(decimals) > MOST_DIGITS:
        return None
    power = int(match["power"] or match["power2"] or 0)
    return Fraction((digits or "0") + decimals) * Fraction(10) ** power


def _is_negative(sign: str | None, before: str) -> bool:
    """Whether the number after `before` is negative, rather than subtracted, the end of a range or an item of a list."""
    if sign is None:
        return bool(_MINUS_WORD.search(before))
    if _SUBTRACTED_FROM.search(before):
        # "is -3", but not "5 -3" and not "pay-3"
        return not sign.startswith("- ") and before[-1] in " \t" and before.rstrip()[-1].isalpha()
    return not sign.startswith("- ") or bool(_MINUS_SIGN_BEFORE_BLANK.search(before))


def canonical_fraction(value: Fraction) -> str:
    """An integer ("-3"), else a decimal without trailing zeros ("0.5") where it is finite, else a reduced fraction ("1/3")."""
    try:
        with localcontext(Context(prec=MOST_PLACES, traps=[Inexact])):
            return f"{(Decimal(value.numerator) / value.denominator).normalize():f}"
    except Inexact:
        return str(value)


def whole_number(text: str) -> str | None:
    """The canonical spelling of a text that is nothing but a number, with or without currency or percent sign."""
    text = plain_numbers(text).strip().removeprefix("$").removesuffix("%").strip()
    found = next(find_numbers(text), None)
    return found.value if found and (found.start, found.end) == (0, len(text)) else None


# --- LaTeX ---

_TEXT = r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
_LATEX_TEXT = re.compile(_TEXT)
_UNIT = re.compile(rf"(?<=[\d}})])\s*{_TEXT}(?:\^\{{?\d\}}?)?$")
_UNIT_WORDS = re.compile(r"(?<=\d) +[A-Za-z]{2,}\.?(?: +[A-Za-z]+)*$")
_NO_UNITS = re.compile(r"\b(?:pi|sqrt|sin|cos|tan|log|ln|or|and|to|if|for)\b")
_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad|big|Big)(?![A-Za-z])|\^\s*\{?\s*\\circ\s*\}?|\\degree\b|[$°]|\*\*"
)
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")
_LEFT_SIDE = re.compile(r"^\s*[A-Za-z](?:\([A-Za-z]\))?\s*(?:=|\\in(?![A-Za-z]))\s*(?=[^=]*$)")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\{[^{}]*\}|[A-Za-z\d])\s*(\{[^{}]*\}|[A-Za-z\d])")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([A-Za-z\d])")
_SHORT_SCRIPT = re.compile(r"([\^_])\s*\{([A-Za-z\d])\}")
_SAME = {"le": "leq", "ge": "geq", "ne": "neq", "lt": "<", "gt": ">"}
_SAME_COMMAND = re.compile(r"\\(le|ge|ne|lt|gt)(?![A-Za-z])")


def canonical_latex(text: str) -> str:
    """A LaTeX answer in one spelling; numbers as `canonical_fraction`, else LaTeX without blanks, delimiters and units."""
    text = plain_numbers(text).replace("%", "").replace("~", " ")
    text = _DELIMITER.sub("", _DROPPED.sub("", text)).strip().rstrip(".,;").strip()
    text = _UNIT.sub("", _LEFT_SIDE.sub("", text))
    if (words := _UNIT_WORDS.search(text)) and not _NO_UNITS.search(words[0]):
        text = text[: words.start()]
    text = _LATEX_TEXT.sub(r"\1", text).strip()
    text = _SAME_COMMAND.sub(lambda match: rf"\{_SAME[match[1]]} " if match[1] in "legene" else _SAME[match[1]], text)
    text = _SHORT_FRACTION.sub(lambda match: rf"\frac{_braced(match[1])}{_braced(match[2])}", text)
    text = _SHORT_SCRIPT.sub(r"\1\2", _SHORT_ROOT.sub(r"\\sqrt{\1}", text))
    if number := whole_number(text):
        return number
    if option := re.fullmatch(r"\(([A-Za-z])\)", text):
        return option[1]
    return "".join(text.split())


def _braced(argument: str) -> str:
    return argument if argument.startswith("{") else f"{{{argument}}}"


_BASE = re.compile(r"\d_\{?(\d+)\}?$")  # of a number: 52_8


def same_latex(given: str, gold: str) -> bool:
    """Whether two canonical LaTeX answers mean the same: the same spelling, or equal for math-verify."""
    if given == gold:
        return True
    if given.isalpha() and gold.isalpha() and min(len(given), len(gold)) > 1:
        return given.casefold() == gold.casefold()
    if whole_number(given) and whole_number(gold):
        return False
    if len({base[1] for one in (given, gold) if (base := _BASE.search(one))}) > 1:  # math-verify leaves them out
        return False
    return _is_tame(given) and _is_tame(gold) and _verified(given, gold)


_EXPONENT = re.compile(r"\^(\{-?[\w+\-/ ]{1,8}\}|\{-?\\frac\{\w{1,2}\}\{\w{1,2}\}\}|\w)?")
_COSTLY = re.compile(r"!|\*\*|\\(?:binom|sum|prod|int|lim|choose)|\d{25}|\^\{?[^{}]*\d{4}")


def _is_tame(text: str) -> bool:
    """Whether computer algebra will be done with it soon: short, no towers of powers, no factorials, sums or integrals.

    One operation on huge integers cannot be interrupted by a time limit, so such texts must not get that far.
    """
    depth = max(itertools.accumulate((one in "([{") - (one in ")]}") for one in text), default=0)  # of brackets of any kind
    if len(text) > LONGEST_VERIFIED or len(text) * 2**depth > COSTLIEST_NESTING or _COSTLY.search(text):
        return False
    product = 1
    for match in _EXPONENT.finditer(text):
        if match[1] is None:
            return False
        product *= max([1, *map(int, re.findall(r"\d+", match[1]))])
    return product <= LARGEST_POWER


def _verified(given: str, gold: str) -> bool:
    """math-verify's judgement; False where it cannot read them or takes more than VERIFY_SECONDS for a step."""
    from math_verify import LatexExtractionConfig, parse, verify  # brings sympy along, which only MATH needs

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    limit = VERIFY_SECONDS if threading.current_thread() is threading.main_thread() else None  # it works by a signal
    extraction = [LatexExtractionConfig()]
    try:
        sides = [parse(rf"\boxed{{{side}}}", extraction, parsing_timeout=limit) for side in (gold, given)]
        return bool(verify(*sides, timeout_seconds=limit))
    except Exception:  # whatever an unreadable expression brings up in the parser or in sympy
        return False
