"""Options of the commands that take no configuration: `Parser` makes what is wrong with them one line, as all errors are."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from utils import UserError


class Parser(argparse.ArgumentParser):
    """`command` is how the program is called; `doc`, its module's text, stands above the options in --help as it is written.

    examples: what may stand behind the command. A mistake raises UserError.
    """

    def __init__(self, command: str, doc: str | None, examples: Sequence[str] = ()) -> None:
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=command, description=doc, formatter_class=as_written)
        if examples:
            self.epilog = "\n".join(["examples:", *(f"  {command} {example}" for example in examples)])

    def error(self, message: str) -> NoReturn:
        raise UserError(message)
