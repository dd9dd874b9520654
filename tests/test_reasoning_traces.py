"""Reasoning traces to records: sentences, tagged spans kept whole, the marker, nothing lost, bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import spacy
from conftest import write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import load_records
from preprocessing import reasoning_traces
from preprocessing.reasoning_traces import Options, convert_trace, load_pipeline, merge_short, split_steps, tagged_spans

NLP = load_pipeline()


def steps_of(text: str) -> list[str]:
    return split_steps(text, NLP, tagged_spans(text)[0])


def convert(trace: str, **options: Any) -> Any:
    return convert_trace({"question": "How many?", "trace": trace}, NLP, Options(**options))[0]


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trace(text: str, **fields: Any) -> dict[str, Any]:
    return {"question": "How many?", "trace": text, **fields}


def run(*arguments: object) -> None:
    reasoning_traces.main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.count("\n") == 1
    return message


# --- sentences ---


@pytest.mark.parametrize(
    "steps",
    [
        ["Dr. Smith paid 3.14 dollars, e.g. for tea.", "Then he left."],
        ["See Fig. 3, vol. 2, and eqs. 4.", "Jones et al. 2020 agree, approx. 5 vs. 6 etc. in all."],
        ["J. K. Rowling wrote it in the U.S. with Prof. Yi.", "Did she?", "Yes!"],
        ['"It is four."', "So they said.", "(It was so.)", "It is (as they say) four."],
        ["He said:", "1. Add two and two.", "2. Multiply.", "a. It is x.", "- That is 8.", "**So.**", "Done"],
    ],
)
def test_sentences_and_lines_are_steps(steps):
    lines = len(steps[0]) < 10
    assert steps_of(("\n" if lines else " ").join(steps)) == steps


def test_line_breaks_end_a_step_and_other_blanks_are_one_space():
    assert steps_of("  Two\tand  two\n\n\r\nis four. And\u2028so on ") == ["Two and two", "is four.", "And", "so on"]
    assert steps_of(" \n\t\n") == []


# --- tags ---


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("See <citation>A. B.\n Smith. 2010</citation>. Next.", ["See <citation>A. B. Smith. 2010</citation>.", "Next."]),
        ("Now <citation>A. B.</citation> found it. So.", ["Now <citation>A. B.</citation> found it.", "So."]),
        ("He won.<citation>A. B.</citation> She lost.", ["He won.<citation>A. B.</citation>", "She lost."]),
        (
            "<reasoning>One. Two.</reasoning> <reasoning>Three.</reasoning>",
            ["<reasoning>One. Two.</reasoning>", "<reasoning>Three.</reasoning>"],
        ),
        ("<a>One. <b>Two. X.</b> Three. Y</a> so. End.", ["<a>One. <b>Two. X.</b> Three. Y</a> so.", "End."]),
        ("<a>One. <a>Two. X.</a> Three. Y</a> so. End.", ["<a>One. <a>Two. X.</a> Three. Y</a> so.", "End."]),
        ('<c id="1. A">One. Two</c> so. <c>Three', ['<c id="1. A">One. Two</c> so.', "<c>Three"]),
        ("if a <b and c> d. Then", ["if a <b and c> d.", "Then"]),
    ],
)
def test_tagged_spans_stay_whole(text, steps):
    assert steps_of(text) == steps


def test_tags_without_a_counterpart_are_named_and_cut_like_text():
    spans, unmatched = tagged_spans("<a>One. <b>Two. <c>X. Y</c></a> </b> <d>Z. W")
    assert unmatched == ["<b>", "</b>", "<d>"]
    assert len(spans) == 1
    assert steps_of("<a>One. <c>X. Y</c> so. Two.") == ["<a>One.", "<c>X. Y</c> so.", "Two."]


WORDS = st.sampled_from(
    [
        "Two",
        "four.",
        "Dr.",
        "e.g.",
        "3.14",
        "5.",
        "so",
        "yes!",
        "(why?",
        ")",
        '"',
        "\n",
        "\n\n",
        "  ",
        "\t",
        "…",
        "é.",
        "1.",
        "*",
        "a<b",
    ]
)
PLAIN = st.lists(WORDS, max_size=8).map(" ".join)
TAGGED = st.tuples(st.sampled_from(["citation", "reasoning", "x"]), PLAIN).map(lambda pair: "<{0}>{1}</{0}>".format(*pair))
NESTED = st.tuples(PLAIN, TAGGED, PLAIN).map(lambda parts: f"<outer>{''.join(parts)}</outer>")
STRAY = st.sampled_from(["<citation>", "</reasoning>", "<br>", "<"])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.one_of(PLAIN, TAGGED, NESTED), st.sampled_from(["", " ", ". ", "\n"])), max_size=6))
def test_nothing_is_lost_and_tagged_spans_are_in_one_step(parts):
    text = "".join(piece for part in parts for piece in part)
    steps = steps_of(text)
    assert "".join("".join(steps).split()) == "".join(text.split())
    assert all(step == " ".join(step.split()) and step for step in steps)
    for piece, _ in parts:
        if piece.startswith("<") and piece.endswith(">"):
            assert any(" ".join(piece.split()) in step for step in steps)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(PLAIN, TAGGED, STRAY, st.text(st.characters(codec="utf-8"), max_size=8)), max_size=8).map(" ".join))
def test_nothing_of_any_text_is_lost(text):
    assert "".join("".join(steps_of(text)).split()) == "".join(text.split())


@given(st.lists(st.text("ab.", min_size=1, max_size=9)), st.integers(0, 10))
def test_merging_short_steps_loses_nothing_and_leaves_none(steps, shortest):
    merged = merge_short(steps, shortest)
    assert " ".join(merged) == " ".join(steps)
    assert all(len(step) >= shortest for step in merged[1:])


# --- the marker and the fields ---


def test_the_last_marker_outside_of_tags_ends_the_steps():
    text = "One. In summary: two.\n<r>In summary: 3</r> Four.\n In summary:\n 4 \n"
    record = convert(text)
    assert record["answer"] == "4"
    assert record["steps"] == ["One.", "In summary: two.", "<r>In summary: 3</r> Four."]
    assert convert("Two. ### 4", marker="###")["answer"] == "4"


def test_a_trace_without_steps_is_a_record():
    assert convert("In summary: 4") == {"question": "How many?", "answer": "4", "steps": []}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Four.", "no 'In summary:'"),
        ("<r>One. In summary: 4</r>", "no 'In summary:' outside of its tags"),
        ("One. In summary: \n", "nothing after 'In summary:'"),
    ],
)
def test_why_a_trace_is_rejected(text, reason):
    assert convert(text) == reason


def test_an_answer_field_leaves_the_summary_beside_it():
    row = {"ask": " Q? ", "text": "Two. So. In summary: it is 4.", "gold": "4"}
    record, _ = convert_trace(row, NLP, Options(question_field="ask", trace_field="text", answer_field="gold"))
    assert record == {"question": "Q?", "answer": "4", "summary": "it is 4.", "steps": ["Two.", "So."]}


# --- files ---


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_records_load_and_rejected_traces_are_kept(tmp_path, capsys, kind):
    rows = [trace("One. Two. In summary: 4"), trace("No end."), trace("<b>A. In summary: 5, # 6")]
    path = tmp_path / f"traces.{kind}"
    if kind == "json":
        write_json(path, rows)
    else:
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    run(path, tmp_path / "made" / "own.json")
    records = load_records(tmp_path / "made" / "own.json")
    assert [(record["answer"], record["steps"]) for record in records] == [("4", ["One.", "Two."]), ("5, # 6", ["<b>A."])]
    (rejected,) = (tmp_path / "made" / "own.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rejected) == {"index": 1, "reason": "no 'In summary:'", "trace": rows[1]}
    report = capsys.readouterr().out
    for expected in (
        "records    2, 0 of them without steps",
        "min 1, median 1.5, mean 1.5, max 2",
        "traces by steps   1: 1  2: 1",
        "answers with '#'   1",
        "read as text   1 traces: trace 2 <b>",
        "rejected   1, all in",
        "trace 1: no 'In summary:': No end.",
    ):
        assert expected in report


def test_a_run_without_rejected_traces_removes_the_file_of_an_earlier_one(tmp_path):
    path, out = tmp_path / "traces.jsonl", tmp_path / "own.json"
    run(write_lines(path, trace("A. In summary: 4"), trace("No end.")), out)
    run(write_lines(path, trace("A. In summary: 4")), out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["own.json", "traces.jsonl"]


def test_many_rejected_traces_are_counted_and_the_first_named(tmp_path, capsys):
    rows = [trace(f"{'word ' * 20}{i}") for i in range(12)]
    run(write_lines(tmp_path / "traces.jsonl", trace("In summary: 4"), *rows), tmp_path / "own.json")
    report = capsys.readouterr().out
    assert "records    1, 1 of them without steps" in report
    assert report.count("word word word ...") == 10
    assert "and 2 more" in report
    assert len((tmp_path / "own.rejected.jsonl").read_text().splitlines()) == 12


# --- pipelines ---


def test_an_installed_pipeline_finds_the_sentences(tmp_path):
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer", config={"punct_chars": [";"]})
    nlp.to_disk(tmp_path / "pipeline")
    assert split_steps("One. Two; three e.g. four.", load_pipeline(str(tmp_path / "pipeline"))) == [
        "One. Two;",
        "three e.g. four.",
    ]


def test_a_pipeline_with_a_parser_loses_nothing(tmp_path):
    nlp = spacy.blank("en")
    nlp.add_pipe("parser").add_label("dep")
    nlp.initialize()
    nlp.to_disk(tmp_path / "pipeline")
    text = '1. One. "Two." Three <c>Four. Five.</c> six.'
    steps = split_steps(text, load_pipeline(str(tmp_path / "pipeline")), tagged_spans(text)[0])
    assert " ".join(steps).replace(" ", "") == text.replace(" ", "")


def test_a_pipeline_that_is_missing(tmp_path, capsys):
    path = write_lines(tmp_path / "traces.jsonl", trace("A. In summary: 4"))
    message = fails(capsys, path, tmp_path / "own.json", "--pipeline", "en_core_none")
    assert "--pipeline: 'en_core_none' is not installed; `python -m spacy download en_core_none`" in message


# --- bad input ---


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([trace("A. In summary: 4"), 5], [], "trace 1: expected an object with the field 'question'"),
        ([{"question": "Q"}], [], "trace 0: field 'trace' is missing, blank or no string"),
        ([{"question": 3, "trace": "x"}], [], "trace 0: field 'question' is missing, blank or no string"),
        ([trace("In summary: 4")], ["--answer-field", "gold"], "trace 0: field 'gold' is missing, blank or no string"),
        ([trace("A."), trace("B.")], [], "2 of 2 traces rejected; trace 0: no 'In summary:'"),
        ([trace("In summary: 4"), trace("B.")], ["--strict"], "1 of 2 traces rejected; trace 1: no 'In summary:'"),
        ([], [], "no traces in it"),
        ([trace("In summary: 4")], ["--marker", " "], "--marker is blank"),
        ([trace("In summary: 4")], ["--merge-short", "-1"], "argument --merge-short: must be at least 0"),
        ([trace("A\ud800. In summary: 4")], [], "trace 0: 'utf-8' codec can't encode"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_written(tmp_path, capsys, rows, options, expected):
    path = write_lines(tmp_path / "traces.jsonl", *rows)
    assert expected in fails(capsys, path, tmp_path / "made" / "own.json", *options)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"question": "Q"}\n{"question": \n', "traces.jsonl: line 2: not valid JSON"),
        (b"[1, 2", "traces.jsonl: not valid JSON"),
        (b"\xff\xfe", "traces.jsonl: line 1: cannot be read"),
    ],
)
def test_a_file_of_another_kind(tmp_path, capsys, content, expected):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(content)
    assert expected in fails(capsys, path, tmp_path / "own.json")


def test_files_that_cannot_be_read_or_written(tmp_path, capsys):
    path = write_lines(tmp_path / "own.jsonl", trace("In summary: 4"))
    assert "no such file" in fails(capsys, tmp_path / "none.jsonl", tmp_path / "own.json")
    assert "would overwrite the input" in fails(capsys, path, path)
    rejected = write_lines(tmp_path / "own.rejected.jsonl", trace("In summary: 4"))
    assert "would overwrite the input" in fails(capsys, rejected, tmp_path / "own.json")
    assert f"{path}: cannot be written" in fails(capsys, path, path / "own.json")
