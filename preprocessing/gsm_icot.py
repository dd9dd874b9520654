"""Records from GSM8K-Aug text (arXiv 2405.14838): one line is `question||<<48/2=24>> <<48+24=72>> #### 72`.

`python preprocessing/gsm_icot.py IN.txt OUT.json`; `bash preprocessing/gsm_icot.bash` fetches the files and runs this.
A step is one `<<...>>`; nothing between `||` and `####` is no step at all. The answer keeps its commas, as in the files
that the paper's models were trained on.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocessing.common import Record, keep_inputs, parse_rows, prepare_directory, print_steps, write_records
from systems.arguments import Parser
from utils import entry_point, read_text

EXAMPLES = ("train.txt data/gsm_train.json", "valid.txt data/gsm_valid.json")
# Only between two steps: blanks inside `<<...>>` belong to the step.
BETWEEN_STEPS = re.compile(r"(?<=>>)\s*(?=<<)")


def parse_line(line: str) -> Record:
    """The record of one line. ValueError: a separator is missing, or the question or the answer is empty."""
    # The last of each: neither separator can stand in the steps or the answer, but a question may contain one.
    question, _, rest = line.rpartition("||")
    rationale, mark, answer = rest.rpartition("####")
    if not (question.strip() and mark and answer.strip()):
        raise ValueError("expected question||steps #### answer, of which only the steps may be empty")
    steps = [step for step in BETWEEN_STEPS.split(rationale.strip()) if step]
    return {"question": question.strip(), "answer": answer.strip(), "steps": steps}


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python preprocessing/gsm_icot.py", __doc__, EXAMPLES)
    parser.add_argument("text", type=Path, metavar="IN.txt")
    parser.add_argument("out", type=Path, metavar="OUT.json")
    args = parser.parse_args(given)
    keep_inputs([args.text], [args.out])
    text = read_text(args.text).removeprefix("\ufeff").rstrip()
    # Not splitlines: it also cuts at characters that stand inside a question.
    records = parse_rows(args.text, "line", text.split("\n") if text else [], parse_line)
    prepare_directory(args.out.parent)
    write_records(args.out, records)
    print_steps({args.out.stem: records})


if __name__ == "__main__":
    main()
