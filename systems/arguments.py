"""Options of the commands that take no configuration: `Parser` makes what is wrong with them one line, as all errors are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from utils import UserError


class Parser(argparse.ArgumentParser):
    """`prog` is how the program is called; `description`, its module's text, stands in --help as it is written.

    examples: what may stand behind `prog`. A mistake raises UserError.
    """

    def __init__(self, prog: str, description: str | None = None, examples: Sequence[str] = (), **more: Any) -> None:
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=as_written, **more)
        if examples:
            self.epilog = "\n".join(["examples:", *(f"  {prog} {example}" for example in examples)])

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def natural(text: str) -> int:
    """A number of the command line, at least 0."""
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, is {text}")
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, is {text}")
    return int(text)
