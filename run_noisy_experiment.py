"""A whole benchmark with noisy branches that vote: `python run_noisy_experiment.py [args/X.yaml] [key=value ...]`.

Under torchrun the processes share the questions. The same command goes on where a run was stopped or killed.

    python run_noisy_experiment.py args/noisy_coconut.yaml model_id=MODEL benchmark=gsm8k
    python run_noisy_experiment.py args/noisy_coconut.yaml model_id=DIRECTORY dtype=float32 data_path=questions.jsonl
"""

from __future__ import annotations

if __name__ == "__main__":
    import systems.startup  # noqa: F401

from experiments.noise.results import answer_and_write
from experiments.noise.settings import BranchConfig
from utils import entry_point, load_config


@entry_point
def main(arguments: list[str]) -> None:
    answer_and_write(load_config(BranchConfig, arguments, __doc__, "args/noisy_coconut.yaml"))


if __name__ == "__main__":
    main()
