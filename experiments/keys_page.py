"""docs/KEYS.md, made from the configurations' own descriptions: `python -m experiments.keys_page [OUT]`.

python -m experiments.keys_page
python -m experiments.keys_page docs/KEYS.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from config import RunConfig
from experiments.ablation import AblationConfig
from experiments.checks.branch_check import QuickBranchConfig
from experiments.checks.selfcheck import CheckConfig
from experiments.noise.settings import BranchConfig, FullConfig, SweepConfig
from experiments.probe import ProbeConfig
from experiments.tables import markdown
from systems.writing import write_text
from utils import Config, description, entry_point, written

WHOLE: dict[str, type[Config]] = {"run.py": RunConfig, "test.py": SweepConfig, "experiments.probe": ProbeConfig}
LIKE_TEST: dict[str, type[Config]] = {
    "run_noisy_experiment.py": BranchConfig,
    "full_test.py": FullConfig,
    "experiments.ablation": AblationConfig,
    "quick_test.py": CheckConfig,
    "quick_branch_test.py": QuickBranchConfig,
}
HEADING = """# Every key

Made by `python -m experiments.keys_page docs/KEYS.md`; a test compares this page with the code. A key is written `key: value`
in a YAML file, or `key=value` after it. Each command prints its own keys with `--help`.
"""


def keys(kind: type[Config]) -> dict[str, tuple[str, str]]:
    """The default and the description of each key that the command takes."""
    unused: tuple[str, ...] = getattr(kind, "unused", tuple)()
    found = {}
    for name, field in kind.model_fields.items():
        if name not in unused:
            default = "needed" if field.is_required() else written(field.get_default(call_default_factory=True))
            found[name] = (default, description(kind, name))
    return found


def section(command: str, rows: dict[str, tuple[str, str]], before: str = "") -> str:
    cells = [[f"`{name}`", f"`{default}`", " ".join(about.split())] for name, (default, about) in rows.items()]
    return f"## {command}\n\n{before}{markdown(['key', 'default', 'what it is'], cells)}\n"


def page() -> str:
    sections = [section(command, keys(kind)) for command, kind in WHOLE.items()]
    common = keys(SweepConfig)
    for command, kind in LIKE_TEST.items():
        own = {name: entry for name, entry in keys(kind).items() if common.get(name) != entry}
        gone = [f"`{name}`" for name in common if name not in keys(kind)]
        without = f" It has no {', '.join(gone)}." if gone else ""
        sections.append(section(command, own, f"The keys of test.py with these changes.{without}\n\n"))
    return "\n".join([HEADING, *sections])


@entry_point
def main(arguments: list[str]) -> None:
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
    elif arguments:
        write_text(Path(arguments[0]), page())
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
