"""Prompts, extraction and votes. The texts are what models write; each line names what it is about."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import pytest
from conftest import PUBLISHED
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from experiments.answers import expressions
from experiments.answers.benchmarks import BENCHMARKS, NO_ANSWER, canonical_answer, extract_answer, same_answer
from experiments.answers.expressions import canonical_fraction, canonical_latex, find_numbers, plain_numbers, same_latex
from experiments.answers.judging import (
    AGGREGATIONS,
    HARMONY_ANALYSIS,
    Vote,
    agreement_level,
    message_ids,
    user_message,
    vote,
)
from utils import UserError

NUMBERS = {
    "The answer cannot be 5. So it must be 18.": "18",
    "The answer can't be 5 since 5 < 6. Hence there are 18 apples.": "18",
    "The answer should not be 12. 9 + 9 = 18.": "18",
    # the data set's own form
    "so 9 * 2 = <<9*2=18>>18.\n#### 18": "18",
    "#### 1,234": "1234",
    "#### 1,234,567": "1234567",
    "#### -10": "-10",
    "#### −10": "-10",
    "#### - 3": "-3",
    "####18": "18",
    "### 18": "18",
    "#### $18": "18",
    "#### -$18": "-18",
    "#### $-18.50": "-18.5",
    "#### 18 dollars per day": "18",
    "#### **18**": "18",
    "#### x = 18": "18",
    "#### 5\n\nNo, I forgot the eggs.\n#### 18": "18",
    "#### 18\nCheck: 9 * 2 is 18, and 18 / 2 is 9.": "18",
    "#### 18\n#### 2. Check the steps": "18",
    "### Step 3\nShe makes 18.": "18",
    "### Step 1: 9 eggs\n### Step 2: at $2\nThe answer is 18.\n### Step 3": "18",
    # boxes
    r"\boxed{18}": "18",
    r"$\boxed{-7}$": "-7",
    r"\boxed{1{,}234}": "1234",
    r"\boxed{1,\!234}": "1234",
    r"\boxed{\$18.00}": "18",
    r"\boxed{18\text{ dollars}}": "18",
    r"\boxed{\text{18 eggs}}": "18",
    r"\boxed{\frac{3}{4}}": "0.75",
    r"\boxed{\dfrac{2}{3}}": "2/3",
    r"\boxed{-\frac{1}{2}}": "-0.5",
    r"\boxed{1\frac{1}{2}}": "1.5",
    r"\boxed{\frac12}": "0.5",
    r"\boxed{x = 18}": "18",
    r"\boxed{50\%}": "50",
    r"\boxed 7": "7",
    r"First \boxed{9}, then \boxed{18}.": "18",
    r"\boxed{18} is the answer. It is 2 times 9.": "18",
    r"\boxed{\boxed{18}}": "18",
    r"The answer is \boxed{18": "18",
    r"\boxed{} So she makes 18.": "18",
    # words
    "The answer is 18.": "18",
    "The answer is 18": "18",
    "The final answer is: $18$": "18",
    "**Final answer:** 18": "18",
    "**Answer: $18**": "18",
    "Answer:\n\n18 eggs": "18",
    "### Answer\n18 dollars": "18",
    "The answer is 5. Wait, that is wrong. The answer is 18.": "18",
    "The answer is not 5 but 18.": "18",
    "The answer is 18, because 3 + 4 + 11 = 18 and 9 + 1 = 10.": "18",
    "The answer is 18 dollars, which is more than 3 * 5 = 15.": "18",
    "The answer is 9 * 2 = 18.": "18",
    "The answer is 18 (9 eggs at 2 dollars each).": "18",
    "The answer to part 2 is 18.": "18",
    "The answer is that in 4 weeks she reads 18 books.": "18",
    "The answer is -18.": "-18",
    "The answer is negative 18.": "-18",
    "The answer is minus 18 degrees.": "-18",
    "The answer is 3.50.": "3.5",
    "The answer is .5": "0.5",
    "The answer is 1/3 of the cake.": "1/3",
    "The answer is 2 1/2 hours.": "2.5",
    r"The answer is $2\frac{1}{2}$ hours.": "2.5",
    "The answer is 1.2 × 10^3.": "1200",
    r"The answer is \(18\).": "18",
    "The answer is 18%.": "18",
    "The answer is £1,250.75 in all.": "1250.75",
    "The answer is USD 18.": "18",
    "The answer is USD18.": "18",
    "The answer is 18. This answer is consistent with the 9 eggs.": "18",
    "The answer is 18.\nThis answer matches our 2 checks.": "18",
    # no marker at all
    "18": "18",
    "-18": "-18",
    "She makes **18** dollars from 9 eggs.": "18",
    "She makes **18** dollars with 9 eggs.": "18",
    "#### about 18 eggs": "18",
    "So she has 16 - 3 - 4 = 9 eggs and makes 9 * $2 = $18 every day.": "18",
    "So she made $18 from the 9 eggs.": "18",
    "She earns 18 dollars in 4 weeks.": "18",
    "In 4 weeks she earns 18 dollars.": "18",
    "After giving 2 away she has 18 left.": "18",
    "She sells 9 eggs for $18.": "18",
    "That is 18, 6 more than 12.": "18",
    "She has 10 apples.\nShe buys 8 more.\nNow she has 18 apples": "18",
    "The temperature fell by 20, so it is -18 now.": "-18",
    "20 - 2 leaves 18": "18",
    "On the 21st day she has 18 eggs.": "18",
    "10-3 is 7": "7",
    "She has 1,234 marbles.": "1234",
    "The total is 3, 4 and 18.": "18",
    "GPT4 says 18": "18",
    "- 18 apples": "18",
    # nothing there
    "": NO_ANSWER,
    "I do not know.": NO_ANSWER,
    "The answer is a tree.": NO_ANSWER,
    "#### ": NO_ANSWER,
    "10/0": NO_ANSWER,
    "1" * 60: NO_ANSWER,
}
LETTERS = {
    "B is the correct answer because A and C are false.": "B",
    "(B) is the correct option; (A) is too broad.": "B",
    "Option B is the right answer and option A is a distractor.": "B",
    "B is the answer, whereas C is tempting.": "B",
    "The answer can't be A. It's B.": "B",
    "The correct option cannot be A. So B.": "B",
    "#### B": "B",
    "### (B)": "B",
    r"\boxed{B}": "B",
    r"\boxed{\text{B}}": "B",
    r"\boxed{\textbf{(B)}}": "B",
    r"\boxed{(B) 18}": "B",
    "The answer is B.": "B",
    "The answer is (B).": "B",
    "The answer is **B**": "B",
    "the correct answer is: b": "B",
    "Answer: (b)": "B",
    "Answer:\n\nB": "B",
    "**Answer:** B. Paris": "B",
    "The answer is B. Option A is wrong, and C was in 1812.": "B",
    "The answer is B, because A and C are too large.": "B",
    "The answer is B rather than A.": "B",
    "The answer is not A. It is B.": "B",
    "The answer is not A but B.": "B",
    "The answer isn't (A), it's (B).": "B",
    "The answer cannot be A, so B remains.": "B",
    "The answer is A.": "A",
    "The answer is A": "A",
    "The answer is A because it fits.": "A",
    "The answer is a tree, so option C.": "C",
    "The answer is A tree, so C": "C",
    "A good answer needs care. The answer is D.": "D",
    "A Nash equilibrium is stable, which leaves D.": "D",
    "A is wrong. B is wrong. D is wrong. C is right.": "C",
    "B is the correct answer, unlike A.": "B",
    "Option B is correct. A would need more energy.": "B",
    "A is not correct, and C is incorrect. I choose B.": "B",
    "The correct option is C, although B is close.": "C",
    "B": "B",
    "(B)": "B",
    "B.": "B",
    "B. Paris\n\nA is the capital of another country.": "B",
    "It is close to noon.\n\n**C**": "C",
    "First I thought that the answer is A. After checking, the answer is C.": "C",
    "I would go with D, since A, B and C fail.": "D",
    "So it must be option D": "D",
    "It must be option A given the data": "A",
    "So B it is, as A is wrong.": "B",
    "The answer is (C) Vitamin A": "C",
    "The answer is E": NO_ANSWER,
    "The answer is either A or B.": NO_ANSWER,
    "A. 1\nB. 2\nC. 3\nD. 4": NO_ANSWER,
    "A tree is a plant.": NO_ANSWER,
    "": NO_ANSWER,
}
LATEX = {
    r"\boxed{\frac{1}{2}}": "0.5",
    r"\boxed{\frac{x+1}{2}}": r"\frac{x+1}{2}",
    r"so $x = \boxed{\left(3, \dfrac{\pi}{2}\right)}$.": r"(3,\frac{\pi}{2})",
    r"\boxed{\{1, 2\}}": r"\{1,2\}",
    r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}": r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"\boxed{3} is wrong, it is \boxed{4}": "4",
    r"\boxed{\text{Evelyn}}": "Evelyn",
    r"\boxed{90^\circ}": "90",
    r"\boxed{5\text{ cm}^2}": "5",
    r"\boxed{10,000}": "10000",
    r"\boxed{x \in [-2,7]}": "[-2,7]",
    r"\boxed{5}. This answer matches our check.": "5",
    r"The answer is $\frac{3}{4}$.": "0.75",
    r"The answer is $x = 7$, because $3 + 4 = 7$.": "7",
    "The answer is 18 dollars.": "18",
    "The answer is Evelyn.": "Evelyn",
    r"\[ x = 2\sqrt2 \]": r"2\sqrt{2}",
    r"Thus $3 + 4 = 7$.": "7",
    "#### 18": "18",
    "This is hard.": NO_ANSWER,
    r"\boxed{": NO_ANSWER,
}
TRUTH = {
    "### True": "True",
    "#### False": "False",
    r"\boxed{\text{False}}": "False",
    "The answer is true.": "True",
    "**Answer: False**": "False",
    "The statement is not true.": "False",
    "The statement is false, because it is true that Max is wooden.": "False",
    "It is not false.": "True",
    "That cannot be true": "False",
    "True or false: Max is not wooden. Max is wooden, so the statement is False.": "False",
    "The answer is True. Wait, Max is opaque. The answer is False.": "False",
    "So the answer is no.": "False",
    "Max is wooden. Therefore it isn't true.": "False",
    "Max is a vumpus.": NO_ANSWER,
    "True or false: Max is not wooden.": NO_ANSWER,
}
CONCEPTS = {
    "#### Tom is a **zumpus**.": "Tom is a zumpus.",
    'Therefore, Tom is a "zumpus".': "Tom is a zumpus.",
    "### Tom is a zumpus.": "Tom is a zumpus.",
    "Tom is a lempus.\nEvery lempus is a zumpus.\n### Tom is a zumpus.": "Tom is a zumpus.",
    "Tom is a lempus. Every lempus is a zumpus. So Tom is a zumpus.": "Tom is a zumpus.",
    "The answer is that Tom is a zumpus, not a lempus.": "Tom is a zumpus.",
    "**Answer:** Tom is an impus": "Tom is a impus.",
    "Tom is not a lempus but the answer is zumpus.": "zumpus",
    "The answer is not a lempus, but a zumpus.": "zumpus",
    r"\boxed{zumpus}": "zumpus",
    r"\boxed{\text{Tom is a zumpus}}": "Tom is a zumpus.",
    "### n7": "n7",
    "Is Tom a lempus or zumpus?": NO_ANSWER,
    "Every lempus is a zumpus.": NO_ANSWER,
}
TEXTS = [
    *(("gsm8k", *row) for row in NUMBERS.items()),
    *(
        (name, *row)
        for name in ("gsm-symbolic", "gsm-hard", "svamp", "multiarith")
        for row in itertools.islice(NUMBERS.items(), 3)
    ),
    *(("mmlu", *row) for row in LETTERS.items()),
    *(("gpqa", *row) for row in itertools.islice(LETTERS.items(), 3)),
    *(("math", *row) for row in LATEX.items()),
    *(("prontoqa", *row) for row in TRUTH.items()),
    *(("prosqa", *row) for row in CONCEPTS.items()),
]


@pytest.mark.parametrize(("benchmark", "text", "answer"), TEXTS)
def test_the_answer_that_a_text_states(benchmark: str, text: str, answer: str) -> None:
    assert extract_answer(benchmark, text) == answer


def test_the_table_is_large_and_covers_every_benchmark() -> None:
    assert len(TEXTS) >= 80
    assert {benchmark for benchmark, _, _ in TEXTS} == set(BENCHMARKS)


@pytest.mark.published_data("gsm8k_test.jsonl", "gsm8k_train.jsonl")
@pytest.mark.parametrize(
    ("name", "negative"), [("test", {489: "-10", 1113: "-3"}), ("train", {5715: "-7", 5844: "-47", 6189: "-12"})]
)
def test_every_gold_answer_of_gsm8k(name: str, negative: dict[int, str]) -> None:
    path = PUBLISHED / f"gsm8k_{name}.jsonl"
    texts = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    golds = [text.rsplit("####", 1)[1].strip() for text in texts]
    assert [extract_answer("gsm8k", text) for text in texts] == [gold.replace(",", "") for gold in golds]
    assert [canonical_answer("gsm8k", gold) for gold in golds] == [gold.replace(",", "") for gold in golds]
    assert {index: gold for index, gold in enumerate(golds) if gold.startswith("-")} == negative
    if name == "train":
        return
    without_mark = [extract_answer("gsm8k", text.rsplit("####", 1)[0]) for text in texts]
    agree = sum(found == gold.replace(",", "") for found, gold in zip(without_mark, golds, strict=True))
    assert agree / len(golds) > 0.98  # the last line of a solution mostly says it


# --- numbers in any spelling ---

WHOLE = st.integers(-(10**12), 10**12)
CENTS = st.integers(-(10**9), 10**9)
FORMS = ("{}", "${}", "{} dollars", "**{}**", "{}%", "{}.", "${}$", "about {} eggs")
FRAMES = ("#### {}", "\\boxed{{{}}}", "The answer is {}", "Final answer: {}", "So 3 + 4 = {}", "She has {}")


def spellings(value: Fraction) -> list[str]:
    """Of a number with at most two decimals: with commas, with decimals, as LaTeX, with another minus sign."""
    decimal = f"{float(value):,.2f}"
    plain = decimal.replace(",", "")
    found = [decimal, plain, decimal.replace(",", "{,}"), decimal.replace(",", "\\,"), plain.replace("-", "−"), "+" + plain]
    if value.denominator == 1:
        found += [str(value), f"{int(value):,}"]
    else:
        sign = "-" if value < 0 else ""
        found += [
            f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}",
            f"{sign}{abs(value.numerator)}/{value.denominator}",
        ]
    return found[:-4] + found[-2:] if value < 0 else found


@settings(deadline=None, max_examples=60)
@given(value=WHOLE.map(Fraction) | CENTS.map(lambda cents: Fraction(cents, 100)), data=st.data())
def test_a_number_in_any_spelling_comes_back(value: Fraction, data: st.DataObject) -> None:
    number = data.draw(st.sampled_from(spellings(value)))
    text = data.draw(st.sampled_from(FRAMES)).format(data.draw(st.sampled_from(FORMS)).format(number))
    before = data.draw(st.sampled_from(["", "#### 5\n\n", "\\boxed{-7}. ", "The answer is 12. But no. "]))
    for benchmark in ("gsm8k", "gsm-symbolic"):
        if before and text.startswith(("So", "She")):
            before = "There are 12 eggs. "
        assert extract_answer(benchmark, before + text) == canonical_fraction(value), before + text


@settings(deadline=None, max_examples=60)
@given(numerator=st.integers(-(10**6), 10**6), denominator=st.integers(1, 10**6))
def test_the_canonical_spelling_is_exact_and_fixed(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    written = canonical_fraction(value)
    assert Fraction(written) == value
    assert canonical_answer("gsm8k", written) == written
    assert not ("." in written and written.endswith(("0", ".")))


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=300))
def test_any_text_has_an_answer_or_none(text: str) -> None:
    for benchmark in BENCHMARKS:
        answer = extract_answer(benchmark, text)
        assert answer
        if benchmark in ("mmlu", "gpqa"):
            assert answer in {"A", "B", "C", "D", NO_ANSWER}
        if benchmark == "prontoqa":
            assert answer in {"True", "False", NO_ANSWER}


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="0123456789 ,.-+$/\\{}[]()=#*fracboxed\nABCD", max_size=120))
def test_what_is_extracted_is_canonical(text: str) -> None:
    for benchmark in BENCHMARKS:
        answer = extract_answer(benchmark, text)
        if answer != NO_ANSWER and benchmark != "math":
            assert canonical_answer(benchmark, answer) == answer


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("12/25/2020", ["12"]),
        ("1,2,3", ["1", "2", "3"]),
        ("1,00,000", ["100000"]),
        ("5-10", ["5", "10"]),
        ("5 - -10", ["5", "-10"]),
        ("(-3, 4)", ["-3", "4"]),
        ("1,234,56", ["1234", "56"]),
        ("x2 and 3rd", []),
        ("2e3 3E-2", ["2000", "0.03"]),
    ],
)
def test_the_numbers_of_a_text(text: str, numbers: list[str]) -> None:
    assert [number.value for number in find_numbers(plain_numbers(text))] == numbers


# --- time ---

HOSTILE = {
    "boxes in boxes": "\\boxed{",
    "closed boxes": "\\boxed{}",
    "open braces": "{",
    "closing braces": "}",
    "digits": "1",
    "digits and commas": "1,",
    "groups of two": "12,34,",
    "groups of three": "123,",
    "marks": "#### ",
    "marks without blanks": "#",
    "marked lines": "#### the\n",
    "answers": "answer ",
    "answers that are": "the answer is not ",
    "denied letters": "A is not ",
    "letters": "A ",
    "undecided": "A or B ",
    "stars": "*",
    "bold": "**1",
    "dollars": "$",
    "formulas": "$x=",
    "displays": "\\[",
    "fractions": "\\frac",
    "fractions in fractions": "\\frac{",
    "slashes": "1/",
    "minus signs": "-",
    "blanks": " ",
    "a number and blanks": "1 " + " " * 99,
    "lines": "\n",
    "equations": "1=",
    "powers": "1 x 10^",
    "denials": "not ",
    "truths": "not true or ",
    "rules": "every a is a ",
    "words": "is a",
    "dots": "1.",
    "texts": "\\text{",
    "units": "1 ab ",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("benchmark", ["gsm8k", "mmlu", "math", "prosqa", "prontoqa"])
@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_end(benchmark: str, piece: str) -> None:
    text = (piece * (100_000 // len(piece) + 1))[:100_000]
    for hostile in (text, "\\boxed{" + text + "}", "The answer is " + text + " 7"):
        extract_answer(benchmark, hostile)


# --- the same answer ---


@pytest.mark.parametrize(
    ("benchmark", "given_answer", "gold", "same"),
    [
        ("gsm8k", "18", "18", True),
        ("gsm8k", "18", "-18", False),
        ("gsm8k", NO_ANSWER, NO_ANSWER, False),
        ("math", "110_2", "110_3", False),
        ("math", "52_{10}", "52_8", False),
        ("math", "52_{8}", "52_8", True),
        ("math", "52", "52_8", True),
        ("mmlu", "A", "B", False),
        ("prosqa", "Tom is a zumpus.", "Tom is a zumpus.", True),
        ("prosqa", "zumpus", "Tom is a zumpus.", True),
        ("prosqa", "Sally is a zumpus.", "Tom is a zumpus.", False),
        ("prosqa", "lempus", "Tom is a zumpus.", False),
        ("prontoqa", "True", "False", False),
    ],
)
def test_same_answer(benchmark: str, given_answer: str, gold: str, same: bool) -> None:
    assert same_answer(benchmark, given_answer, gold) == same


SAME_LATEX = [
    (r"\frac{1}{2}", "0.5", True),
    (r"\dfrac12", "1/2", True),
    (r"x = 5", "5", True),
    (r"5\text{ cm}", "5", True),
    (r"\text{(A)}", "A", True),
    (r"10101_{2}", "10101_2", True),
    (r"(-\infty, 2]", r"\left(-\infty,2\right]", True),
    (r"\text{Even}", "even", True),
    ("3", "4", False),
    ("odd", "even", False),
]


@pytest.mark.parametrize(("one", "other", "same"), SAME_LATEX)
def test_latex_answers_by_their_spelling(one: str, other: str, same: bool) -> None:
    assert same_latex(canonical_latex(one), canonical_latex(other)) == same


@pytest.mark.timeout(120)
def test_latex_answers_by_computer_algebra() -> None:
    pytest.importorskip("math_verify")
    assert same_latex(r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}")
    assert same_latex(r"2\pi", r"\pi\cdot2")
    assert not same_latex("[1,2)", "[1,2]")
    assert not same_latex("(3,5)", "(5,3)")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "hostile", ["9^{9^{9^9}}", "((9^{99})^{99})^{99}", "(10^9)!", "9**9**9**9", "2^{99999999}", "x+" * 5000]
)
def test_no_computer_algebra_on_what_would_not_end(hostile: str) -> None:
    assert not same_latex(hostile, "x")


# --- prompts ---


def test_a_user_message_asks_for_steps_and_a_form() -> None:
    for benchmark in BENCHMARKS:
        message = user_message(benchmark, " Why? ", ["one", "two"])
        assert message.startswith("Why?\nA. one\nB. two\n\n")
        assert "step by step" in message


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_request_itself_states_no_answer_but_its_form_can_be_read(benchmark: str) -> None:
    examples = {"gsm8k": "18", "gsm-symbolic": "18", "math": "18", "mmlu": "B", "gpqa": "B", "prontoqa": "True"}
    examples |= dict.fromkeys(("gsm-hard", "svamp", "multiarith"), "18")
    answer = examples.get(benchmark, "Tom is a zumpus.")
    mark = "\\boxed{%s}" if "boxed" in BENCHMARKS[benchmark].kind.request else "#### %s"
    assert extract_answer(benchmark, "Let me think.\n" + mark % answer) == answer


def test_a_message_without_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    message = "Is Tom a lempus?"
    assert message_ids(tokenizer, message) == tokenizer(message + "\n")["input_ids"]


TEMPLATE = "{% for m in messages %}Tom {{ m.content }} {% endfor %}{% if add_generation_prompt %}Sally{% endif %}"


def test_a_message_in_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    words = tokenizer.convert_ids_to_tokens(message_ids(tokenizer, "lempus"))
    assert [word.strip("▁Ġ ") for word in words if word.strip("▁Ġ ")] == ["Tom", "lempus", "Sally"]


def test_a_message_in_the_harmony_format(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<|channel|>", "<|message|>", "analysis"], special_tokens=True)
    tail = tokenizer.convert_ids_to_tokens(message_ids(tokenizer, "lempus"))[-3:]
    assert "".join(tail) == HARMONY_ANALYSIS


def test_unknown_benchmarks_are_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        extract_answer("gsm8", "18")
    with pytest.raises(UserError, match="known: gsm8k, "):
        extract_answer("xyz", "18")


@pytest.mark.parametrize(
    ("benchmark", "answer"), [("gsm8k", "many"), ("mmlu", "E"), ("prontoqa", "maybe"), ("math", " "), ("prosqa", "")]
)
def test_a_gold_answer_of_another_kind_is_an_error(benchmark: str, answer: str) -> None:
    with pytest.raises(ValueError, match="is no answer to a question of"):
        canonical_answer(benchmark, answer)


# --- votes ---

ANSWERS = st.lists(st.sampled_from(["1", "2", "3", NO_ANSWER]), min_size=1, max_size=7)
SCORES = st.tuples(st.floats(-50, 0), st.integers(1, 9))  # log-probability and tokens


def all_votes(answers: Sequence[str], texts: Sequence[tuple[float, int]], noise: Sequence[float]) -> dict[str, Vote]:
    branches = [{"log_probability": score, "new_tokens": tokens} for score, tokens in texts]
    return {
        name: vote(answers, [log_weight(*each) for each in zip(branches, noise, strict=True)])
        for name, log_weight in AGGREGATIONS.items()
    }


@settings(deadline=None, max_examples=60)
@given(answers=ANSWERS, data=st.data())
def test_what_every_vote_obeys(answers: list[str], data: st.DataObject) -> None:
    texts = [data.draw(SCORES) for _ in answers]
    noise = [data.draw(st.floats(0, 10)) for _ in answers]
    order = data.draw(st.permutations(range(len(answers))))
    permuted = all_votes(*([values[i] for i in order] for values in (answers, texts, noise)))
    for name, found in all_votes(answers, texts, noise).items():
        assert 0 <= found.confidence <= 1
        assert (found.answer == NO_ANSWER) == (set(answers) == {NO_ANSWER}) == (found.votes == 0)
        assert found.votes == (0 if found.answer == NO_ANSWER else answers.count(found.answer))
        assert permuted[name].confidence == found.confidence  # whatever wins a tie, its share is the same
        if permuted[name].answer != found.answer:
            tied = [answer for answer in answers if answer in (found.answer, permuted[name].answer)]
            assert tied[0] == found.answer


@settings(deadline=None, max_examples=60)
@given(ANSWERS)
def test_the_majority_is_the_earliest_of_the_most_frequent(answers: list[str]) -> None:
    found = vote(answers, [0.0] * len(answers))
    given_ones = [answer for answer in answers if answer != NO_ANSWER]
    most = max((given_ones.count(answer) for answer in given_ones), default=0)
    assert found.answer == next((answer for answer in given_ones if given_ones.count(answer) == most), NO_ANSWER)
    assert found.confidence == pytest.approx(most / len(answers))


def test_votes_by_hand() -> None:
    assert vote(["2", "1", "1", "2", "3"], [0.0] * 5) == Vote("2", 2, pytest.approx(0.4))
    assert vote([NO_ANSWER, NO_ANSWER, "7"], [0.0] * 3) == Vote("7", 1, pytest.approx(1 / 3))
    assert vote([NO_ANSWER] * 5, [0.0] * 5) == Vote(NO_ANSWER, 0, 0.0)
    texts = [(4 * math.log(0.5), 4), (math.log(0.4), 1), (2 * math.log(0.3), 2)]
    found = all_votes(["1", "2", "2"], texts, [0, 3, 3])
    assert found["majority"] == Vote("2", 2, pytest.approx(2 / 3))
    assert found["probability"] == Vote("2", 2, pytest.approx(0.7 / 1.2))
    assert found["probability_sum"] == Vote("2", 2, pytest.approx(0.49 / (0.5**4 + 0.4 + 0.09)))
    assert found["noise_weighted"] == Vote("1", 1, pytest.approx(1 / 1.5))
    assert vote(["1", "2"], [-18000.0, -18000.9]).answer == "1"  # no underflow
    assert all_votes(["1", "2"], texts[:2], [math.inf, 5])["noise_weighted"].answer == "2"


def test_answers_that_mean_the_same_are_one_group() -> None:
    answers = ["Tom is a lempus.", "Tom is a zumpus.", "zumpus"]
    assert vote(answers, [0.0] * 3, partial(same_answer, "prosqa")) == Vote("Tom is a zumpus.", 2, pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("answers", "weights", "reason"),
    [([], [], "at least one branch"), (["1"], [], "zip"), (["1"], [0.1], "at most 0"), (["1"], [math.nan], "at most 0")],
)
def test_votes_that_make_no_sense(answers: list[str], weights: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        vote(answers, weights)


def test_levels_are_those_of_five_branches() -> None:
    assert [agreement_level(votes, 5) for votes in (1, 2, 3, 4, 5)] == [None, "minimal", "moderate", "strong", "unanimous"]
    assert agreement_level(3, 3) is None


@pytest.mark.parametrize("nested", ["{" * 20 + "x" + "}" * 20, "(" * 20 + "x" + ")" * 20, "{(([x" + "+x" * 90 + "]))}"])
def test_deeply_nested_latex_is_not_handed_to_the_computer_algebra(nested, monkeypatch):
    asked = []
    monkeypatch.setattr(expressions, "_verified", lambda given, gold: asked.append(given) or True)
    assert not expressions.same_latex(nested, "7")
    assert expressions.same_latex(nested, nested)
    assert asked == []
    assert expressions.same_latex(r"\frac{\sqrt{(x+1)}}{2}", "y")
