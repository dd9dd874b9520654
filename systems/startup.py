"""Imported first by a command: Python looks for garbage while torch and transformers are imported, and there is none.

It was a third of the time that a command took to start (docs/LOG.md, "Starting faster"). `utils.entry_point` ends it.
"""

import gc
import importlib
import os

gc.disable()
EXTENSIONS = "COCONUT_EXTENSIONS"


def import_extensions() -> None:
    """Import the modules that the environment names, which add rows to the tables (docs/EXTENDING.md). Raises ImportError."""
    for name in filter(None, os.environ.get(EXTENSIONS, "").split(",")):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"{EXTENSIONS}: {name}: {error}") from None


def imported() -> None:
    """What is imported by now stays until the end, so the collector need not look at it again."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
