"""Options of the commands that take no configuration."""

from __future__ import annotations

import pytest

from systems.arguments import Parser
from utils import UserError


def test_what_is_wrong_is_one_line() -> None:
    parser = Parser("python -m experiments.x", None)
    parser.add_argument("number", type=int)
    for given, said in (([], "number"), (["x"], "invalid int value: 'x'"), (["1", "--no-such-option"], "--no-such-option")):
        with pytest.raises(UserError, match=said):
            parser.parse_args(given)
    assert parser.parse_args(["3"]).number == 3


def test_help_shows_the_module_s_text_as_written_and_the_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser("python x.py", "First.\n\n    a command\n", ["--all", "some"]).parse_args(["--help"])
    said = capsys.readouterr().out
    assert "First.\n\n    a command\n" in said
    assert said.endswith("examples:\n  python x.py --all\n  python x.py some\n")
