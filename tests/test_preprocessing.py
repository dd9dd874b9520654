"""What all preprocessing scripts have in common: hostile input, inputs given as outputs, `python -OO`."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from preprocessing import gsm8k, gsm_icot, prontoqa, reasoning_traces

SCRIPTS = ("prosqa", "prontoqa", "gsm8k", "gsm_icot", "reasoning_traces", "word_tokenizer")
MILLION = 1_000_000


# At these sizes a time that grows with the square of the text is minutes or hours, and pytest's own limit ends the test.


def test_annotations_that_are_not_closed():
    assert gsm8k.equations("<<" * MILLION + "1+1=2>>") == ["<<1+1=2>>"]
    assert gsm8k.equations("<<1" * MILLION) == []
    assert gsm8k.sentences("One is <<1=1>>1.\n\nTwo.") == ["One is 1.", "Two."]


def test_a_long_question_without_full_stops():
    assert prontoqa.split_sentences("a" * MILLION) == []
    assert prontoqa.split_sentences("Every a is b. Max is c. Is it") == ["Every a is b.", "Max is c."]


def test_a_tagged_span_that_ends_a_sentence():
    nested = "<a><b>He won. </b> </a>"
    assert reasoning_traces.stand_in(nested, (0, len(nested))) == "tagged."
    assert reasoning_traces.stand_in(nested + " it", (0, len(nested))) == "tagged"


def text_of(script: str) -> str:
    """The smallest input of a script."""
    example = {
        "question": "Max is a b.",
        "query": "True or false: Max is a b.",
        "answer": "True",
        "chain_of_thought": ["Max is a b."],
    }
    return {
        "gsm_icot": "q||<<1+1=2>> #### 2\n",
        "gsm8k": json.dumps({"question": "q", "answer": "<<1+1=2>> #### 2"}) + "\n",
        "prontoqa": json.dumps({"example1": {"test_example": example}}),
        "reasoning_traces": json.dumps({"question": "q", "trace": "A. In summary: 2"}) + "\n",
    }[script]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (gsm_icot, ["{given}", "{out}_train.json"]),
        (gsm8k, ["--train", "{given}", "--valid", "0", "--out-prefix", "{out}"]),
        (prontoqa, ["{given}", "--train", "1", "--valid", "0", "--test", "0", "--out-prefix", "{out}"]),
        (reasoning_traces, ["{given}", "{out}_train.json"]),
    ],
)
def test_an_input_is_not_overwritten_under_another_name(module, arguments, tmp_path: Path, capsys):
    given, out = tmp_path / "given", tmp_path / "x"
    given.write_text(text := text_of(module.__name__.rpartition(".")[2]))
    os.link(given, tmp_path / "x_train.json")
    with pytest.raises(SystemExit) as caught:
        module.main([one.format(given=given, out=out) for one in arguments])
    assert caught.value.code == 2
    assert "would overwrite the input" in capsys.readouterr().err
    assert given.read_text() == (tmp_path / "x_train.json").read_text() == text


def test_control_characters_do_not_reach_the_terminal(capsys):
    with pytest.raises(SystemExit):
        gsm_icot.main(["bad \x1b[2J\r\n name", "out.json"])
    assert capsys.readouterr().err == "error: bad \\x1b[2J name: no such file\n"


def test_reports_escape_control_characters(tmp_path: Path, capsys):
    traces = [{"question": "q", "trace": "A. In summary: 2"}, {"question": "q", "trace": "no \x1b[2J marker"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    reasoning_traces.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.json")])
    assert "\\x1b[2J" in (shown := capsys.readouterr().out)
    assert "\x1b" not in shown


def test_the_scripts_work_without_docstrings():
    code = f"""
import contextlib, importlib, io
for name in {SCRIPTS}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(f"preprocessing.{{name}}").main(["--help"])
"""
    ended = subprocess.run([sys.executable, "-OO", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_ends_with_two_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(f"preprocessing.{name}").main(["--help"])
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[-3] == "examples:"
    assert all(line.startswith(f"  python preprocessing/{name}.py") for line in lines[-2:])
