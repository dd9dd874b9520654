"""Whether noise and generation work on this machine, in a minute: `python quick_test.py [FILE.yaml] [key=value ...]`.

A small random model is made on the spot; model_id or load_model_path names another one. Exit code 1 if a check fails.

    python quick_test.py
    python quick_test.py load_model_path=checkpoints/x@best num_questions=2
"""

from __future__ import annotations

if __name__ == "__main__":
    import systems.startup  # noqa: F401

import sys

from experiments.checks.selfcheck import CheckConfig, run_checks
from systems import distributed
from utils import entry_point, load_config


@entry_point
def main(arguments: list[str]) -> None:
    config = load_config(CheckConfig, arguments, __doc__)
    with distributed.process_group() as device:
        passed = run_checks(config, device)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
