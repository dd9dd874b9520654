"""ProntoQA conversion: records as the paper splits them, every proof checked against its question, bad input in one line."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PUBLISHED, ROOT, write_json
from hypothesis import given
from hypothesis import strategies as st

from dataset import load_records
from preprocessing import prontoqa

RAW = PUBLISHED / "prontoqa_5hop_0shot_random.json"
CONCEPTS = ("vumpus", "brimpus", "impus", "lorpus", "gorpus", "yumpus")
NAMES = ("Max", "Fae", "Rex")


def sentence(subject: str, predicate: str, negated: bool, form: int) -> str:
    """A rule in one of the generator's three forms; `predicate` is a concept or a property."""
    negation = "not " if negated else ""
    if form == 2:
        plural = f"{predicate}es" if predicate in CONCEPTS else predicate
        return f"{subject.capitalize()}es are {negation}{plural}."
    return f"{('Every', 'Each')[form]} {subject} is {negation}{noun(predicate)}."


def noun(predicate: str) -> str:
    if predicate not in CONCEPTS:
        return predicate
    return f"{'an' if predicate[0] in 'aeiou' else 'a'} {predicate}"


def make_example(number: int, hops: int = 2) -> dict[str, Any]:
    """A proof along `hops` rules, the last one about a property, beside a rule that is not needed."""
    name = NAMES[number % 3]
    path = [CONCEPTS[(number + i) % 6] for i in range(hops)]
    negated, answer = bool(number % 2), number % 4 < 2
    rules = [sentence(a, b, False, (number + i) % 3) for i, (a, b) in enumerate(itertools.pairwise(path))]
    rules.append(sentence(path[-1], "wooden", negated, number % 3))
    facts = [f"{name} is {noun(concept)}." for concept in path] + [f"{name} is {'not ' if negated else ''}wooden."]
    chain = [facts[0], *(text for pair in zip(rules, facts[1:], strict=True) for text in pair)]
    query = f"True or false: {name} is {'not ' if negated == answer else ''}wooden."
    question = " ".join([*reversed(rules), "Every zumpus is opaque.", facts[0]])
    return {"test_example": {"question": question, "query": query, "chain_of_thought": chain, "answer": str(answer)}}


def make_examples(count: int) -> dict[str, Any]:
    return {f"example{i + 1}": make_example(i) for i in range(count)}


def run(*arguments: object) -> None:
    prontoqa.main([str(argument) for argument in arguments])


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.count("\n") == 1
    return message


# --- records ---


def test_pairs_of_sentences_become_steps_and_the_conclusion_stands_alone():
    assert prontoqa.convert_example(make_example(0)) == {
        "question": (
            "Every brimpus is wooden. Every vumpus is a brimpus. Every zumpus is opaque. Max is a vumpus. "
            "True or false: Max is wooden."
        ),
        "answer": "True",
        "steps": [
            "Max is a vumpus. Every vumpus is a brimpus.",
            "Max is a brimpus. Every brimpus is wooden.",
            "Max is wooden.",
        ],
    }


@pytest.mark.published_data("prontoqa_5hop_0shot_random.json")
def test_every_published_proof_holds_and_has_six_steps():
    records = prontoqa.read_examples(RAW)
    assert len(records) == 300
    assert {len(record["steps"]) for record in records} == {6}
    assert [record for record in records if prontoqa.proof_problem(record)] == []


@given(st.integers(0, 1000), st.integers(1, 6))
def test_no_sentence_is_lost_and_the_proof_holds(number, hops):
    raw = make_example(number, hops)["test_example"]
    record = prontoqa.convert_example({"test_example": raw})
    assert " ".join(record["steps"]) == " ".join(raw["chain_of_thought"])
    assert len(record["steps"]) == hops + 1
    assert prontoqa.proof_problem(record) is None


@given(st.integers(0, 1000), st.integers(2, 6), st.data())
def test_a_proof_with_another_sentence_in_it_does_not_hold(number, hops, data):
    example = make_example(number, hops)
    chain = example["test_example"]["chain_of_thought"]
    at = data.draw(st.integers(0, len(chain) - 1))
    chain[at] = data.draw(st.sampled_from(["Max is a zumpus.", "Every zumpus is wooden.", "Max is opaque.", "No proof."]))
    assert prontoqa.proof_problem(prontoqa.convert_example(example)) is not None


def test_what_a_proof_lacks_is_named():
    def problem(**changes: Any) -> str:
        record = prontoqa.convert_example(make_example(0)) | changes
        return prontoqa.proof_problem(record) or ""

    record = prontoqa.convert_example(make_example(0))
    assert problem() == ""
    wrong_answer = "False" if record["answer"] == "True" else "True"
    assert "does not make 'Max is" in problem(answer=wrong_answer)
    assert "'Every brimpus is wooden.' does not stand in the question" in problem(
        question=record["question"].replace("Every brimpus is wooden. ", "")
    )
    assert "does not begin with a fact" in problem(steps=record["steps"][1:])
    assert "does not begin with a fact" in problem(steps=[])
    negated = [*record["steps"][:-1], "Max is not wooden."]
    assert "'Max is not wooden.' does not follow by 'Every brimpus is wooden.'" in problem(steps=negated)
    skipped = [record["steps"][0].replace("Every vumpus is a brimpus", "Every brimpus is wooden"), "Max is wooden."]
    assert "does not follow" in problem(steps=skipped)


@pytest.mark.parametrize(
    ("sentences", "claim"),
    [
        (("Every impus is an orpus.", "Each impus is an orpus.", "Impuses are orpuses."), ("impus", "orpus", True)),
        (("Every impus is not moderate.", "Impuses are not moderate."), ("impus", "moderate", False)),
    ],
)
def test_the_three_forms_of_a_rule_say_the_same(sentences, claim):
    assert {prontoqa.parse(text, prontoqa._RULE) for text in sentences} == {claim}


# --- files ---


def test_files_in_the_examples_order_that_load(tmp_path, capsys):
    raw = write_json(tmp_path / "raw.json", make_examples(12))
    run(raw, "--train", 7, "--valid", 2, "--out-prefix", tmp_path / "made" / "prontoqa", "--check")
    files = {split: load_records(tmp_path / "made" / f"prontoqa_{split}.json") for split in ("train", "valid", "test")}
    assert {split: len(records) for split, records in files.items()} == {"train": 7, "valid": 2, "test": 3}
    expected = [prontoqa.convert_example(example) for example in make_examples(12).values()]
    assert files["train"] + files["valid"] + files["test"] == expected
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["records", "7", "2", "3"]
    assert table[2].split() == ["steps", "3", "3", "3"]


def test_default_files_are_those_of_the_configurations():
    prefix = prontoqa.parse_arguments(["raw.json"]).out_prefix
    text = (ROOT / "args" / "prontoqa_coconut.yaml").read_text(encoding="utf-8")
    assert f"train_path: {prefix}_train.json" in text
    assert f"val_path: {prefix}_valid.json" in text


def test_questions_in_several_splits_are_counted_whatever_the_order_of_their_sentences(tmp_path, capsys):
    examples = make_examples(5)
    theory = prontoqa.split_sentences(examples["example1"]["test_example"]["question"])
    examples["example5"] = copy.deepcopy(examples["example1"])
    examples["example5"]["test_example"]["question"] = " ".join(reversed(theory))
    examples["example3"] = examples["example2"]
    run(write_json(tmp_path / "raw.json", examples), "--train", 3, "--valid", 1, "--out-prefix", tmp_path / "p")
    rows = {line[:30].strip(): line[30:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["also in another split"] == ["1", "0", "1"]
    assert rows["repeated questions"] == ["1", "0", "0"]


def test_a_proof_that_does_not_hold_is_a_warning_and_with_check_an_error(tmp_path, capsys):
    examples = make_examples(4)
    examples["example2"]["test_example"]["chain_of_thought"][0] = "Fae is a zumpus."
    raw, prefix = write_json(tmp_path / "raw.json", examples), tmp_path / "p"
    assert "example 2: the proof does not begin" in fails(
        capsys, raw, "--train", 2, "--valid", 1, "--out-prefix", prefix, "--check"
    )
    assert not list(tmp_path.glob("p_*"))
    run(raw, "--train", 2, "--valid", 1, "--out-prefix", prefix)
    printed = capsys.readouterr()
    assert "warning: example 2:" in printed.err
    assert ["proofs", "that", "hold", "1", "1", "1"] in [line.split() for line in printed.out.splitlines()]


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda e: e.update(test_example=None), "expected an object with the field 'question'"),
        (lambda e: e["test_example"].pop("query"), "field 'query' is missing"),
        (lambda e: e["test_example"].update(question=" "), "field 'question' is missing, blank"),
        (lambda e: e["test_example"].update(answer="maybe"), "field 'answer': expected True or False, found 'maybe'"),
        (lambda e: e["test_example"].update(answer=True), "field 'answer' is missing, blank or no string"),
        (lambda e: e["test_example"].pop("chain_of_thought"), "field 'chain_of_thought': expected an odd number"),
        (
            lambda e: e["test_example"].update(chain_of_thought=["A.", 3, "B."]),
            "field 'chain_of_thought': expected an odd number",
        ),
        (lambda e: e["test_example"].update(chain_of_thought=[" "]), "field 'chain_of_thought': expected an odd number"),
        (lambda e: e["test_example"]["chain_of_thought"].pop(), "field 'chain_of_thought': expected an odd number"),
    ],
)
def test_a_malformed_example_is_named(tmp_path, capsys, change, expected):
    examples = make_examples(3)
    change(examples["example2"])
    raw = write_json(tmp_path / "raw.json", examples)
    message = fails(capsys, raw, "--train", 1, "--valid", 1, "--out-prefix", tmp_path / "made" / "p")
    assert f"error: {raw}: example 2: {expected}" in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", ["[]", "{", '"text"', "", "[" * 100_000])
def test_a_file_of_another_kind(tmp_path, capsys, content):
    raw = tmp_path / "raw.json"
    raw.write_text(content)
    assert str(raw) in fails(capsys, raw, "--out-prefix", tmp_path / "p")


def test_a_missing_file(tmp_path, capsys):
    assert "no such file" in fails(capsys, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (50, [], "50 examples are too few for --train 9000 --valid 200 and at least 1 for test"),
        (50, ["--train", 40, "--valid", 5, "--test", 6], "50 examples are too few for --train 40 --valid 5 and 6 for test"),
        (0, ["--train", 1, "--valid", 1], "nothing in it; expected at least one example"),
        (5, ["--train", -1], "argument --train: must be at least 0"),
        (5, ["--train", 0, "--valid", 0, "--test", 0], "--train, --valid and --test are all 0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(tmp_path, capsys, count, options, expected):
    raw = write_json(tmp_path / "raw.json", make_examples(count))
    assert expected in fails(capsys, raw, *options, "--out-prefix", tmp_path / "p")


def test_a_directory_that_cannot_be_written(tmp_path, capsys):
    raw = write_json(tmp_path / "raw.json", make_examples(3))
    message = fails(capsys, raw, "--train", 1, "--valid", 1, "--out-prefix", raw / "sub" / "p")
    assert f"{raw / 'sub'}: cannot be written" in message


# --- scripts/make_prontoqa.sh ---

GENERATOR = """
import json, pathlib, sys
open("bad_patterns.txt").close()
log = pathlib.Path("calls.json")
calls = json.loads(log.read_text()) if log.exists() else []
log.write_text(json.dumps([*calls, sys.argv[1:]]))
with open("5hop_0shot_random.json", "w") as raw:
    {body}
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A generator that, as the official one, must run in its own directory and writes its file there."""
    directory = tmp_path / "clone of prontoqa"
    directory.mkdir()
    (directory / "bad_patterns.txt").touch()
    body = f"json.dump({make_examples(6)!r}, raw, indent=1)"
    (directory / "run_experiment.py").write_text(GENERATOR.format(body=body))
    return directory


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "make_prontoqa.sh"), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)


def test_script_generates_once_and_converts(clone, tmp_path):
    options = ["--train", 3, "--valid", 1, "--out-prefix", tmp_path / "prontoqa"]
    (clone / "5hop_0shot_random.json").write_text('{"example1": {')  # cut off
    for _ in range(2):
        done = make(clone, *options)
        assert done.returncode == 0, done.stderr
    (call,) = json.loads((clone / "calls.json").read_text())
    flags = "--model-name json --model-size dummy --ordering random --num-trials 10000 --few-shot-examples 0"
    assert " ".join(call) == f"{flags} --ontology fictional --min-hops 5 --max-hops 5 --hops-skip 1"
    assert [len(load_records(tmp_path / f"prontoqa_{split}.json")) for split in ("train", "valid", "test")] == [3, 1, 2]


@pytest.mark.parametrize(
    ("body", "expected"), [("sys.exit(3)", "the generator ended with exit code 3"), ("raw.write('{')", "wrote no usable")]
)
def test_script_says_when_the_generator_fails(clone, body, expected):
    (clone / "run_experiment.py").write_text(GENERATOR.format(body=body))
    done = make(clone)
    assert done.returncode == 2
    assert expected in done.stderr


def test_script_says_what_is_missing(tmp_path):
    for arguments, expected in (
        ([], "usage: make_prontoqa.sh CLONE"),
        ([tmp_path / "none"], "none: no such directory"),
        ([tmp_path], "run_experiment.py: no such file; is"),
    ):
        done = make(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr
