"""Statistics of ProsQA files, and how far one gets with them without searching."""

import itertools
from collections import Counter
from collections.abc import Sequence
from graphlib import TopologicalSorter
from typing import Any

import networkx as nx
import numpy as np

from preprocessing.common import Record, print_table
from preprocessing.prosqa_graphs import HOP_COUNTS, farthest_ancestor

MEANS = ("nodes", "edges", "shortest path", "shortest paths")
PUBLISHED: dict[str, dict[str, Any]] = {
    "published test": {
        "records": 500,
        "nodes": 22.8,
        "edges": 35.8,
        "shortest path": 3.78,
        "shortest paths": 1.57,
        "hops": HOP_COUNTS,
        "shortcuts": {"depth": 0.902},
    }
}


def features(record: Record, node: int) -> dict[str, int]:
    """What one can count of an option. All but the last two leave out the person asked about."""
    edges, root = record["edges"], record["root"]
    parents: dict[int, list[int]] = {one: [] for one in itertools.chain(*edges)}
    children: dict[int, list[int]] = {one: [] for one in parents}
    for parent, child in edges:
        parents[child].append(parent)
        children[parent].append(child)
    above = distances(parents, node)
    longest: dict[int, int] = {}
    paths: dict[int, int] = {}
    for one in TopologicalSorter({one: parents[one] for one in above}).static_order():
        longest[one] = max((1 + longest[parent] for parent in parents[one]), default=0)
        paths[one] = sum(paths[parent] for parent in parents[one]) or 1
    words = record["question"].replace(".", " ").replace("?", " ").split()
    name = record["idx_to_symbol"][node]
    either_way = distances({one: parents[one] + children[one] for one in parents}, root)
    most = max(len(children[one]) for one in parents if not parents[one])
    return {
        "depth": max(above.values()),
        "longest path": longest[node],
        "paths": paths[node],
        "ancestors": len(above) - 1,
        "persons above": sum(not parents[one] for one in above if one != node),
        "parents": len(parents[node]),
        "siblings": sum(len(children[parent]) for parent in parents[node]),
        "mentioned first": -words.index(name),
        "first option": words[::-1].index(name),  # counted from the end of the question, where the options stand
        "distance without direction": -either_way.get(node, len(parents)),
        "children and ancestors": (len(above) - 1) * (1 if len(children[root]) == most else -1),
    }


def distances(neighbours: dict[int, list[int]], start: int) -> dict[int, int]:
    """The shortest distance of every node that can be reached."""
    found = {start: 0}
    reached = [start]
    for node in reached:  # grows meanwhile
        for other in neighbours[node]:
            if other not in found:
                found[other] = found[node] + 1
                reached.append(other)
    return found


def shortcuts(record: Record) -> dict[str, float]:
    """For each shortcut 1, 1/2 (a tie) or 0: does the option that has more of it answer the question?

    All but the last two ignore the person asked about, so what they score above (or below) 1/2 over a data set needs no
    search. "depth" is the distance to the farthest ancestor; "children and ancestors" takes the option with more
    ancestors if no person has more children than the one asked about, else the other.
    """
    right, wrong = (features(record, node) for node in (record["target"], record["neg_target"]))
    return {name: (1 + int(np.sign(right[name] - wrong[name]))) / 2 for name in right}


def depth_shortcut(record: Record) -> float:
    """The shortcut that is known to work on ProsQA, alone."""
    graph = nx.DiGraph(record["edges"])
    difference = farthest_ancestor(graph, record["target"]) - farthest_ancestor(graph, record["neg_target"])
    return (1 + int(np.sign(difference))) / 2


def statistics(records: Sequence[Record]) -> dict[str, Any]:
    """Means over `records` (the paper's table of ProsQA statistics), the counts of hops and the shortcuts' accuracies."""
    paths = [list(nx.all_shortest_paths(nx.DiGraph(r["edges"]), r["root"], r["target"])) for r in records]
    hops = [len(found[0]) - 1 for found in paths]
    scores = [shortcuts(record) for record in records]
    return {
        "records": len(records),
        "nodes": float(np.mean([len(r["idx_to_symbol"]) for r in records])),
        "edges": float(np.mean([len(r["edges"]) for r in records])),
        "shortest path": float(np.mean(hops)),
        "shortest paths": float(np.mean([len(found) for found in paths])),
        "hops": dict(sorted(Counter(hops).items())),
        "shortcuts": {name: float(np.mean([score[name] for score in scores])) for name in scores[0]},
    }


def print_statistics(columns: dict[str, dict[str, Any]]) -> None:
    """Statistics side by side, one column per data set; hop counts as shares, shortcuts as accuracies."""
    rows = {"records": [f"{column['records']:,}" for column in columns.values()]}
    rows |= {row: [f"{column[row]:.2f}" for column in columns.values()] for row in MEANS}
    for hop in sorted({hop for column in columns.values() for hop in column["hops"]}):
        counts = [(column["hops"].get(hop, 0), column["records"]) for column in columns.values()]
        rows[f"{hop} hops"] = [f"{count:,} ({count / records:.1%})" for count, records in counts]
    rows["shortcuts"] = []
    for name in dict.fromkeys(name for column in columns.values() for name in column["shortcuts"]):
        scores = [column["shortcuts"].get(name) for column in columns.values()]
        rows[f"  {name}"] = ["" if score is None else f"{score:.1%}" for score in scores]
    print_table(columns, rows)
