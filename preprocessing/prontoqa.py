"""ProntoQA questions (arXiv 2210.01240) from the raw file of the official generator, split as in arXiv 2412.06769.

`python preprocessing/prontoqa.py 5hop_0shot_random.json` writes data/prontoqa_{train,valid,test}.json;
`scripts/make_prontoqa.sh` makes the raw file with a clone of the generator, https://github.com/asaparov/prontoqa.
"""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocessing.common import SPLITS, Record, parse_rows, print_table, text_field, write_splits
from systems.arguments import Parser, natural
from utils import UserError, entry_point, parse_json, printable, read_text

EXAMPLES = ("5hop_0shot_random.json", "5hop_0shot_random.json --train 500 --valid 50 --out-prefix data/mine")
PUBLISHED_SIZES = (9000, 200, 800)
QUERY = "True or false: "

_PREDICATE = r"(?P<negated> not)?(?: an?)? (?P<predicate>\w+)\."
_FACT = re.compile(r"(?P<subject>\w+) is" + _PREDICATE)
_RULE = re.compile(r"(?:(?:Every|Each) (?P<subject>\w+) is|(?P<subjects>\w+) are)" + _PREDICATE)


# --- conversion ---


def read_examples(path: Path) -> list[Record]:
    """The records of a raw file in its order. UserError: no such file, or an example that is not in the generator's format."""
    examples = parse_json(read_text(path), path)
    if not isinstance(examples, dict):
        raise UserError(f'{path}: expected an object {{"example1": {{"test_example": ...}}, ...}} as the generator writes it')
    return parse_rows(path, "example", examples.values(), convert_example)


def convert_example(example: Any) -> Record:
    """The record of one raw example; its in-context examples are left out. ValueError: a field is missing or wrong.

    A proof of h hops is 2h + 1 sentences, a fact and then a rule and a conclusion for each hop. Two sentences make a step,
    so that every step but the last ends in the rule that leads on, and the last is the conclusion alone: h + 1 steps.
    """
    test: Any = example.get("test_example") if isinstance(example, dict) else None
    question, query, answer = (text_field(test, name) for name in ("question", "query", "answer"))
    if answer not in ("True", "False"):
        raise ValueError(f"field 'answer': expected True or False, found {answer!r}")
    chain = test.get("chain_of_thought")
    if not isinstance(chain, list) or len(chain) % 2 == 0 or not all(isinstance(one, str) and one.strip() for one in chain):
        raise ValueError("field 'chain_of_thought': expected an odd number of sentences: a fact, then two for each hop")
    steps = [" ".join(chain[at : at + 2]) for at in range(0, len(chain), 2)]
    return {"question": f"{question} {query}", "answer": answer, "steps": steps}


# --- proofs ---


class Claim(NamedTuple):
    """`subject is [not] predicate`, concepts in the singular."""

    subject: str
    predicate: str
    holds: bool


def singular(word: str) -> str:
    """`Wumpuses` -> `wumpus`; properties such as `moderate` stay."""
    return word.lower().removesuffix("es") if word.endswith("puses") else word.lower()


def parse(sentence: str, pattern: re.Pattern[str]) -> Claim | None:
    match = pattern.fullmatch(sentence)
    if match is None:
        return None
    parts = match.groupdict()
    return Claim(singular(parts["subject"] or parts["subjects"]), singular(parts["predicate"]), parts["negated"] is None)


def split_sentences(text: str) -> list[str]:
    """What stands before each full stop, with it."""
    return [f"{part}.".strip() for part in text.split(".")[:-1] if part]


def proof_problem(record: Record) -> str | None:
    """Why the steps do not prove the answer from the sentences of the question; None if they do."""
    theory, _, query = record["question"].rpartition(QUERY)
    given, sentences = set(split_sentences(theory)), split_sentences(" ".join(record["steps"]))
    conclusion = parse(sentences[0], _FACT) if sentences else None
    if conclusion is None or sentences[0] not in given:
        return f"the proof does not begin with a fact of the question: {sentences[:1]}"
    for rule, derived in zip(sentences[1::2], sentences[2::2], strict=False):
        if rule not in given:
            return f"{rule!r} does not stand in the question"
        step = parse(derived, _FACT)
        if step is None or step != follow(conclusion, parse(rule, _RULE)):
            return f"{derived!r} does not follow by {rule!r}"
        conclusion = step
    asked = conclusion if record["answer"] == "True" else conclusion._replace(holds=not conclusion.holds)
    if parse(query, _FACT) != asked:
        return f"the last sentence, {sentences[-1]!r}, does not make {query!r} {record['answer']}"
    return None


def follow(fact: Claim, rule: Claim | None) -> Claim | None:
    """What the rule says of the fact's subject; None where it says nothing."""
    if rule is None or not fact.holds or rule.subject != fact.predicate:
        return None
    return Claim(fact.subject, rule.predicate, rule.holds)


# --- splits ---


def split_records(records: Sequence[Record], train: int, valid: int, test: int | None) -> dict[str, list[Record]]:
    """The first `train`, the next `valid` and the next `test` records, None for all the rest; empty splits are left out.

    UserError: there are fewer.
    """
    if len(records) < train + valid + (1 if test is None else test):
        rest = "at least 1" if test is None else f"{test:,}"
        raise UserError(f"{len(records):,} examples are too few for --train {train} --valid {valid} and {rest} for test")
    last = records[train + valid :][:test]
    splits = zip(SPLITS, (records[:train], records[train : train + valid], last), strict=True)
    return {name: list(split) for name, split in splits if split}


def question_key(record: Record) -> tuple[str, ...]:
    """Equal for questions that differ only in the order of their sentences."""
    return tuple(sorted(split_sentences(record["question"])))


def statistics(records: Sequence[Record], others: Collection[tuple[str, ...]]) -> dict[str, str]:
    """The summary's cells for one split; `others`: keys of the questions of the other splits."""
    steps = sorted({len(record["steps"]) for record in records})
    keys = [question_key(record) for record in records]
    return {
        "records": f"{len(records):,}",
        "steps": " ".join(map(str, steps)),
        "answer True": f"{sum(record['answer'] == 'True' for record in records) / len(records):.1%}",
        "proofs that hold": f"{sum(proof_problem(record) is None for record in records):,}",
        "repeated questions": f"{len(keys) - len(set(keys)):,}",
        "also in another split": f"{sum(key in others for key in keys):,}",
    }


def print_statistics(splits: dict[str, list[Record]]) -> None:
    keys = {name: {question_key(record) for record in records} for name, records in splits.items()}
    others = {name: set().union(*(keys[other] for other in keys if other != name)) for name in keys}
    columns = [statistics(records, others[name]) for name, records in splits.items()]
    print_table(splits, {row: [column[row] for column in columns] for row in columns[0]})


# --- command line ---


def parse_arguments(given: list[str]) -> argparse.Namespace:
    """UserError: an option that there is not, or a wrong value."""
    parser = Parser("python preprocessing/prontoqa.py", __doc__, EXAMPLES)
    parser.add_argument("raw", type=Path, metavar="RAW.json", help="the generator's file")
    train, valid, test = PUBLISHED_SIZES
    parser.add_argument("--train", type=natural, default=train, metavar="N", help=f"first N examples (default {train})")
    parser.add_argument("--valid", type=natural, default=valid, metavar="N", help=f"next N examples (default {valid})")
    parser.add_argument("--test", type=natural, metavar="N", help=f"next N examples (default all the rest; published {test})")
    parser.add_argument("--out-prefix", type=Path, default=Path("data/prontoqa"), help="files are PREFIX_train.json, ...")
    parser.add_argument("--check", action="store_true", help="a proof that does not hold is an error, not a line of the table")
    args = parser.parse_args(given)
    if args.train + args.valid == 0 and args.test == 0:
        parser.error("--train, --valid and --test are all 0: nothing to write")
    return args


def check_proofs(records: Sequence[Record], strict: bool) -> None:
    """Names the first proof that does not hold: a warning, or a UserError if `strict`."""
    numbered = enumerate(map(proof_problem, records), start=1)
    first = next((f"example {number}: {problem}" for number, problem in numbered if problem), None)
    if first and strict:
        raise UserError(first)
    if first:
        print(f"warning: {printable(first)} (the first such example; --check makes it an error)", file=sys.stderr)


@entry_point
def main(given: list[str]) -> None:
    args = parse_arguments(given)
    records = read_examples(args.raw)
    splits = split_records(records, args.train, args.valid, args.test)
    check_proofs(records, args.check)
    write_splits(args.out_prefix, splits, [args.raw])
    print_statistics(splits)


if __name__ == "__main__":
    main()
