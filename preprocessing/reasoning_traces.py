"""Own reasoning traces to records: what stands before "In summary:" is split into steps, what follows is the answer.

`python preprocessing/reasoning_traces.py TRACES.jsonl data/own.json` reads one object per line (or one JSON list).
Sentences are found by spaCy, without a download; tagged spans such as <citation>...</citation> are never cut.

- The last marker outside of tags counts: earlier ones sum up a part of the reasoning.
- A line break outside of tags ends a step. Inside a step every stretch of whitespace becomes one space, since the data set
  joins steps with line breaks.
- A tag without its counterpart is plain text, and the report names the trace.
- Of nested tags the outermost pair is kept whole.
- A sentence that ends in an abbreviation or a capital ("etc.", "X.") runs into the next one: no rule can tell them apart.
"""

import argparse
import bisect
import itertools
import json
import re
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import spacy
from spacy.language import Language
from spacy.tokens import Doc, Token

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocessing.common import Record, keep_inputs, prepare_directory, read_rows, text_field, write_records
from systems.arguments import Parser, natural
from systems.writing import write_text
from utils import UserError, entry_point, printable

EXAMPLES = ("TRACES.jsonl data/own.json", "TRACES.jsonl data/own.json --trace-field reasoning --answer-field answer")
MARKER = "In summary:"
# Beside those that spaCy's English tokenizer keeps whole ("Dr.", "e.g.", "U.S."); "No." is as often a sentence.
ABBREVIATIONS = "al. approx. cf. eds. eq. eqs. etc. fig. figs. pp. resp. viz. vol. vols."
TRAINED_PIPES = {"parser", "senter"}
UNUSED_PIPES = ("ner", "lemmatizer", "attribute_ruler", "tagger")
LISTED = 10  # rejected traces named on the screen; the file has all
SENTENCE_ENDS = (".", "?", "!")

Span = tuple[int, int]
_TAG = re.compile(r"<(?P<closing>/?)(?P<name>[A-Za-z][\w.:-]*)(?:\s+[\w.:-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'))*\s*>")
_CLOSING_TAGS = re.compile(r"(?:</[^<>]*>\s*)+$")


# --- sentences ---


def load_pipeline(name: str | None = None) -> Language:
    """A spaCy pipeline that finds sentences: by rules, or as the installed pipeline `name` does. UserError: not installed."""
    try:
        nlp = spacy.blank("en") if name is None else spacy.load(name, exclude=UNUSED_PIPES)
    except OSError:
        raise UserError(f"--pipeline: {name!r} is not installed; `python -m spacy download {name}` installs it") from None
    keep_abbreviations(nlp.tokenizer)
    if not TRAINED_PIPES & set(nlp.pipe_names):  # what the trained ones set must not be changed afterwards
        nlp.max_length = sys.maxsize  # the limit guards the memory of a parser, and there is none
        for rule in ("sentencizer", "list_numbers", "opening_punctuation"):
            if not nlp.has_pipe(rule):
                nlp.add_pipe(rule)
    return nlp


def keep_abbreviations(tokenizer: Any) -> None:
    """The tokenizer leaves their full stop in the word, so that it ends no sentence.

    spaCy does so for every lower-case letter as well; in reasoning "x." is a variable at a sentence's end.
    """
    tokenizer.rules = {word: rule for word, rule in tokenizer.rules.items() if not re.fullmatch(r"[a-z]\.", word)}
    for short in ABBREVIATIONS.split():
        for form in (short, short.capitalize()):
            tokenizer.add_special_case(form, [{"ORTH": form}])


@Language.component("list_numbers")
def list_numbers(doc: Doc) -> Doc:
    """ "1. Add them." is one sentence: the number at the beginning of a line belongs to what follows."""
    words = [token for token in doc if not token.is_space][:3]
    if len(words) == 3 and (words[0].is_digit or len(words[0]) == 1) and words[1].text == ".":
        words[2].is_sent_start = False
    return doc


@Language.component("opening_punctuation")
def opening_punctuation(doc: Doc) -> Doc:
    """A bracket or quotation mark that hangs on the next word opens the next sentence, it does not close this one."""
    for token in doc:
        if token.is_sent_start and token.i > 0:
            first = opening(token)
            if first is not token:
                token.is_sent_start, first.is_sent_start = False, True
    return doc


def opening(token: Token) -> Token:
    """The first of the punctuation marks before `token` that stand without a space up to it; `token` if there is none."""
    first = token
    while first.i > 0 and first.nbor(-1).is_punct and not first.nbor(-1).whitespace_:
        first = first.nbor(-1)
    return first if first.i > 0 and first.nbor(-1).whitespace_ else token


# --- tags ---


def tagged_spans(text: str) -> tuple[list[Span], list[str]]:
    """(character spans of the outermost matched tags, tags without a counterpart) of a text."""
    stack: list[re.Match[str]] = []
    names: Counter[str] = Counter()  # of the tags on the stack, which may be many
    spans: list[Span] = []
    unmatched: list[str] = []
    for tag in _TAG.finditer(text):
        if not tag["closing"]:
            stack.append(tag)
            names[tag["name"]] += 1
        elif names[tag["name"]]:
            while (opened := stack.pop())["name"] != tag["name"]:
                unmatched.append(opened[0])
                names[opened["name"]] -= 1
            names[tag["name"]] -= 1
            while spans and spans[-1][0] > opened.start():
                spans.pop()
            spans.append((opened.start(), tag.end()))
        else:
            unmatched.append(tag[0])
    return spans, unmatched + [opened[0] for opened in stack]


def stand_in(text: str, span: Span) -> str:
    """The word that takes a tagged span's place while sentences are sought.

    It ends a sentence where the span or what it hangs on does ("He won.<citation>A. B.</citation> She lost.") and the next
    word does not go on with it ("<citation>A. B.</citation> found it.").
    """
    inner = _CLOSING_TAGS.sub("", text[slice(*span)]).rstrip()
    follows = text[span[1] :].lstrip()[:1]
    ends = inner.endswith(SENTENCE_ENDS) or text.endswith(SENTENCE_ENDS, 0, span[0])
    return "tagged." if ends and (not follows or follows.isupper() or follows.isdigit() or follows == "<") else "tagged"


# --- steps ---


def split_steps(text: str, nlp: Language, spans: Sequence[Span] = ()) -> list[str]:
    """Sentences of the lines of a text, none of them cut inside of `spans` (in order, apart); whitespace is one space."""
    pieces: list[str] = []  # the text with a stand-in for each span
    shifts = [(0, 0)]  # (position in that text, position in `text`) where a stretch of the one equals the other
    for span in spans:
        replaced, original = shifts[-1]
        word = stand_in(text, span)
        pieces += [text[original : span[0]], word]
        shifts.append((replaced + span[0] - original + len(word), span[1]))
    pieces.append(text[shifts[-1][1] :])
    starts = [original_position(start, shifts) for start in sentence_starts("".join(pieces), nlp)]
    sentences = (" ".join(text[a:b].split()) for a, b in itertools.pairwise([*starts, len(text)]))
    return [sentence for sentence in sentences if sentence]


def sentence_starts(text: str, nlp: Language) -> list[int]:
    """Positions where the sentences of each line begin; the first is 0."""
    lines = text.splitlines(keepends=True)
    begins = itertools.accumulate(map(len, lines), initial=0)
    starts = {begin + sentence.start_char for begin, doc in zip(begins, nlp.pipe(lines)) for sentence in doc.sents}  # noqa: B905
    return sorted(starts | {0})


def original_position(position: int, shifts: Sequence[Span]) -> int:
    """Where a sentence that starts at `position` of the text with stand-ins starts in the text itself."""
    replaced, original = shifts[bisect.bisect(shifts, position, key=lambda shift: shift[0]) - 1]
    return original + position - replaced


def merge_short(steps: Sequence[str], shortest: int) -> list[str]:
    """Steps of fewer than `shortest` characters joined to the step before them."""
    merged: list[str] = []
    for step in steps:
        if merged and len(step) < shortest:
            merged[-1] += f" {step}"
        else:
            merged.append(step)
    return merged


# --- traces ---


@dataclass
class Options:
    """How traces are read: the fields' names, the marker, and the length in characters below which steps are joined."""

    question_field: str = "question"
    trace_field: str = "trace"
    answer_field: str | None = None
    marker: str = MARKER
    merge_short: int = 0


@dataclass
class Result:
    """The records, and what the report says of the rest: rejected traces with index and reason, unmatched tags by index."""

    records: list[Record] = field(default_factory=list)
    rejected: list[Record] = field(default_factory=list)
    unmatched: dict[int, list[str]] = field(default_factory=dict)


def convert_trace(trace: Any, nlp: Language, options: Options) -> tuple[Record | str, list[str]]:
    """(the record, or why there is none; tags without a counterpart). ValueError: a field is missing or wrong."""
    question = text_field(trace, options.question_field, "; --question-field names another one")
    text = text_field(trace, options.trace_field, "; --trace-field names another one")
    spans, unmatched = tagged_spans(text)
    markers = [match.start() for match in re.finditer(re.escape(options.marker), text)]
    outside = [at for at in markers if not any(start <= at < end for start, end in spans)]
    if not outside:
        where = " outside of its tags" if markers else ""
        return f"no {options.marker!r}{where}", unmatched
    at = outside[-1]
    summary = text[at + len(options.marker) :].strip()
    record = {"question": question.strip(), "answer": summary}
    if options.answer_field is not None:
        record = {
            **record,
            "answer": text_field(trace, options.answer_field, "; --answer-field names another one").strip(),
            "summary": summary,
        }
    if not record["answer"]:
        return f"nothing after {options.marker!r}", unmatched
    steps = split_steps(text[:at], nlp, [span for span in spans if span[1] <= at])
    return {**record, "steps": merge_short(steps, options.merge_short)}, unmatched


def convert(traces: Sequence[Any], nlp: Language, options: Options) -> Result:
    """All traces. UserError naming the first whose fields are missing or wrong."""
    result = Result()
    for index, trace in enumerate(traces):
        try:
            outcome, unmatched = convert_trace(trace, nlp, options)
        except ValueError as error:
            raise UserError(f"trace {index}: {error}") from None
        if unmatched:
            result.unmatched[index] = unmatched
        if isinstance(outcome, str):
            result.rejected.append({"index": index, "reason": outcome, "trace": trace})
        else:
            result.records.append(outcome)
    return result


# --- report ---


def report_lines(result: Result, options: Options, rejected_path: Path) -> Iterator[str]:
    """What became of the traces."""
    counts = [len(record["steps"]) for record in result.records]
    yield f"records    {len(counts):,}, {counts.count(0):,} of them without steps"
    middle = f"median {statistics.median(counts):g}, mean {statistics.mean(counts):.1f}"
    yield f"steps      min {min(counts)}, {middle}, max {max(counts)}"
    by_steps = sorted(Counter(counts).items())
    yield "traces by steps   " + "  ".join(f"{steps}: {traces}" for steps, traces in by_steps)
    unscored = sum("#" in record["answer"] for record in result.records)
    if unscored:
        yield f"answers with '#'   {unscored:,}; evaluation reads what follows the last '#', so they count as wrong"
    if result.unmatched:
        tags = [f"trace {index} {' '.join(tags)}" for index, tags in list(result.unmatched.items())[:LISTED]]
        yield f"tags without a counterpart, read as text   {len(result.unmatched):,} traces: {'; '.join(tags)}"
    yield f"rejected   {len(result.rejected):,}" + (f", all in {rejected_path}:" if result.rejected else "")
    for row in result.rejected[:LISTED]:
        beginning = textwrap.shorten(row["trace"][options.trace_field], 60, placeholder=" ...")
        yield f"  trace {row['index']}: {row['reason']}: {beginning}"
    if len(result.rejected) > LISTED:
        yield f"  and {len(result.rejected) - LISTED:,} more"


# --- command line ---


def parse_arguments(given: list[str]) -> argparse.Namespace:
    """Command line, checked. UserError: a contradiction."""
    parser = Parser("python preprocessing/reasoning_traces.py", __doc__, EXAMPLES)
    parser.add_argument("traces", type=Path, metavar="TRACES", help="JSONL file, or a JSON list")
    parser.add_argument("out", type=Path, metavar="OUT.json", help="records; rejected traces go to OUT.rejected.jsonl")
    parser.add_argument("--question-field", default="question", metavar="NAME", help="(default question)")
    parser.add_argument("--trace-field", default="trace", metavar="NAME", help="(default trace)")
    parser.add_argument("--answer-field", metavar="NAME", help="takes the answer from here; the summary becomes a field")
    parser.add_argument("--marker", default=MARKER, help=f"ends the steps (default {MARKER!r})")
    parser.add_argument("--pipeline", metavar="NAME", help="an installed spaCy pipeline, such as en_core_web_sm")
    parser.add_argument("--merge-short", type=natural, default=0, metavar="N", help="join steps shorter than N characters")
    parser.add_argument("--strict", action="store_true", help="a trace that would be rejected is an error")
    args = parser.parse_args(given)
    if not args.marker.strip():
        parser.error("--marker is blank")
    args.rejected = args.out.with_suffix(".rejected.jsonl")
    keep_inputs([args.traces], (args.out, args.rejected))
    return args


def check(result: Result, strict: bool, path: Path) -> None:
    """UserError: nothing to write, or with `strict` a rejected trace."""
    if result.rejected and (strict or not result.records):
        first, count = result.rejected[0], len(result.rejected)
        raise UserError(
            f"{path}: {count} of {count + len(result.records)} traces rejected; trace {first['index']}: {first['reason']}"
        )
    if not result.records:
        raise UserError(f"{path}: no traces in it")


@entry_point
def main(given: list[str]) -> None:
    args = parse_arguments(given)
    options = Options(args.question_field, args.trace_field, args.answer_field, args.marker, args.merge_short)
    result = convert(read_rows(args.traces), load_pipeline(args.pipeline), options)
    check(result, args.strict, args.traces)
    prepare_directory(args.out.parent)
    if result.rejected:
        write_text(args.rejected, "".join(json.dumps(row) + "\n" for row in result.rejected))
    else:
        args.rejected.unlink(missing_ok=True)  # an earlier run's
    write_records(args.out, result.records)
    print("\n".join(map(printable, report_lines(result, options, args.rejected))))


if __name__ == "__main__":
    main()
