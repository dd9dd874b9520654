"""Imported first by a command: Python looks for garbage while torch and transformers are imported, and there is none.

It was a third of the time that a command took to start (docs/LOG.md, "Starting faster"). `utils.entry_point` ends it.
"""

import gc

gc.disable()


def imported() -> None:
    """What is imported by now stays until the end, so the collector need not look at it again."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
