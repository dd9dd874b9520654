"""The form of CODI's published weights (arXiv 2502.21074): LoRA beside the frozen weights, the projection, three new rows.

Names are those of peft: X.base_layer.weight, X.lora_A.default.weight, X.lora_B.default.weight. The projection's parts have the
prefix `prj.`. The new rows are the padding, the beginning and the end of thoughts; fed-back positions have no row.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from systems.weights import MAP_PREFIX
from utils import UserError

LORA = re.compile(r"\.lora_([AB])\.(\w+\.)?weight$")
WRAPPERS = re.compile(r"^(codi\.)?(base_model\.model\.)?")
PROJECTION = "prj."
NEW_ROWS = 3


def is_codi(state: dict[str, Tensor]) -> bool:
    return any(LORA.search(key) or key.startswith(PROJECTION) for key in state)


def plain_state(path: Path, state: dict[str, Tensor], alpha: float | None, vocabulary: int) -> dict[str, Tensor]:
    """The state dict of a plain model with LoRA merged, rows of the markers in our order, and the thought map's weights.

    alpha: of LoRA. vocabulary: rows of the base model without new ones. Raises UserError if something does not fit.
    """
    state = {WRAPPERS.sub("", key): value for key, value in state.items()}
    projection = {key.removeprefix(PROJECTION): state.pop(key) for key in [*state] if key.startswith(PROJECTION)}
    pairs: dict[str, dict[str, Tensor]] = {}
    for key in [*state]:
        if found := LORA.search(key):
            pairs.setdefault(key[: found.start()], {})[found[1]] = state.pop(key)
    if pairs and alpha is None:
        raise UserError(f"{path}: it holds LoRA weights: set --lora-alpha (published: 32)")
    plain = {key.replace(".base_layer.", "."): value for key, value in state.items()}
    broken = [name for name, pair in pairs.items() if set(pair) != {"A", "B"} or f"{name}.weight" not in plain]
    if broken:
        raise UserError(f"{path}: LoRA weights of {broken[0]} without the rest of it")
    shapes = {name: (pair["B"].shape[0], pair["A"].shape[1]) for name, pair in pairs.items()}
    # GPT-2 holds its matrices the other way round; square ones do not show it, but others of the same file do.
    turned = any(
        rows != columns and plain[f"{name}.weight"].shape == (columns, rows) for name, (rows, columns) in shapes.items()
    )
    for name, pair in pairs.items():
        change = float(alpha or 0) / len(pair["A"]) * (pair["B"].float() @ pair["A"].float())
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight.float() + (change.T if turned else change)).to(weight.dtype)
    embeddings = [key for key, value in plain.items() if value.ndim == 2 and len(value) == vocabulary + NEW_ROWS]
    if not embeddings:
        raise UserError(f"{path}: no embeddings of {vocabulary} rows and {NEW_ROWS} new ones: is --model-id the right one?")
    for key in embeddings:
        old, (padding, begin, end) = plain[key][:vocabulary], plain[key][vocabulary:]
        plain[key] = torch.cat([old, torch.stack([begin, end, padding])])  # the latent's own row is never read
    return plain | {f"{MAP_PREFIX}{key}": value for key, value in _projection(path, projection).items()}


def _projection(path: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two linear layers and a norm, whatever their names, in the order in which they are used."""
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in found))
    linear = [name for name in names if found[f"{name}.weight"].ndim == 2]
    norms = [name for name in names if found[f"{name}.weight"].ndim == 1]
    if found and (len(linear), len(norms)) != (2, 1):
        raise UserError(f"{path}: its projection is not two linear layers and a norm, but {', '.join(names)}")
    places = dict(zip([*linear, *norms], ("steps.0", "steps.2", "steps.3"), strict=True)) if found else {}
    return {f"{place}.{part}": found[f"{name}.{part}"] for name, place in places.items() for part in ("weight", "bias")}
