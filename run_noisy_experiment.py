"""A whole benchmark with noisy branches that vote: `python run_noisy_experiment.py [args/X.yaml] [key=value ...]`.

Under torchrun the processes share the questions. The same command goes on where a run was stopped or killed.

    python run_noisy_experiment.py args/noisy_coconut.yaml model_id=MODEL benchmark=gsm8k
    python run_noisy_experiment.py args/noisy_coconut.yaml model_id=DIRECTORY dtype=float32 data_path=questions.jsonl
"""

from __future__ import annotations

from experiments.noise.results import write_results
from experiments.noise.settings import BranchConfig
from experiments.noise.sweep import run_sweep
from systems import distributed
from systems.metrics import print_config
from systems.signals import StopRequest
from utils import entry_point, load_config


@entry_point
def main(arguments: list[str]) -> None:
    config = load_config(BranchConfig, arguments, __doc__, "args/noisy_coconut.yaml")
    with distributed.process_group() as device:
        print_config(config)
        sweep = run_sweep(config, device)
        if sweep is not None:
            with StopRequest().listening():  # all is answered: the files are finished first
                distributed.run_on_main(lambda: write_results(sweep))


if __name__ == "__main__":
    main()
