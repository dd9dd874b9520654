"""Branches that vote, on a few questions with all details: `python quick_branch_test.py [FILE.yaml] [key=value ...]`.

Without a model the quick start's checkpoint answers, or a small random model where that is missing.

    python quick_branch_test.py
    python quick_branch_test.py num_questions=3 noise_scales=2 load_model_path=checkpoints/x@best
"""

from __future__ import annotations

if __name__ == "__main__":
    import systems.startup  # noqa: F401

from experiments.checks.branch_check import QuickBranchConfig, show_branches, with_quick_start
from systems import distributed
from utils import entry_point, load_config


@entry_point
def main(arguments: list[str]) -> None:
    config = with_quick_start(load_config(QuickBranchConfig, arguments, __doc__))
    with distributed.process_group() as device:
        show_branches(config, device)


if __name__ == "__main__":
    main()
