"""Questions from local files in both forms, and from a hub that is not there."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import PUBLISHED, write_json

from experiments.answers.benchmarks import BENCHMARKS
from experiments.answers.questions import BenchmarkQuestion, load_questions, selection
from utils import UserError

CHOICES = ["1", "2", "3", "4"]
GPQA = {
    "Question": "Which one? ",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
}
# benchmark, row, question, gold, choices
ROWS: list[tuple[str, dict[str, Any], str, str, list[str]]] = [
    ("gsm8k", {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,234"}, "How many?", "1234", []),
    ("gsm8k", {"question": "How many?", "answer": "-3", "steps": ["<<1-4=-3>>"]}, "How many?", "-3", []),
    ("gsm-symbolic", {"id": 0, "instance": 3, "question": "How many?", "answer": "So 4.\n#### 4"}, "How many?", "4", []),
    ("gsm-hard", {"input": "How many?", "target": -9867630.0}, "How many?", "-9867630", []),
    ("gsm-hard", {"input": "How many?", "target": "2.50"}, "How many?", "2.5", []),
    ("svamp", {"Body": "He has 3.", "Question": "How many?", "Answer": 3.0}, "He has 3. How many?", "3", []),
    ("svamp", {"question": "How many?", "answer": "27", "steps": []}, "How many?", "27", []),
    ("multiarith", {"question": "How many?", "final_ans": "10"}, "How many?", "10", []),
    ("mmlu", {"question": "Which?", "subject": "x", "choices": CHOICES, "answer": 2}, "Which?", "C", CHOICES),
    ("mmlu", {"question": "Which?", "choices": CHOICES, "answer": "B", "steps": []}, "Which?", "B", CHOICES),
    ("mmlu", {"question": "Which?", "choices": CHOICES, "answer": "4"}, "Which?", "D", CHOICES),
    ("mmlu", {"question": "Which? A) 1 B) 2", "answer": "B", "steps": []}, "Which? A) 1 B) 2", "B", []),
    ("math", {"problem": "What is $x$?", "solution": "...", "answer": r"\dfrac{1}{2}", "level": 1}, "What is $x$?", "0.5", []),
    ("math", {"problem": "What is $x$?", "solution": r"So $\boxed{(1, 2)}$."}, "What is $x$?", "(1,2)", []),
    ("math", {"question": "What is $x$?", "answer": "7", "steps": []}, "What is $x$?", "7", []),
    ("gpqa", {"question": "Which?", "choices": CHOICES, "answer": "A"}, "Which?", "A", CHOICES),
    (
        "prosqa",
        {"question": "Is Tom a lempus or zumpus?", "answer": "Tom is a zumpus.", "steps": []},
        "Is Tom a lempus or zumpus?",
        "Tom is a zumpus.",
        [],
    ),
    ("prontoqa", {"question": "True or false: ...", "answer": "False", "steps": ["x"]}, "True or false: ...", "False", []),
]

SOURCES = {name: row.source for name, row in BENCHMARKS.items() if row.source is not None}


@pytest.mark.parametrize(("benchmark", "row", "question", "gold", "choices"), ROWS)
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_rows_of_both_forms(
    tmp_path: Path, benchmark: str, row: dict[str, Any], question: str, gold: str, choices: list[str], lines: bool
) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) if lines else json.dumps([row, row]), encoding="utf-8")
    steps = len(row["steps"]) if "steps" in row else None
    expected = [
        BenchmarkQuestion(benchmark, index, question, gold, tuple(choices), steps, row.get("subject")) for index in (0, 1)
    ]
    assert load_questions(benchmark, path) == expected
    assert load_questions(benchmark, path, limit=1) == expected[:1]


def test_every_benchmark_is_tried() -> None:
    assert {row[0] for row in ROWS} == set(BENCHMARKS)
    assert set(SOURCES) == set(BENCHMARKS) - {"prosqa", "prontoqa"}


def test_options_of_gpqa_are_shuffled_by_seed_and_index(tmp_path: Path) -> None:
    path = write_json(tmp_path / "gpqa.json", [GPQA] * 40)
    questions = load_questions("gpqa", path)
    for one in questions:
        assert one.question == "Which one?"
        assert one.choices["ABCD".index(one.gold)] == "right"
        assert sorted(one.choices) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    assert set(Counter(one.gold for one in questions)) == set("ABCD")
    assert questions == load_questions("gpqa", path)
    assert questions[:7] == load_questions("gpqa", path, limit=7)
    assert questions != load_questions("gpqa", path, seed=1)


@pytest.mark.parametrize("benchmark", SOURCES)
def test_the_hub_is_asked_for_the_right_data(benchmark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = GPQA if benchmark == "gpqa" else next(row for name, row, *_ in ROWS if name == benchmark)
    calls = []

    def load_dataset(*names: str, split: str) -> list[dict[str, Any]]:
        calls.append((names, split))
        return [row] * 3

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_questions(benchmark)) == 3
    assert len(load_questions(benchmark, subset="p1", split="train", limit=2)) == 2
    source = SOURCES[benchmark]
    assert calls[0] == ((source.hub, source.subset) if source.subset else (source.hub,), source.split)
    assert calls[1] == ((source.hub, "p1"), "train")


def failing_hub(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def load_dataset(*names: str, split: str) -> None:
        raise ConnectionError(message)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_questions_of_the_hub_are_drawn_with_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets there may be ordered by subject. Records keep the subject."""
    rows = [{"question": str(n), "choices": ["a", "b", "c", "d"], "answer": 1, "subject": f"s{n // 10}"} for n in range(50)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: rows)
    drawn = load_questions("mmlu", limit=10, seed=3)
    assert [one.index for one in drawn] == sorted(int(one.question) for one in drawn)
    assert len({one.subject for one in drawn}) > 1
    assert drawn == load_questions("mmlu", limit=10, seed=3) != load_questions("mmlu", limit=10, seed=4)
    assert load_questions("mmlu", limit=50) == load_questions("mmlu")
    assert [selection(path, limit, 3) for path, limit in [(None, None), (None, 5), ("x.json", 5)]] == [
        "all",
        "5 drawn with seed 3",
        "the first 5",
    ]


def test_half_a_character_is_refused_at_reading(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    row = {"question": "Tom \\ud83d?", "answer": "Tom is a zumpus.", "steps": []}
    path.write_text(json.dumps([row]).replace("\\\\ud83d", "\\ud83d"), encoding="utf-8")
    with pytest.raises(UserError, match=r"row 1: field 'question' holds half a character"):
        load_questions("prosqa", path)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Couldn't reach\nthe Hub", "cannot load Idavidrein/gpqa: Couldn't reach the Hub; a local JSON file"),
        ("", "cannot load Idavidrein/gpqa: ConnectionError; a local JSON file"),
        (
            "'Idavidrein/gpqa' is a gated dataset on the Hub.",
            "access is gated; accept the terms at https://huggingface.co/datasets/Idavidrein/gpqa",
        ),
    ],
)
def test_a_hub_that_gives_nothing(monkeypatch: pytest.MonkeyPatch, message: str, expected: str) -> None:
    failing_hub(monkeypatch, message)
    with pytest.raises(UserError) as error:
        load_questions("gpqa")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("benchmark", "content", "expected"),
    [
        ("gsm8k", "", "nothing in it"),
        ("gsm8k", "[]", "nothing in it"),
        ("gsm8k", "[1]", "row 1: expected an object"),
        ("gsm8k", "{", "line 1: not valid JSON"),
        ("gsm8k", "[{]", "not valid JSON"),
        ("gsm8k", '[{"question": "a", "answer": "1"}, {"question": "a"}]', "row 2: field 'answer': expected a text"),
        ("gsm8k", '{"question": "a", "answer": "many"}', "row 1: 'many' is no answer to a question of gsm8k"),
        ("gsm8k", '{"question": "a", "answer": 4}', "field 'answer': expected a text"),
        ("mmlu", '{"question": "a", "choices": ["1"], "answer": 0}', "field 'choices': expected a list of 4 texts"),
        ("mmlu", '{"question": "a", "choices": ["1", "2", "3", "4"], "answer": 4}', "4 is no index of the 4 choices"),
        ("mmlu", '{"question": "a", "choices": ["1", "2", "3", "4"], "answer": "E"}', "'E' is no answer to a question of mmlu"),
        ("math", '{"problem": "a", "solution": "nothing here"}', "row 1"),
        ("gpqa", '{"Question": "a", "Correct Answer": "b"}', "field 'Incorrect Answer 1'"),
        ("prontoqa", '{"question": "a", "answer": "maybe"}', "'maybe' is no answer to a question of prontoqa"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, benchmark: str, content: str, expected: str) -> None:
    path = tmp_path / "questions.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_questions(benchmark, path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_errors_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_questions("gsm8k", tmp_path / "missing.json")
    with pytest.raises(UserError, match="did you mean 'prosqa'"):
        load_questions("prosq", tmp_path)
    with pytest.raises(UserError, match="prontoqa: not on the hub; give a file of records"):
        load_questions("prontoqa")


@pytest.mark.published_data("gsm8k_test.jsonl", "prosqa_official_valid.json")
@pytest.mark.parametrize(
    ("benchmark", "name", "count"), [("gsm8k", "gsm8k_test.jsonl", 1319), ("prosqa", "prosqa_official_valid.json", 300)]
)
def test_published_files(benchmark: str, name: str, count: int) -> None:
    questions = load_questions(benchmark, PUBLISHED / name)
    assert len(questions) == count
    assert questions[0].gold == {"gsm8k": "18", "prosqa": "Tom is a lempus."}[benchmark]
