"""Accuracy against noise in the thoughts: `python test.py [args/noise_sweep.yaml] [key=value ...]`, alone or under torchrun.

python test.py args/noise_sweep.yaml noise_type=all controls="[zero, mean, other, pause]"
python test.py args/noise_sweep.yaml load_model_path=checkpoints/x@best noise_type=snr num_questions=100
"""

from __future__ import annotations

if __name__ == "__main__":
    import systems.startup  # noqa: F401

from experiments.noise.results import answer_and_write
from experiments.noise.settings import SweepConfig
from utils import entry_point, load_config


@entry_point
def main(arguments: list[str]) -> None:
    answer_and_write(load_config(SweepConfig, arguments, __doc__, "args/noise_sweep.yaml"))


if __name__ == "__main__":
    main()
