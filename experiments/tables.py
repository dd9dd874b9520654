"""Tables of results, for the terminal and in Markdown, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table


def terminal(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", left: Sequence[str] = ()
) -> Table:
    """left: the columns of words, beside the first one; all others are of numbers and stand to the right."""
    aligned: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, **aligned)
    for number, column in enumerate(columns):
        words = number == 0 or column in left
        table.add_column(column, justify="left" if words else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(value: float | None, form: str) -> str:
    """A number as `form` writes it; nothing where there is none."""
    return "" if value is None else form.format(value)


def probability(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else text(value, "{:.3f}")


def with_interval(numbers: Mapping[str, Any] | None, key: str = "mean", sign: str = "", unit: str = "") -> str:
    """A number and the bounds of its 95% interval; nothing where there is none. sign: "+" also for positive ones."""
    if numbers is None:
        return ""
    return f"{numbers[key]:{sign}.1f}{unit} ({numbers['low']:{sign}.1f} to {numbers['high']:{sign}.1f})"
