"""Tables of results as text: Markdown, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(value: float | None, form: str) -> str:
    """A number as `form` writes it; nothing where there is none."""
    return "" if value is None else form.format(value)


def probability(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else text(value, "{:.3f}")
