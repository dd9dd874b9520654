"""Where a generated text states its final answer, and how each kind of answer is read there.

Explicit statements (`#### X`, `\\boxed{X}`, "the answer is X" and, for letters and truth values, a few more) come first, and
the last of them that holds an answer wins. Inside a statement the first answer that is not denied counts: what follows it
explains it. Without a statement the end of the text is read. All of it takes time linear in the text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from experiments.answers.expressions import Number, canonical_latex, find_numbers, plain_numbers

WINDOW = 400  # characters in which a statement must end
MOST_STATEMENTS = 100  # that are looked at, from the end
END = 8000  # characters that are read where nothing is stated
Reader = Callable[[str], str | None]
Item = TypeVar("Item")


def _statements(cues: str, more: str = "") -> re.Pattern[str]:
    return re.compile(rf"(?P<line>#{{3,}})|(?P<box>\\(?:f?boxed|fbox)\b)|(?P<cue>\b(?:{cues})\b){more}", re.IGNORECASE)


_STATEMENT = _statements("answer")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\s{0,9}(?:(?P<brace>\{)|(?P<word>\w{1,40}))")
_SENTENCE_END = re.compile(r"[.!?](?=[\s*\"')\]]|$)|\n")
_LINK = re.compile(
    r"[^\w\n$£€.\\-]{0,6}(?:(?=[-$£€.\d\\])|\n)|[^:=\n]{0,160}?(?:\b(?:is|are|be|was|equals)\b|[:=])", re.IGNORECASE
)
_DENIED_LINK = re.compile(r"(?:\bnot|n['’]t|\bcannot|\bnever)\s+(?:\w+\s+)?be$", re.IGNORECASE)
_OPENING = re.compile(r"(?:[\s*_:>]|\\[\[(])*")


def last_statement(text: str, box: Reader, line: Reader, told: Reader, statement: re.Pattern[str] = _STATEMENT) -> str | None:
    """The answer of the last statement that holds one.

    box, line, told: how this kind of answer is read in the content of a box, in a line after ### or ####, and after the word
    "answer".
    """
    closing = _closing_braces(text)
    for match in itertools.islice(reversed(list(statement.finditer(text))), MOST_STATEMENTS):
        start = match.start() if match.groupdict().get("judged") else match.end()  # what is judged is read with its letter
        window = text[start : start + WINDOW]
        if match["box"]:
            answer = box(_box(text, match.end(), closing))
        elif match["line"]:
            answer = line(window.split("\n", 1)[0].strip())
        else:
            answer = told(window)
        if answer is not None:
            return answer
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that opens is closed."""
    closing, opened = {}, []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _box(text: str, start: int, closing: dict[int, int]) -> str:
    """The content of the braces at `start`, or the word there; empty where they do not close soon."""
    content = _BOX.match(text, start)
    if not content:
        return ""
    if content["word"]:
        return content["word"]
    end = closing.get(content.end() - 1, -1)
    return text[content.end() : end] if 0 <= end - content.end() <= WINDOW else ""


def _first_sentence(window: str) -> str:
    """It may begin on a later line."""
    rest = _OPENING.sub("", window, count=1)
    end = _SENTENCE_END.search(rest)
    return rest[: end.start()] if end else rest


def _linked(window: str) -> str:
    """The sentence after "is", ":" or the like; empty where nothing links the window to the word "answer"."""
    link = _LINK.match(window)
    return _first_sentence(window[link.end() :]) if link and not _DENIED_LINK.search(link[0]) else ""


def _told(read: Reader) -> Reader:
    """What the sentence after the word "answer" says, else what is linked to it."""
    return lambda window: read(_first_sentence(window)) or read(_linked(window))


def _sentence_around(text: str, start: int, end: int) -> str:
    before = text[max(0, start - WINDOW) : start]
    ends = list(_SENTENCE_END.finditer(before))
    after = text[end : end + WINDOW]
    stop = _SENTENCE_END.search(after)
    return before[ends[-1].end() if ends else 0 :] + text[start:end] + (after[: stop.start()] if stop else after)


def _last(items: Iterable[Item]) -> Item | None:
    last = None
    for last in items:  # noqa: B007
        pass
    return last


# --- numbers ---

_CLAUSE_END = re.compile(r"[,;](?=\s)|\s\(|\b(?:because|since|as|which|where|if|when|given)\b", re.IGNORECASE)
_REMARK = re.compile(
    r"\W*(?:correct|consistent|reasonable|right|wrong|verified|confirmed|the same)\b(?! (?:at|for)\b)", re.IGNORECASE
)
_DENIED = re.compile(r"(?:\bnot|n['’]t|\bthan|\binstead of)\s+(?:equal to\s+|be\s+)?[^\w\s]{0,4}$", re.IGNORECASE)
_CONTEXT = re.compile(
    r"\b(?:in|after|over|during|within|per|every|each|out of|of the|from|from the|than|at|step"
    r"|(?:by|after|from|for|when) \w+ing|(?:for|to) (?:the|each|all)(?: \w+)?)\s+[$£€¥₹]?$|\bfor\s+$",
    re.IGNORECASE,
)
_DIFFERENCE = re.compile(r"\s+(?:\w+\s+)?(?:more|less|fewer)\s+(?:\w+\s+){0,3}than\b", re.IGNORECASE)
_BOLD = re.compile(r"\*\*([^*\n]{1,60})\*\*")
_NUMBER_FIRST = re.compile(
    r"[^\w\\]*(?:(?:[A-Za-z]\s*=|about|around|approximately|exactly|only)[^\w\\]*)?(?:[\d.]|\\frac|\\boxed|\\text)"
)
_NUMBERED = re.compile(r"\W*\d+[.):]\s+[A-Za-z]")


def extract_number(text: str) -> str | None:
    """The number that a text gives as its answer, spelled as `expressions.canonical_fraction` does."""
    text = plain_numbers(text)
    found = last_statement(text, _stated_number, _number_line, lambda window: _told_number(_linked(window)))
    if found is not None:
        return found
    text = text[-END:]
    last = _last(find_numbers(text))
    return None if last is None else _concluded_number(_sentence_around(text, last.start, last.end))


def _number_line(line: str) -> str | None:
    """Not of a heading: "### Step 2", "#### 1. First"."""
    if not _NUMBER_FIRST.match(line) or _NUMBERED.match(line):
        return None
    return _stated_number("# " + line)  # tells "#### - 3" from an item of a list


def _told_number(sentence: str) -> str | None:
    return None if _REMARK.match(sentence) else _stated_number(sentence)


def _stated_number(statement: str) -> str | None:
    """The number of an explicit statement: the first one, or what an equation comes to."""
    end = _CLAUSE_END.search(statement)
    return (end and _first_number(statement[: end.start()])) or _first_number(statement)


def _first_number(clause: str) -> str | None:
    if result := _result(clause):
        return result
    numbers = [number for number in find_numbers(clause) if not _DENIED.search(clause, 0, number.start)]
    return next((number.value for number in (*_without_context(clause, numbers), *numbers)), None)


def _result(clause: str) -> str | None:
    """The number after the last "="."""
    return next((number.value for number in find_numbers(clause.rpartition("=")[2])), None) if "=" in clause else None


def _concluded_number(sentence: str) -> str | None:
    """The number of a last sentence: a bold one, what an equation comes to, or the last that no preposition makes context."""
    bold = [number.value for content in _BOLD.findall(sentence) for number in find_numbers(content)]
    if bold:
        return bold[-1]
    if result := _result(sentence):
        return result
    numbers = list(find_numbers(sentence))
    chosen = _without_context(sentence, numbers) or numbers
    return chosen[-1].value if chosen else None


def _without_context(sentence: str, numbers: Sequence[Number]) -> list[Number]:
    """Without "in 4 weeks", "for 9 eggs", "at $2 each", "6 more than"."""
    return [
        number
        for number in numbers
        if not _CONTEXT.search(sentence[max(0, number.start - 30) : number.start])
        and not _DIFFERENCE.match(sentence, number.end)
    ]


# --- letters ---

_LETTER_STATEMENT = _statements(
    r"answer|(?:correct|right|best) (?:option|choice|letter|one)|choose|chose|pick|select|go with",
    r"|(?P<judged>(?<![A-Za-z\d])(?-i:\(?[A-D]\)?)[*\s]{1,4}"
    r"(?:is|must be|would be) (?:the |clearly )?(?:correct|right|best|answer)\b(?: (?:answer|option|choice|letter|one)\b)?)",
)
_OPTION = re.compile(r"(?<![A-Za-z\d'’])(?:\((?P<bracketed>[A-Da-d])\)|(?P<bare>[A-D])(?![A-Za-z\d'’-]))")
_ALONE = re.compile(r"[^\w\\]*(?:\\text\w*\s*\{[^\w\\]*)?([A-Da-d])[^\w\\]*")
_LETTER_FIRST = re.compile(r"[^\w\\]*(?:\\text\w*\s*\{[^\w\\]*)?(?-i:[A-D])(?![\w'’-])")
_NOT_AN_ARTICLE = re.compile(
    r"\s+(?:is|was|because|since|as|and|or|but|not|which|with|for|due|from|based|over|rather|instead|would|must|can|has)\b",
    re.IGNORECASE,
)
_LABELLED = re.compile(r"(?:option|choice|answer|letter)\s+[^\w\s]{0,3}$", re.IGNORECASE)
_DENIED_BEFORE = re.compile(
    r"(?:\bnot|n['’]t|\bcannot|\bnever|\brather than|\binstead of|\bunlike|\bneither|\bnor|\bexcept)\s+"
    r"(?:(?:be|the|an?|option|choice|answer|letter|correct)\s+)*[^\w\s]{0,4}$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"\W{0,4}(?:(?:is|was|are|would be|seems|must be)\s+(?:\w+ly\s+|also\s+)?"
    r"(?:not|wrong|incorrect|false|out|impossible|unlikely|ruled|eliminated|excluded)\b"
    r"|(?:is|does|ca|wo)n['’]t|cannot|can not)",
    re.IGNORECASE,
)
_UNDECIDED = re.compile(r"\)?\W{0,3}\s*or\s+(?:option\s+)?\W{0,3}[A-D]\b")
_OTHER = re.compile(r"\b[A-D]\W{0,3}\s*or\s+(?:option\s+)?\W{0,3}$")
_OPTION_LINE = re.compile(r"^[^\w\n]{0,4}([A-D])(?:[^\w\n ]|[^\w\n]{0,9}$)", re.MULTILINE)


def extract_letter(text: str) -> str | None:
    """The letter A to D that a text gives as its answer."""
    found = last_statement(text, _stated_letter, _letter_line, _told(_stated_letter), _LETTER_STATEMENT)
    return found or _letter_on_its_line(text) or _mentioned_letter(text[-END:])


def canonical_letter(text: str) -> str | None:
    """The upper-case letter of a text that is nothing else but brackets, stars and the like."""
    alone = _ALONE.fullmatch(text)
    return alone[1].upper() if alone else None


def _letter_line(line: str) -> str | None:
    return _stated_letter(line) if _LETTER_FIRST.match(line) else canonical_letter(line)


def _stated_letter(statement: str) -> str | None:
    if alone := canonical_letter(statement):
        return alone
    for match in _OPTION.finditer(statement):
        if _UNDECIDED.match(statement, match.end()):
            return None
        if _is_choice(statement, match):
            return _letter(match)
    return None


def _letter(match: re.Match[str]) -> str:
    return (match["bracketed"] or match["bare"]).upper()


def _is_choice(text: str, match: re.Match[str]) -> bool:
    """Neither denied nor the article "A" nor one of several."""
    before = text[max(0, match.start() - 40) : match.start()]
    if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(text, match.end()):
        return False
    if _UNDECIDED.match(text, match.end()) or _OTHER.search(before):
        return False
    if match["bare"] != "A" or _LABELLED.search(before):
        return True
    return not re.match(r"\s+[A-Za-z]", text[match.end() : match.end() + 9]) or bool(_NOT_AN_ARTICLE.match(text, match.end()))


def _letter_on_its_line(text: str) -> str | None:
    """The letter with which the last or the first line begins, unless the options themselves are listed."""
    if len(set(_OPTION_LINE.findall(text))) != 1:
        return None
    lines = text.strip().split("\n")
    for line in (lines[-1], lines[0]):
        match = _OPTION_LINE.match(line)
        if match and not _DENIED_AFTER.match(line, match.end(1)):
            return match[1]
    return None


def _mentioned_letter(text: str) -> str | None:
    """The last letter that is neither denied nor an article, unless the options themselves are listed."""
    if len(set(_OPTION_LINE.findall(text))) > 1:
        return None
    match = _last(match for match in _OPTION.finditer(text) if _is_choice(text, match))
    return _letter(match) if match else None


# --- LaTeX ---

_INLINE = re.compile(r"\$\$?([^$\n]{1,300})\$|\\\(([^\n$]{1,300}?)\\\)|\\\[([^$]{1,300}?)\\\]")
_REASON = re.compile(r",?\s+(?:because|since)\b|,\s")
_MATHEMATICAL = re.compile(r"[\d\\]|^\W*[A-Za-z]\W*$")
_MOST_WORDS = 3  # of an answer that is neither a number nor LaTeX


def extract_latex(text: str) -> str | None:
    """The LaTeX answer of a text, spelled as `expressions.canonical_latex` does."""
    for told in (_told_latex, _told_words):
        found = last_statement(text, _whole_latex, _latex_line, told)
        if found is not None:
            return found
    inline = _last(_INLINE.finditer(text[-END:]))
    sides = _inline_content(inline).split("=") if inline else []
    return _whole_latex(sides[-1]) if sides else extract_number(text)


def _whole_latex(content: str) -> str | None:
    return canonical_latex(content) or None


def _latex_line(line: str) -> str | None:
    """Not of a heading in words."""
    return _whole_latex(line) if _MATHEMATICAL.search(line) and not re.match(r"\W*(?:[A-Za-z]{2,}|\d+[.):])\s", line) else None


def _told_latex(window: str) -> str | None:
    sentence = _linked_latex(window)
    inline = _INLINE.search(sentence)
    if inline:
        return _whole_latex(_inline_content(inline))
    answer = _REASON.split(sentence)[0]
    return _whole_latex(answer) if _MATHEMATICAL.search(answer) and not _REMARK.match(answer) else None


def _told_words(window: str) -> str | None:
    answer = _REASON.split(_linked_latex(window))[0]
    return _told_latex(window) or (_whole_latex(answer) if len(answer.split()) <= _MOST_WORDS else None)


def _linked_latex(window: str) -> str:
    """As `_linked`, with the delimiters that formulas begin with."""
    link = _LINK.match(window)
    rest = window[link.end() :].lstrip(" \t\n*_:") if link and not _DENIED_LINK.search(link[0]) else ""
    end = _SENTENCE_END.search(rest, 3 if rest.startswith(("\\[", "$$")) else 0)
    return rest[: end.start()] if end and not _INLINE.match(rest) else rest


def _inline_content(match: re.Match[str]) -> str:
    return match[1] or match[2] or match[3]


# --- truth values ---

_TRUTH_STATEMENT = _statements("answer|statement|claim|query|conclusion")
_TRUTH = re.compile(r"\b(true|false|untrue)\b", re.IGNORECASE)
_YES = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_ECHO = re.compile(r"\btrue\W{1,4}or\W{1,4}false\b", re.IGNORECASE)
_NEGATED = re.compile(
    r"(?:\bnot|n['’]t|\bcannot|\bnever)\s+(?:(?:be|necessarily|actually|the|case|that|is)\s+){0,3}\W{0,3}$", re.IGNORECASE
)


def extract_truth(text: str) -> str | None:
    """ "True" or "False"."""
    text = _ECHO.sub("", text)
    found = last_statement(text, _stated_truth, _truth_line, _told(_stated_truth), _TRUTH_STATEMENT)
    last = _last(_TRUTH.finditer(text[-END:]))
    return found or (_truth(text[-END:], last) if last else None)


def canonical_truth(text: str) -> str | None:
    """ "True" or "False" of a text that is nothing else."""
    return {"true": "True", "false": "False"}.get(text.strip(" .*\n").lower())


def _truth_line(line: str) -> str | None:
    return _stated_truth(line) if re.match(r"\W*(?:true|false|untrue|yes|no|not)\b", line, re.IGNORECASE) else None


def _stated_truth(statement: str) -> str | None:
    if match := _TRUTH.search(statement):
        return _truth(statement, match)
    yes = _YES.match(re.sub(r"^\W*is\b", "", statement))
    return {"yes": "True", "no": "False"}[yes[1].lower()] if yes else None


def _truth(text: str, match: re.Match[str]) -> str:
    holds = match[1].lower() == "true"
    denied = bool(_NEGATED.search(text[max(0, match.start() - 40) : match.start()]))
    return str(holds != denied)


# --- "Tom is a lempus." ---

_IS_A = re.compile(r"(?<!\w)([^\W\d]\w{0,40}) is an? (\w{1,40})")
_EMPHASIS = re.compile(r"[*`\"“”]")
_QUANTIFIED = re.compile(r"\b(?:every|each|all|any)\s+$", re.IGNORECASE)
_NO_NAMES = {"it", "he", "she", "this", "that", "answer", "which", "there", "conclusion"}
_NOT_IT = re.compile(r"\bnot (?:an? )?\w+(?:,? but)?|\brather than (?:an? )?\w+|\\\w+", re.IGNORECASE)
_SMALL = {"a", "an", "the", "that", "is", "it", "not", "but", "correct", "therefore"}


def extract_concept(text: str) -> str | None:
    """ "Tom is a lempus.", or the concept alone where only that is given."""
    found = last_statement(text, _stated_concept, _stated_concept, _told_concept)
    return found or _last(_sentences(text[-END:]))


def canonical_concept(text: str) -> str | None:
    """ "Tom is a lempus." of one sentence, or one word; None of anything else."""
    words = re.sub(r"[^\w\s'-]|_", " ", text).split()
    if len(words) == 4 and words[1] == "is" and words[2] in ("a", "an"):
        return f"{words[0]} is a {words[3]}."
    return words[0] if len(words) == 1 else None


def same_concept(given: str, gold: str) -> bool:
    """Equal, or the right concept where only that was given."""
    return given == gold or (" " not in given and gold.rstrip(".").rsplit(" ", 1)[-1] == given)


def _told_concept(window: str) -> str | None:
    return next(iter(_sentences(_first_sentence(window))), None) or _stated_concept(_linked(window))


def _stated_concept(statement: str) -> str | None:
    if sentences := _sentences(statement):
        return sentences[0]
    words = [word for word in re.findall(r"\w+", _NOT_IT.sub(" ", statement)) if word.lower() not in _SMALL]
    return words[0] if len(words) == 1 else None


def _sentences(text: str) -> list[str]:
    """All "NAME is a CONCEPT." in their order, rules and emphasis left out."""
    text = _EMPHASIS.sub("", text)
    matches = (match for match in _IS_A.finditer(text) if match[1].lower() not in _NO_NAMES)
    return [
        f"{match[1]} is a {match[2]}."
        for match in matches
        if not _QUANTIFIED.search(text[max(0, match.start() - 12) : match.start()])
    ]


def last_word(sentence: str) -> str:
    """What "NAME is a CONCEPT." says; "" of nothing."""
    return (sentence.rstrip(" .").split() or [""])[-1]
