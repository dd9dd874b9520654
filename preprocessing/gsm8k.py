"""Records from the original GSM8K (arXiv 2110.14168): JSON lines with the fields question and answer.

`python preprocessing/gsm8k.py --train train.jsonl --test test.jsonl` writes data/gsm8k_{train,valid,test}.json; with
`--hub` the questions come from `openai/gsm8k` on the Hugging Face hub. The valid questions are drawn from train with the
seed, the same ones whatever the other options.
An answer text is `Half of 48 is 48/2 = <<48/2=24>>24. ... #### 72`: the steps are the calculator annotations `<<...>>`, or
the lines without them; the answer is what follows the last `####`, without commas.
"""

import argparse
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocessing.common import SPLITS, Record, parse_rows, print_steps, read_rows, text_field, write_splits
from systems.arguments import Parser, natural
from utils import UserError, entry_point

EXAMPLES = ("--train train.jsonl --test test.jsonl", "--hub --steps sentences")
HUB = "openai/gsm8k"
ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # a `<<` that is not closed ends at the next one: linear time


def parse_row(row: object) -> Record:
    """{"question", "answer", "rationale"} of one problem. ValueError: a field is missing, empty or no text, or no `####`."""
    question = text_field(row, "question")
    rationale, mark, answer = text_field(row, "answer").rpartition("####")
    answer = answer.replace(",", "").strip()
    if not mark or not answer:
        raise ValueError("field 'answer': expected '####' and the final answer at its end")
    return {"question": question.strip(), "answer": answer, "rationale": rationale}


def equations(rationale: str) -> list[str]:
    """The calculator annotations, in their order: `<<48/2=24>>`."""
    return ANNOTATION.findall(rationale)


def sentences(rationale: str) -> list[str]:
    """The lines that are not blank, without the annotations."""
    lines = (line.strip() for line in ANNOTATION.sub("", rationale).split("\n"))
    return [line for line in lines if line]


PAST = {"keep": "kept", "drop": "dropped"}
STEPS = {"equations": equations, "sentences": sentences}


def to_record(problem: Record, steps: str) -> Record:
    return {"question": problem["question"], "answer": problem["answer"], "steps": STEPS[steps](problem["rationale"])}


def draw_valid(problems: Sequence[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """(the others, `count` drawn ones), both in the given order. UserError: nothing would be left to train on."""
    if count >= len(problems):
        raise UserError(f"--valid {count} would leave nothing of the {len(problems)} training questions")
    drawn = sorted(random.Random(seed).sample(range(len(problems)), count))
    left = sorted(set(range(len(problems))).difference(drawn))
    return [problems[i] for i in left], [problems[i] for i in drawn]


def read_hub() -> dict[str, list[Record]]:
    """Both splits of the data set on the hub. UserError: it cannot be had, or a row is malformed."""
    import datasets

    try:
        loaded = datasets.load_dataset(HUB, "main")
    except Exception as error:  # whatever goes wrong between here and the hub
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load {HUB}: {reason}; files on disk can be given with --train and --test") from None
    return {split: parse_rows(f"{HUB} {split}", "row", loaded[split], parse_row) for split in ("train", "test")}


def parse_arguments(given: list[str]) -> argparse.Namespace:
    """Command line, checked. UserError: a contradiction."""
    parser = Parser("python preprocessing/gsm8k.py", __doc__, EXAMPLES)
    parser.add_argument("--train", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--test", type=Path, metavar="FILE", help="JSON lines")
    parser.add_argument("--hub", action="store_true", help=f"take both from {HUB}")
    parser.add_argument("--out-prefix", type=Path, default=Path("data/gsm8k"), help="files are PREFIX_train.json, ...")
    parser.add_argument("--valid", type=natural, default=500, metavar="N", help="questions taken from train; 0: no such file")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--steps", choices=tuple(STEPS), default="equations", help="annotations, or lines without them")
    parser.add_argument(
        "--without-annotation",
        choices=tuple(PAST),
        default="keep",
        help="questions whose answer has no annotation (with --steps equations they have no steps)",
    )
    args = parser.parse_args(given)
    if args.hub == bool(args.train or args.test):
        parser.error("give --train and --test (or one of them), or else --hub")
    return args


def read_problems(args: argparse.Namespace) -> dict[str, list[Record]]:
    """The problems of each split, in the order of SPLITS. UserError: an input cannot be read or is malformed."""
    files = {"train": args.train, "test": args.test}
    if args.hub:
        splits = read_hub()
    else:
        splits = {name: parse_rows(path, "row", read_rows(path), parse_row) for name, path in files.items() if path}
    if "train" in splits and args.valid:
        splits["train"], splits["valid"] = draw_valid(splits["train"], args.valid, args.seed)
    return {split: splits[split] for split in SPLITS if split in splits}


@entry_point
def main(given: list[str]) -> None:
    args = parse_arguments(given)
    splits = read_problems(args)
    bare = [sum(not equations(problem["rationale"]) for problem in problems) for problems in splits.values()]
    if args.without_annotation == "drop":
        splits = {split: [p for p in problems if equations(p["rationale"])] for split, problems in splits.items()}
    records = {split: [to_record(problem, args.steps) for problem in problems] for split, problems in splits.items()}
    write_splits(args.out_prefix, records, (args.train, args.test))
    print_steps(records, {f"no annotation, {PAST[args.without_annotation]}": bare})


if __name__ == "__main__":
    main()
