"""The layers of the code: a module imports only what stands before it in this list (CONTRIBUTING.md explains it)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

ORDER = (
    "systems.startup",
    "utils",
    "systems.arguments",
    "noise",
    "thoughts",
    "states",
    "systems.cache",
    "generation",
    "systems.last_layer",
    "systems.weight_gradients",
    "systems.activation_checkpointing",
    "coconut",
    "methods",
    "systems.optimization",
    "config",
    "systems.files",
    "systems.writing",
    "systems.signals",
    "systems.watchdog",
    "dataset",
    "systems.batches",
    "systems.tokens",
    "systems.lora",
    "systems.shards",
    "systems.weights",
    "systems.models",
    "systems.distributed",
    "systems.meta_start",
    "systems.machine",
    "systems.storage",
    "systems.sources",
    "systems.checkpoint",
    "systems.codi_format",
    "systems.convert",
    "systems.pretrained",
    "evaluation",
    "systems.metrics",
    "training",
    "preprocessing",
    "experiments",
    "run",
    "test",
    "run_noisy_experiment",
    "quick_test",
    "quick_branch_test",
    "full_test",
)
LATER = {("coconut", "systems.pretrained"), ("systems.checkpoint", "systems.convert")}  # imported where a method is called
PACKAGES = ("methods", "systems", "preprocessing", "experiments")
ENTRY_POINTS = ORDER[ORDER.index("run") :]
PURE = {
    "coconut": ("torch.distributed", "wandb", "argparse", "sys"),
    "dataset": ("torch.distributed", "wandb", "argparse", "sys"),
}


def imports(path: Path) -> set[str]:
    """What a module imports, for its types alone excepted."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def place(name: str) -> str | None:
    """The entry of ORDER that a module's name belongs to."""
    return next((entry for entry in ORDER if name == entry or name.startswith(f"{entry}.")), None)


def modules() -> list[Path]:
    return [
        path
        for path in [*ROOT.glob("*.py"), *(p for d in PACKAGES for p in (ROOT / d).rglob("*.py"))]
        if path.stem != "__init__"
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_upward_only(path: Path) -> None:
    own = place(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own, f"{path.name}: give the new module its place in ORDER"
    for name in filter(None, map(place, imports(path))):
        assert name == own or (own, name) in LATER or ORDER.index(name) < ORDER.index(own), f"{path.name} imports {name}"
        assert name not in ENTRY_POINTS, f"{path.name} imports the entry point {name}"


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_model_and_the_data_know_nothing_of_processes_or_the_command_line(module: str) -> None:
    assert not imports(ROOT / f"{module}.py") & set(PURE[module])


def test_no_prints_in_the_model_or_the_data() -> None:
    for module in PURE:
        tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert "print" not in calls


def test_entry_points_stay_short() -> None:
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                assert node.end_lineno - node.lineno < 80
