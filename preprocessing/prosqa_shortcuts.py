"""Statistics of ProsQA files, and how far one gets with them without searching."""

from collections import Counter
from collections.abc import Sequence
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
    graph, root = nx.DiGraph(record["edges"]), record["root"]
    above = nx.ancestors(graph, node)
    upward = graph.subgraph(above | {node})
    paths: dict[int, int] = {}
    for one in nx.topological_sort(upward):
        paths[one] = sum(paths[parent] for parent in upward.predecessors(one)) or 1
    words = record["question"].replace(".", " ").replace("?", " ").split()
    name = record["idx_to_symbol"][node]
    distances = nx.single_source_shortest_path_length(graph.to_undirected(as_view=True), root)
    children = [graph.out_degree(one) for one in graph if graph.in_degree(one) == 0]
    return {
        "depth": farthest_ancestor(graph, node),
        "longest path": nx.dag_longest_path_length(upward),
        "paths": paths[node],
        "ancestors": len(above),
        "persons above": sum(graph.in_degree(one) == 0 for one in above),
        "parents": graph.in_degree(node),
        "siblings": sum(graph.out_degree(parent) for parent in graph.predecessors(node)),
        "mentioned first": -words.index(name),
        "first option": words[::-1].index(name),  # counted from the end of the question, where the options stand
        "distance without direction": -distances.get(node, len(graph)),
        "children and ancestors": len(above) * (1 if graph.out_degree(root) == max(children) else -1),
    }


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
