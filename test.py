"""Accuracy against noise in the thoughts: `python test.py [args/noise_sweep.yaml] [key=value ...]`, alone or under torchrun.

python test.py args/noise_sweep.yaml noise_type=all controls="[zero, mean, other, pause]"
python test.py args/noise_sweep.yaml load_model_path=checkpoints/x@best noise_type=snr num_questions=100
"""

from __future__ import annotations

from experiments.noise.results import write_results
from experiments.noise.settings import SweepConfig
from experiments.noise.sweep import run_sweep
from systems import distributed
from systems.metrics import print_config
from systems.signals import StopRequest
from utils import entry_point, load_config


@entry_point
def main(arguments: list[str]) -> None:
    config = load_config(SweepConfig, arguments, __doc__, "args/noise_sweep.yaml")
    with distributed.process_group() as device:
        print_config(config)
        sweep = run_sweep(config, device)
        if sweep is not None:
            with StopRequest().listening():  # all is answered: the files are finished first
                distributed.run_on_main(lambda: write_results(sweep))


if __name__ == "__main__":
    main()
