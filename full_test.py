"""The full evaluation suite on a checkpoint or an untrained model: `python full_test.py args/full_test.yaml [key=value ...]`.

Under torchrun the processes share the questions. The same command goes on where a run was stopped or killed.

    python full_test.py args/full_test.yaml
    python full_test.py args/full_test.yaml load_model_path=checkpoints/x@best num_questions=100
"""

from __future__ import annotations

if __name__ == "__main__":
    import systems.startup  # noqa: F401

from experiments.noise.full import run_full
from experiments.noise.settings import FullConfig
from systems import distributed
from systems.metrics import print_config
from utils import entry_point, load_config


@entry_point
def main(arguments: list[str]) -> None:
    config = load_config(FullConfig, arguments, __doc__, "args/full_test.yaml")
    with distributed.process_group() as device:
        print_config(config)
        run_full(config, device)


if __name__ == "__main__":
    main()
