"""docs/tutorial.ipynb, made from docs/TUTORIAL.md: `python -m experiments.notebook_page [OUT]`.

Text becomes text, each command a cell of its own, and after some commands a cell shows what they made. The first cells, tagged
"setup", get the code and train; those tagged "long" train again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from systems.arguments import Parser
from systems.writing import write_text
from utils import entry_point

ROOT = Path(__file__).parents[1]
TYPED = r"random compare\nk=2 random\nk=max noise=2 random\n\n"  # into the chat
SETUP = (
    "# The working directory must be a copy of the repository.\n%pip install -q -r requirements.txt",
    "%%bash\nbash scripts/quickstart.sh  # 6 to 10 minutes on two CPU cores",
)
SHOWN = {  # after a command that holds this: what it made
    "experiments.probe ": (
        'from IPython.display import Image, Markdown\nMarkdown(filename="results/tutorial/probes.md")',
        'Image("results/tutorial/forced.png")',
    ),
    "name=at_2": ('Image("results/at_2/gaussian_scaled.png")',),
}


def cells() -> Iterator[dict[str, Any]]:
    lines = (ROOT / "docs" / "TUTORIAL.md").read_text(encoding="utf-8").splitlines()
    for is_command, group in itertools.groupby(lines, key=lambda line: line.startswith("    ")):
        if is_command:
            for line in group:
                yield from _command(line.strip())
        elif said := "\n".join(group).strip():
            yield {"cell_type": "markdown", "metadata": {}, "source": said}
            if said.startswith("# "):  # the title
                yield from (_code(source, "setup") for source in SETUP)


def _command(command: str) -> Iterator[dict[str, Any]]:
    if "experiments.chat" in command:
        command = f"printf '{TYPED}' | {command}"
    yield _code(f"%%bash\n{command}", *["long"] * ("scripts/" in command))
    for key, sources in SHOWN.items():
        if key in command:
            yield from map(_code, sources)


def _code(source: str, *tags: str) -> dict[str, Any]:
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": "code", "execution_count": None, "metadata": metadata, "outputs": [], "source": source}


def notebook() -> str:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    numbered = [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells())]
    content = {"cells": numbered, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1) + "\n"


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.notebook_page", __doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "docs" / "tutorial.ipynb")
    write_text(parser.parse_args(given).out, notebook())


if __name__ == "__main__":
    main()
