"""ProsQA as symbols, for training from scratch (Reasoning by Superposition, arXiv 2505.12514).

A question is its edges, each `source target <e>`, then `<q>` and the two options, then `<r>` and the node asked about:
`n4 n7 <e> n7 n2 <e> ... <q> n2 n9 <r> n4`. A step is the node that is reached, the answer is the last one.
"""

from collections.abc import Sequence

from preprocessing.common import Record
from preprocessing.prosqa_graphs import Edge, Question

# An edge's own token comes after its two nodes: a causal model can then gather the edge there.
EDGE, OPTIONS, ROOT = "<e>", "<q>", "<r>"
NODES = tuple(f"n{number}" for number in range(30))
HOPS = (3, 4)


def symbolic_record(symbols: list[str], question: Question, order: Sequence[Edge], options: Sequence[int]) -> Record:
    """The record of a question whose edges and options are written in the order given."""
    root, target = question.path[0], question.path[-1]
    written = [f"{symbols[parent]} {symbols[child]} {EDGE}" for parent, child in order]
    asked = [OPTIONS, *(symbols[option] for option in options), ROOT, symbols[root]]
    return {
        "question": " ".join([*written, *asked]),
        "answer": symbols[target],
        "steps": [symbols[node] for node in question.path[1:]],
    }
