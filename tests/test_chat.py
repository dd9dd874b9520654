"""The chat: how lines are read, what is shown, and that it works through a pipe."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_run import start

from coconut import Coconut
from experiments import chat
from experiments.chat import How, ask, graph_of, parse, tree
from utils import UserError

QUESTION = "Every a is a b. Tom is a a. Sam is a c. Every b is a d. Every c is a e. Is Tom a d or e?"


@pytest.fixture
def model(run_arguments: list[str], tmp_path: Path) -> Coconut:
    start(run_arguments, "num_epochs=3")
    return Coconut.from_pretrained(str(tmp_path / "checkpoints" / "run"))


@pytest.mark.parametrize(
    ("line", "question", "how"),
    [
        ("Is it so?", "Is it so?", How()),
        ("k=2 noise=0.5 compare Is it so?", "Is it so?", How(2, 0.5, True)),
        ("random compare k=0", "random", How(0, 0.0, True)),
        ("k=max", "", How()),
        ("Is k=2 right here?", "Is k=2 right here?", How()),
    ],
)
def test_settings_stand_before_or_after_the_question(line: str, question: str, how: How) -> None:
    assert parse(line, How()) == (question, how)


@pytest.mark.parametrize("line", ["k=two x", "noise=-1 x", "noise=inf x", "k=-1"])
def test_a_setting_out_of_range_is_said(line: str) -> None:
    with pytest.raises(UserError, match=line.split()[0]):
        parse(line, How())


def test_the_graph_of_a_question_and_the_path_that_was_asked_for() -> None:
    graph, person = graph_of(QUESTION)
    assert (set(graph.edges), person) == ({("a", "b"), ("Tom", "a"), ("Sam", "c"), ("b", "d"), ("c", "e")}, "Tom")
    out = io.StringIO()
    Console(file=out).print(tree(QUESTION))
    assert [line.strip("└─ ") for line in out.getvalue().splitlines()] == ["Tom", "a *", "b *", "d *"]
    assert tree("What is 1 plus 1?") is None


def test_an_answer_has_its_probability_and_its_thoughts(model: Coconut) -> None:
    """The probability is that of the tokens one by one; without thoughts there are none to show."""
    question = "Tom is a lempus. Is Tom a lempus or zumpus?"
    answer = ask(model, question, How(k=2), 5)
    assert len(answer.thoughts) == 2
    assert all(1 >= row[0][1] >= row[1][1] >= row[2][1] > 0 for row in answer.thoughts)
    tokens = model.generate(prompt := chat.prompt_of(model, question, 2), max_new_tokens=5)
    expected = 1.0
    for place in range(prompt.shape[1], tokens.shape[1]):
        logits = model(tokens[:, :place]).logits[0, -1]
        expected *= logits.softmax(dim=-1)[tokens[0, place]].item()
    assert answer.probability == pytest.approx(expected, rel=1e-4)
    assert ask(model, question, How(k=0), 5).thoughts == []
    noisy = ask(model, question, How(k=2, noise=50.0), 5)
    assert noisy.thoughts != answer.thoughts


def test_an_answer_is_right_as_in_an_evaluation() -> None:
    for text, gold, word in (
        ("<<7+8=15>>\n### 15", "5", "not: 5"),
        ("### 1,234", "1234", "right"),
        ("1234", "1234", "not: 1234"),
    ):
        console = Console(file=io.StringIO(), width=100)
        chat.show(console, "7 + 8?", {"with thoughts": chat.Answer(text, 0.9, [])}, gold)
        assert console.file.getvalue().rstrip().endswith(f"(p = 0.900)  {word}")


def test_it_answers_through_a_pipe_and_says_what_is_wrong(
    model: Coconut,
    run_arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = next(one.split("=", 1)[1] for one in run_arguments if one.startswith("val_path="))
    monkeypatch.setattr(sys, "argv", ["chat", str(tmp_path / "checkpoints" / "run"), "--data", data, "--max-new-tokens", "4"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("compare random\nk=x\nk=1\nTom is a lempus.\n\nnever read\n"))
    chat.main()
    shown = capsys.readouterr().out
    assert shown.count("with thoughts: ") == 2
    assert shown.count("without thoughts: ") == 2
    assert "k=x: write k=2 or k=max" in shown
    assert "k=1 noise=0 compare=on" in shown
    assert "\x1b[" not in shown
