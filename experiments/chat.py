"""Talk to a checkpoint and watch it think: `python -m experiments.chat CHECKPOINT [--data FILE]`.

A line is a question, or `random` for one of FILE. Words before or after it change how it is asked, and stay:

    k=2        two thoughts (k=max: as many as it was trained with)
    noise=1    Gaussian noise in every thought, in multiples of its norm (noise=0: none)
    compare    also the answer without thoughts (compare=off)

Shows the answer, its probability, what each thought says under the language-model head, and the graph of the question with the
path that was asked for. Also from a file: `echo random | python -m experiments.chat CHECKPOINT`. An empty line, Ctrl-D or
Ctrl-C ends it.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import networkx as nx
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree
from torch import Tensor

from coconut import Coconut
from dataset import load_records
from evaluation import clean_answer, written_answer
from states import Details
from systems.arguments import Parser
from systems.pretrained import prompt_of
from thoughts import Noise
from utils import UserError, entry_point

SENTENCE = re.compile(r"(?:Every |\b)(\w+) is a (\w+)\.")
ASKED = re.compile(r"Is (\w+) a (\w+) or (\w+)\?")
TOP = 3  # tokens that are shown of a thought
DEEPEST = 12  # of a graph that is drawn


@dataclass(frozen=True)
class How:
    """How a question is asked."""

    k: int | None = None
    noise: float = 0.0
    compare: bool = False


@dataclass
class Answer:
    """text, its probability (greedy, of all its tokens), and the likeliest tokens of each thought with theirs."""

    text: str
    probability: float
    thoughts: list[list[tuple[str, float]]]


def parse(line: str, how: How) -> tuple[str, How]:
    """The question of a line, empty where there is none, and how it is asked. Raises UserError for a word out of range."""
    words = line.split()
    for end in (0, -1):
        while words and (changed := _setting(words[end], how)) is not None:
            how = changed
            words.pop(end)
    return " ".join(words), how


def _setting(word: str, how: How) -> How | None:
    """What a word changes; None if it is a word of the question."""
    key, _, value = word.partition("=")
    if key == "compare" and value in ("", "off"):
        return replace(how, compare=value != "off")
    if key not in ("k", "noise") or not value:
        return None
    try:
        changed = replace(how, k=None if value == "max" else int(value)) if key == "k" else replace(how, noise=float(value))
    except ValueError:
        raise UserError(f"{word}: write k=2 or k=max, noise=0.5, compare or compare=off") from None
    if (changed.k or 0) < 0 or not 0 <= changed.noise < float("inf"):
        raise UserError(f"{word}: must not be negative or infinite")
    return changed


@torch.no_grad()
def ask(model: Coconut, question: str, how: How, max_new_tokens: int) -> Answer:
    prompt = prompt_of(model, question, "max" if how.k is None else how.k)
    latent = prompt[0] == model.latent_token_id
    noise = Noise(how.noise, "gaussian_scaled", schedule="constant") if how.noise and latent.any() else None
    generated = model.generate(prompt, max_new_tokens=max_new_tokens, noise=noise, return_details=True)
    tokens, details = cast("tuple[Tensor, Details]", generated)
    new = tokens[0, prompt.shape[1] :]
    labels = torch.cat([torch.full_like(prompt[0], -100), new])[None]
    loss = model(tokens, labels=labels, labelled_only=True, num_items_in_batch=1, noise=noise).loss
    tokenizer = model.trained.tokenizer
    before = torch.roll(latent, -1)
    chances = model.project(details.hidden[0][before[: details.hidden.shape[1]]]).float().softmax(dim=-1)  # (N, V)
    likeliest = [
        [(str(tokenizer.decode([int(token)])), float(row[token])) for token in row.topk(TOP).indices] for row in chances
    ]
    return Answer(str(tokenizer.decode(new, skip_special_tokens=True)).strip(), float(torch.exp(-loss)), likeliest)


def graph_of(question: str) -> tuple[nx.DiGraph, str | None]:
    """The graph that a ProsQA question states, and whom it is about; empty where it states none."""
    asked = ASKED.search(question)
    return nx.DiGraph(SENTENCE.findall(question)), asked[1] if asked else None


def tree(question: str) -> Tree | None:
    """What can be reached from the person, the path to the option that can be reached marked; None where there is none."""
    graph, person = graph_of(question)
    if person is None or person not in graph:
        return None
    options = [option for option in cast("re.Match[str]", ASKED.search(question)).groups()[1:] if option in graph]
    paths = [nx.shortest_path(graph, person, option) for option in options if nx.has_path(graph, person, option)]
    drawn = Tree(f"[bold]{person}[/]")
    _grow(drawn, graph, person, paths[0] if paths else [], DEEPEST)
    return drawn


def _grow(branch: Tree, graph: nx.DiGraph, node: str, path: list[str], deepest: int) -> None:
    for child in graph.successors(node) if deepest else ():
        _grow(branch.add(f"[bold]{child} *[/]" if child in path else child), graph, child, path, deepest - 1)


def show(console: Console, question: str, answers: dict[str, Answer], gold: str | None) -> None:
    console.print(escape(question))
    if (drawn := tree(question)) is not None:
        console.print(drawn)
    for name, answer in answers.items():
        same = gold is not None and written_answer(answer.text) == clean_answer(gold)
        right = "" if gold is None else "  [green]right[/]" if same else f"  [red]not: {escape(gold)}[/]"
        console.print(f"[bold]{name}[/]: {escape(' '.join(answer.text.split()))}  (p = {answer.probability:.3f}){right}")
        if answer.thoughts:
            table = Table("thought", *(["says", "p"] * TOP), box=None)
            for number, likeliest in enumerate(answer.thoughts, start=1):
                cells = [cell for token, chance in likeliest for cell in (escape(repr(token)), f"{chance:.2f}")]
                table.add_row(str(number), *cells)
            console.print(table)


def lines(console: Console) -> Iterator[str]:
    """What is typed, or piped, up to an empty line or the end."""
    prompt = "[bold]>[/] " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while line := console.input(prompt).strip():
            yield line


def converse(model: Coconut, records: list[dict[str, Any]], seed: int, max_new_tokens: int, console: Console) -> None:
    how, draws = How(), random.Random(seed)
    for line in lines(console):
        try:
            question, how = parse(line, how)
            gold = None
            if question == "random":
                if not records:
                    raise UserError("random: give questions with --data FILE")
                record = draws.choice(records)
                question, gold = record["question"], record["answer"]
            if not question:
                k, compare = "max" if how.k is None else how.k, "on" if how.compare else "off"
                console.print(f"k={k} noise={how.noise:g} compare={compare}")
                continue
            answers = {"with thoughts": ask(model, question, how, max_new_tokens)}
            if how.compare:
                answers["without thoughts"] = ask(model, question, replace(how, k=0, noise=0.0), max_new_tokens)
            show(console, question, answers, gold)
        except (UserError, ValueError) as error:
            console.print(f"[red]{escape(str(error))}[/]")


@entry_point
def main(given: list[str]) -> None:
    parser = Parser("python -m experiments.chat", __doc__)
    parser.add_argument("checkpoint", help="a checkpoint, or a run's directory (its newest one)")
    parser.add_argument("--data", type=Path, help="records, for `random`")
    parser.add_argument("--seed", type=int, default=0, help="of the random questions")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args(given)
    records = load_records(arguments.data) if arguments.data else []
    model = Coconut.from_pretrained(arguments.checkpoint)
    converse(model, records, arguments.seed, arguments.max_new_tokens, Console(highlight=False))


if __name__ == "__main__":
    main()
