"""ProsQA questions (Coconut, arXiv 2412.06769, appendix on the construction of ProsQA), made from a seed.

`python preprocessing/prosqa.py` writes data/prosqa_{train,valid,test}.json: questions over random acyclic graphs.
`python preprocessing/prosqa.py --shape chains` writes the small questions of the quick start: two chains of one length.
Each record draws from its own generator, seeded with (seed, split, index), so a file is the same on every run.
"""

import argparse
import functools
import itertools
import operator
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocessing.common import SPLITS, OneLineParser, Record, exit_with, prepare_directory, write_records

PROGRAM = "prosqa.py"
Edge = tuple[int, int]

# The published data set's vocabulary: one tokenizer then serves the published files and these.
_NAMES = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
_CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
    "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus "
    "tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
)
NAMES, CONCEPTS = tuple(_NAMES.split()), tuple(_CONCEPTS.split())
MAX_DRAWS = 1000  # of one record, before the vocabulary is judged too small for so many different questions

MEAN_PARENTS = 1.5  # of the Poisson draw
POOL_SHARE = 0.35  # probability of each of the two one-sided pools of parents
HOPS = range(3, 7)  # shortest paths asked for; the published set has no others
# The appendix does not give the number of nodes. 28, less those that end up without any edge, gives 23.1 +- 2.0 nodes;
# published: 22.8 +- 2.0, at most 28.
DRAWN_NODES = 28
PUBLISHED: dict[str, dict[str, Any]] = {
    "published test": {
        "records": 500,
        "nodes": 22.8,
        "edges": 35.8,
        "shortest path": 3.78,
        "shortest paths": 1.57,
        "hops": {3: 202, 4: 217, 5: 69, 6: 12},
        "depth shortcut": 0.902,
    }
}


def record_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Generator of one record; it depends on nothing drawn for another record or split."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def edge_sentence(symbols: Sequence[str], edge: Edge) -> str:
    """`Tom is a terpus.` for a person, `Every terpus is a brimpus.` for a concept."""
    parent, child = (symbols[node] for node in edge)
    return f"{parent} is a {child}." if parent in NAMES else f"Every {parent} is a {child}."


def render_record(
    rng: np.random.Generator, symbols: list[str], edges: list[Edge], path: Sequence[int], neg_target: int
) -> Record:
    """The record that asks for the end of `path` (nodes from the person asked about to the answer)."""
    root, target = path[0], path[-1]
    sentences = [edge_sentence(symbols, edges[i]) for i in rng.permutation(len(edges))]
    options = [symbols[target], symbols[neg_target]]
    if rng.random() < 0.5:
        options.reverse()
    return {
        "question": " ".join(sentences) + f" Is {symbols[root]} a {options[0]} or {options[1]}?",
        "answer": f"{symbols[root]} is a {symbols[target]}.",
        "steps": [edge_sentence(symbols, edge) for edge in itertools.pairwise(path)],
        "idx_to_symbol": symbols,
        "edges": [list(edge) for edge in edges],
        "root": int(root),
        "target": int(target),
        "neg_target": int(neg_target),
    }


def draw_words(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """`count` different words in random order. ValueError: there are fewer."""
    if count > len(words):
        raise ValueError(f"{count} different names or concepts needed, {len(words)} available")
    return [words[i] for i in rng.permutation(len(words))[:count]]


def chain_record(
    rng: np.random.Generator,
    hops: Sequence[int] = (2, 3),
    branches: int = 0,
    concepts: Sequence[str] = CONCEPTS,
    names: Sequence[str] = NAMES,
) -> Record:
    """Two persons, each at the head of a chain of h concepts (h drawn from `hops`); the options are the two ends.

    Both ends stand at the same depth and have h ancestors each, so an option's own depth says nothing about the answer.
    0..`branches` further concepts hang as leaves from random nodes that are no ends.
    ValueError: fewer concepts or names than a question needs.
    """
    h = int(rng.choice(hops)) if len(hops) > 1 else hops[0]
    chains = [[side, *range(2 + side * h, 2 + (side + 1) * h)] for side in (0, 1)]
    edges = [edge for chain in chains for edge in itertools.pairwise(chain)]
    inner = chains[0][:-1] + chains[1][:-1]
    extra = int(rng.integers(branches + 1))
    edges += [(inner[i], 2 + 2 * h + leaf) for leaf, i in enumerate(rng.integers(len(inner), size=extra))]
    symbols = draw_words(rng, names, 2) + draw_words(rng, concepts, 2 * h + extra)
    side = int(rng.integers(2))
    return render_record(rng, symbols, edges, chains[side], chains[1 - side][-1])


def draw_records(
    draw: Callable[[np.random.Generator], Record],
    count: int,
    seed: int,
    split: str,
    exclude: Collection[str] = (),
) -> list[Record]:
    """`count` records by `draw`, no question twice and none of the questions in `exclude`.

    ValueError: so many different questions could not be found.
    """
    records, taken = [], set(exclude)
    for index in tqdm(range(count), desc=split, disable=None):
        rng = record_rng(seed, split, index)
        record = next((r for r in (draw(rng) for _ in range(MAX_DRAWS)) if r["question"] not in taken), None)
        if record is None:
            raise ValueError(f"only {index} different questions found for {split}, {count} asked for")
        taken.add(record["question"])
        records.append(record)
    return records


def chain_records(
    count: int,
    seed: int,
    split: str,
    hops: Sequence[int] = (2, 3),
    branches: int = 0,
    concepts: Sequence[str] = CONCEPTS,
    names: Sequence[str] = NAMES,
    exclude: Collection[str] = (),
) -> list[Record]:
    """`count` different records by `chain_record`; `exclude`: questions that must not occur."""
    draw = functools.partial(chain_record, hops=hops, branches=branches, concepts=concepts, names=names)
    return draw_records(draw, count, seed, split, exclude)


def parent_pool(rng: np.random.Generator, labels: Sequence[int]) -> list[int]:
    """Nodes a new node may have as parents; `labels` bit 1: descends from node 0, bit 2: from node 1.

    Probability 0.35: those that descend from node 0 alone; 0.35: from node 1 alone; else all.
    Later parentless nodes (label 0) stand in the third pool only. The appendix's words leave that open; with them in
    every pool the published file's counts are missed (2.6 such nodes per graph instead of 0.5, 1.43 shortest paths).
    """
    side = rng.random()
    if side < 2 * POOL_SHARE:
        wanted = 1 if side < POOL_SHARE else 2
        return [node for node, label in enumerate(labels) if label == wanted]
    return list(range(len(labels)))


def draw_parents(rng: np.random.Generator, labels: Sequence[int], depths: Sequence[int]) -> list[int]:
    """Poisson(1.5) parents out of a pool, without replacement, with weight 1.5 * depth + 1."""
    pool = parent_pool(rng, labels)
    count = min(int(rng.poisson(MEAN_PARENTS)), len(pool))
    weights = np.array([1.5 * depths[node] + 1 for node in pool])
    return sorted(int(node) for node in rng.choice(pool, size=count, replace=False, p=weights / weights.sum()))


def grow_graph(rng: np.random.Generator, nodes: int = DRAWN_NODES) -> list[Edge]:
    """Edges (parent, child) of a random acyclic graph grown from nodes 0 and 1 (appendix of arXiv 2412.06769).

    Nodes without any edge are left out and the others numbered anew in the order of their drawing; nodes 0 and 1 stay.
    """
    labels, depths, edges = [1, 2], [0, 0], []
    for node in range(2, nodes):
        parents = draw_parents(rng, labels, depths)
        labels.append(functools.reduce(operator.or_, (labels[parent] for parent in parents), 0))
        depths.append(min((depths[parent] + 1 for parent in parents), default=0))
        edges += [(parent, node) for parent in parents]
    kept = sorted({0, 1}.union(*edges))
    number = {node: index for index, node in enumerate(kept)}
    return [(number[parent], number[child]) for parent, child in edges]


def find_question(rng: np.random.Generator, graph: nx.DiGraph) -> tuple[list[int], int] | None:
    """(shortest path from the person asked about to the answer, other option), or None: nothing to ask.

    The candidates are the leaves that descend from one of nodes 0 and 1 alone. As in the published file the answer is
    one farthest from its root, among both roots' candidates, and the other option is any candidate of the other root.
    """
    distances = [nx.single_source_shortest_path_length(graph, root) for root in (0, 1)]
    leaves = [node for node in graph if graph.out_degree(node) == 0]
    sides = [[leaf for leaf in leaves if leaf in distances[r] and leaf not in distances[1 - r]] for r in (0, 1)]
    if not all(sides):
        return None
    farthest = [max(distances[root][leaf] for leaf in sides[root]) for root in (0, 1)]
    root = int(rng.integers(2)) if farthest[0] == farthest[1] else int(np.argmax(farthest))
    if farthest[root] not in HOPS:
        return None
    target = rng.choice([leaf for leaf in sides[root] if distances[root][leaf] == farthest[root]])
    return nx.shortest_path(graph, root, target), int(rng.choice(sides[1 - root]))


def prosqa_record(rng: np.random.Generator, concepts: Sequence[str] = CONCEPTS, names: Sequence[str] = NAMES) -> Record:
    """One ProsQA question; graphs that allow no question of 3..6 hops are drawn anew."""
    while True:
        edges = grow_graph(rng)
        graph = nx.DiGraph(edges)
        question = find_question(rng, graph) if {0, 1} <= graph.nodes else None
        if question is not None:
            break
    persons = [node for node in graph if graph.in_degree(node) == 0]
    words = dict(zip(persons, draw_words(rng, names, len(persons)), strict=True))
    others = sorted(set(graph) - set(persons))
    words |= zip(others, draw_words(rng, concepts, len(others)), strict=True)
    return render_record(rng, [words[node] for node in range(len(words))], edges, *question)


def prosqa_records(count: int, seed: int, split: str, exclude: Collection[str] = ()) -> list[Record]:
    """`count` different records by `prosqa_record`; `exclude`: questions that must not occur."""
    return draw_records(prosqa_record, count, seed, split, exclude)


def farthest_ancestor(graph: nx.DiGraph, node: int) -> int:
    """Distance (in edges, along shortest paths) from `node` up to its farthest ancestor."""
    return max(nx.single_source_shortest_path_length(graph.reverse(copy=False), node).values())


def depth_shortcut(record: Record) -> float:
    """1, 1/2 (a tie) or 0: does the option with the farther farthest ancestor answer the question?

    The person asked about is ignored, so what this scores above 1/2 over a data set needs no search.
    """
    graph = nx.DiGraph(record["edges"])
    difference = farthest_ancestor(graph, record["target"]) - farthest_ancestor(graph, record["neg_target"])
    return (1 + int(np.sign(difference))) / 2


def statistics(records: Sequence[Record]) -> dict[str, Any]:
    """Means over `records` (the paper's table of ProsQA statistics), the counts of hops and the shortcut's accuracy."""
    paths = [list(nx.all_shortest_paths(nx.DiGraph(r["edges"]), r["root"], r["target"])) for r in records]
    hops = [len(found[0]) - 1 for found in paths]
    return {
        "records": len(records),
        "nodes": float(np.mean([len(r["idx_to_symbol"]) for r in records])),
        "edges": float(np.mean([len(r["edges"]) for r in records])),
        "shortest path": float(np.mean(hops)),
        "shortest paths": float(np.mean([len(found) for found in paths])),
        "hops": dict(sorted(Counter(hops).items())),
        "depth shortcut": float(np.mean([depth_shortcut(r) for r in records])),
    }


def print_table(columns: dict[str, dict[str, Any]]) -> None:
    """Statistics side by side, one column per data set; hop counts as shares of the data set."""
    print(f"{'':16}" + "".join(f"{name:>16}" for name in columns))
    print(f"{'records':16}" + "".join(f"{c['records']:>16,}" for c in columns.values()))
    for row in ("nodes", "edges", "shortest path", "shortest paths"):
        print(f"{row:16}" + "".join(f"{c[row]:>16.2f}" for c in columns.values()))
    for hop in sorted({hop for c in columns.values() for hop in c["hops"]}):
        cells = (f"{c['hops'].get(hop, 0):,} ({c['hops'].get(hop, 0) / c['records']:.1%})" for c in columns.values())
        print(f"{f'{hop} hops':16}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"{'depth shortcut':16}" + "".join(f"{c['depth shortcut']:>16.1%}" for c in columns.values()))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line, checked; a contradiction ends with one line and exit code 2."""
    parser = OneLineParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("graph", "chains"), default="graph", help="ProsQA, or two chains")
    parser.add_argument("--train", type=int, default=17886, metavar="N", help="records; 0 writes no such file")
    parser.add_argument("--valid", type=int, default=300, metavar="N")
    parser.add_argument("--test", type=int, default=500, metavar="N")
    parser.add_argument("--out-prefix", type=Path, help="files are PREFIX_train.json, ... (default data/prosqa[_small])")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hops", type=int, nargs="+", metavar="H", help="chains: lengths to draw from (default 2 3)")
    parser.add_argument("--train-hops", type=int, nargs="+", metavar="H", help="chains: lengths in train, if different")
    parser.add_argument("--branches", type=int, metavar="N", help="chains: up to N further leaves (default 0)")
    parser.add_argument("--concepts", type=int, metavar="K", help="use the first K concepts only")
    parser.add_argument("--names", type=int, metavar="M", help="use the first M names only")
    args = parser.parse_args(argv)
    if problem := find_problem(args):
        parser.error(problem)
    return fill_defaults(args)


def find_problem(args: argparse.Namespace) -> str | None:
    """What contradicts itself on the command line, or None."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    if args.shape != "chains":
        only_chains = [key for key in ("hops", "train_hops", "branches", "concepts", "names") if key in given]
        if only_chains:
            return f"--{only_chains[0].replace('_', '-')} needs --shape chains"
    for key in ("train", "valid", "test", "branches", "seed"):
        if given.get(key, 0) < 0:
            return f"--{key} must be at least 0, is {given[key]}"
    for key, least, words in (("names", 2, NAMES), ("concepts", 2, CONCEPTS)):
        if not least <= given.get(key, least) <= len(words):
            return f"--{key} must be {least}..{len(words)}, is {given[key]}"
    longest, shortest = (pick(given.get("hops", [2, 3]) + given.get("train_hops", [])) for pick in (max, min))
    if shortest < 1:
        return f"--hops must be at least 1, is {shortest}"
    branches, available = given.get("branches", 0), given.get("concepts", len(CONCEPTS))
    if args.shape == "chains" and 2 * longest + branches > available:
        needed = f"two chains of {longest} hops with {branches} branches need {2 * longest + branches} concepts"
        return f"{needed}, {available} available"
    return None


def fill_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The values that depend on other options."""
    args.out_prefix = args.out_prefix or Path("data/prosqa" if args.shape == "graph" else "data/prosqa_small")
    args.hops = args.hops or [2, 3]
    args.train_hops = args.train_hops or args.hops
    args.branches = args.branches or 0
    args.concepts, args.names = CONCEPTS[: args.concepts], NAMES[: args.names]
    return args


def generate(args: argparse.Namespace) -> dict[str, list[Record]]:
    """All splits; train is drawn last, without the questions of the other two."""
    splits: dict[str, list[Record]] = {}
    exclude: set[str] = set()
    for split in ("valid", "test", "train"):
        count = getattr(args, split)
        if args.shape == "chains":
            hops = args.train_hops if split == "train" else args.hops
            records = chain_records(count, args.seed, split, hops, args.branches, args.concepts, args.names, exclude)
        else:
            records = prosqa_records(count, args.seed, split, exclude)
        exclude |= {record["question"] for record in records}
        splits[split] = records
    return {split: splits[split] for split in SPLITS if splits[split]}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        prepare_directory(args.out_prefix.parent)
        splits = generate(args)
        for split, records in splits.items():
            write_records(args.out_prefix.with_name(f"{args.out_prefix.name}_{split}.json"), records)
    except OSError as error:
        exit_with(PROGRAM, f"cannot write to {args.out_prefix.parent}: {error.strerror}")
    except ValueError as error:
        exit_with(PROGRAM, str(error))
    columns = {split: statistics(records) for split, records in splits.items()}
    print_table(columns | (PUBLISHED if args.shape == "graph" else {}))


if __name__ == "__main__":
    main()
