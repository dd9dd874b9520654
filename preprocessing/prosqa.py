"""ProsQA questions (Coconut, arXiv 2412.06769, appendix on the construction of ProsQA), made from a seed.

`python preprocessing/prosqa.py` writes data/prosqa_{train,valid,test}.json: questions over random acyclic graphs.
`--depth-matched`: both options are equally deep, and each graph is asked about twice (data/prosqa_matched_test.json).
`--symbolic`: 40 symbols in place of sentences, 3 and 4 hops (data/prosqa_symbolic_{train,valid,test}.json).
`--shape chains`: the small questions of the quick start, two chains of one length.
`--shape 7hop` (8hop, dag, dense): graphs unlike those of training (data/prosqa_7hop_test.json).
`--shape search --symbolic`: small graphs to train on, in which no shortcut works (data/prosqa_symbolic_search_train.json, ...).
`--shape walk --symbolic`: chains without options, to learn first how to follow an edge (data/prosqa_symbolic_walk_train.json).
Each draw has its own generator, seeded with (seed, split, index), so a file is the same on every run.
"""

import argparse
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocessing.common import SPLITS, Record, prepare_directory, write_splits
from preprocessing.prosqa_graphs import Edge, Question, find_matched_questions, find_question
from preprocessing.prosqa_ood import SHAPES, ood_questions
from preprocessing.prosqa_shortcuts import PUBLISHED, print_statistics, statistics
from preprocessing.prosqa_symbolic import HOPS as SYMBOLIC_HOPS
from preprocessing.prosqa_symbolic import NODES, symbolic_record, walk_record
from systems.arguments import Parser, natural
from utils import UserError, entry_point

EXAMPLES = ("--symbolic", "--shape chains --train 5000 --valid 200 --test 200 --out-prefix data/mine")

# Records by default. The symbolic ones are the paper's; its valid and test are the published files' questions of 3 and 4 hops.
SIZES = {
    "prosqa": {"train": 17886, "valid": 300, "test": 500},
    "prosqa_symbolic": {"train": 14785, "valid": 257, "test": 419},
    "prosqa_matched": {"train": 0, "valid": 0, "test": 500},
    "prosqa_symbolic_matched": {"train": 0, "valid": 0, "test": 500},
    **{f"prosqa_{shape}": {"train": 0, "valid": 0, "test": 1000} for shape in SHAPES},
    "prosqa_symbolic_search": {"train": 100_000, "valid": 300, "test": 1000},
    "prosqa_symbolic_walk": {"train": 60_000, "valid": 300, "test": 0},
}

# The published data set's vocabulary: one tokenizer then serves the published files and these.
_NAMES = "Alex Bob Carol Davis Eva Fae Gabriel Jack Max Oliver Polly Rex Sally Sam Stella Tom Wren"
_CONCEPTS = (
    "bompus boompus brimpus chorpus dumpus felpus fompus gerpus gorpus grimpus gwompus hilpus impus jelpus jompus "
    "kerpus lempus lorpus numpus quimpus rempus rompus rorpus scrompus shumpus sterpus storpus terpus timpus "
    "tumpus vumpus worpus wumpus yerpus yimpus yumpus zhorpus zumpus"
)
NAMES, CONCEPTS = tuple(_NAMES.split()), tuple(_CONCEPTS.split())
STREAMS = {name: number for number, name in enumerate(["matched", *SHAPES, "walk"], start=1)}  # keep their graphs apart
MAX_DRAWS = 1000  # of one record, before the vocabulary is judged too small for so many different questions


def record_rng(seed: int, split: str, index: int, *stream: int) -> np.random.Generator:
    """Generator of one draw; it depends on nothing drawn for another index, split or `stream`."""
    return np.random.default_rng([seed, SPLITS.index(split), index, *stream])


def edge_sentence(symbols: Sequence[str], edge: Edge) -> str:
    """`Tom is a terpus.` for a person, `Every terpus is a brimpus.` for a concept."""
    parent, child = (symbols[node] for node in edge)
    return f"{parent} is a {child}." if parent in NAMES else f"Every {parent} is a {child}."


def word_record(symbols: list[str], path: Sequence[int], order: Sequence[Edge], options: Sequence[int]) -> Record:
    """The record of a question with this path whose edges and options are written in the order given."""
    person = symbols[path[0]]
    sentences = [edge_sentence(symbols, edge) for edge in order]
    return {
        "question": " ".join([*sentences, f"Is {person} a {symbols[options[0]]} or {symbols[options[1]]}?"]),
        "answer": f"{person} is a {symbols[path[-1]]}.",
        "steps": [edge_sentence(symbols, edge) for edge in itertools.pairwise(path)],
    }


def render_records(
    rng: np.random.Generator,
    symbols: list[str],
    questions: Sequence[Question],
    render: Callable[[list[str], Sequence[int], Sequence[Edge], Sequence[int]], Record] = word_record,
) -> list[Record]:
    """The records of questions over one graph; edges and options stand in one random order, the same in all of them."""
    edges, path, neg_target = questions[0]
    order = [edges[i] for i in rng.permutation(len(edges))]
    options = [path[-1], neg_target]
    if rng.random() < 0.5:
        options.reverse()
    return [
        {
            **render(symbols, question.path, order, options),
            "idx_to_symbol": symbols,
            "edges": [list(edge) for edge in edges],
            "root": question.path[0],
            "target": question.path[-1],
            "neg_target": question.neg_target,
        }
        for question in questions
    ]


def draw_words(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    """`count` different words in random order. UserError: there are fewer."""
    if count > len(words):
        raise UserError(f"{count} different names or concepts needed, {len(words)} available")
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
    UserError: fewer concepts or names than a question needs.
    """
    h = int(rng.choice(hops)) if len(hops) > 1 else hops[0]
    chains = [[side, *range(2 + side * h, 2 + (side + 1) * h)] for side in (0, 1)]
    edges = [edge for chain in chains for edge in itertools.pairwise(chain)]
    inner = chains[0][:-1] + chains[1][:-1]
    extra = int(rng.integers(branches + 1))
    edges += [(inner[i], 2 + 2 * h + leaf) for leaf, i in enumerate(rng.integers(len(inner), size=extra))]
    symbols = draw_words(rng, names, 2) + draw_words(rng, concepts, 2 * h + extra)
    side = int(rng.integers(2))
    return render_records(rng, symbols, [Question(edges, chains[side], chains[1 - side][-1])])[0]


def draw_records(
    draw: Callable[[np.random.Generator], list[Record]],
    count: int,
    seed: int,
    split: str,
    exclude: Collection[Hashable] = (),
    key: Callable[[Record], Hashable] = operator.itemgetter("question"),
    stream: Sequence[int] = (),
) -> list[Record]:
    """The records of `count` draws by `draw`, no question twice and none whose `key` is in `exclude`.

    UserError: so many different questions could not be found.
    """
    records: list[Record] = []
    taken: set[str] = set()
    for index in tqdm(range(count), desc=split, disable=None):
        rng = record_rng(seed, split, index, *stream)
        for _ in range(MAX_DRAWS):
            group = draw(rng)
            if not any(one["question"] in taken or (exclude and key(one) in exclude) for one in group):
                break
        else:
            raise UserError(f"only {index} different questions found for {split}, {count} asked for")
        taken.update(record["question"] for record in group)
        records += group
    return records


def chain_pair(record: Record) -> frozenset[tuple[str, ...]]:
    """The concepts of both chains, each from its end to its head; the persons, the branches and every order are left out."""
    parents = {child: parent for parent, child in record["edges"]}  # of chains: one each

    def concepts(node: int) -> Iterator[str]:
        while node in parents:
            yield record["idx_to_symbol"][node]
            node = parents[node]

    return frozenset(tuple(concepts(end)) for end in (record["target"], record["neg_target"]))


def chain_records(
    count: int,
    seed: int,
    split: str,
    hops: Sequence[int] = (2, 3),
    branches: int = 0,
    concepts: Sequence[str] = CONCEPTS,
    names: Sequence[str] = NAMES,
    exclude: Collection[Hashable] = (),
) -> list[Record]:
    """`count` different records by `chain_record`; `exclude`: pairs of chains (see chain_pair) that must not occur."""
    return draw_records(
        lambda rng: [chain_record(rng, hops, branches, concepts, names)], count, seed, split, exclude, chain_pair
    )


def draw_names(rng: np.random.Generator, edges: Sequence[Edge]) -> list[str]:
    """A person's name for each node without parents, a concept for the others."""
    others = sorted({child for _, child in edges})
    persons = [node for node in dict.fromkeys(itertools.chain(*edges)) if node not in others]
    words = dict(zip(persons, draw_words(rng, NAMES, len(persons)), strict=True))
    words |= zip(others, draw_words(rng, CONCEPTS, len(others)), strict=True)
    return [words[node] for node in range(len(words))]


def draw_group(
    rng: np.random.Generator, symbolic: bool = False, matched: bool = False, shape: str = "graph", training: bool = False
) -> list[Record]:
    """The record over a new graph; with `matched` and with another shape the two records (see find_matched_questions)."""
    if shape == "walk":
        return [walk_record(rng)]
    hops = {"hops": SYMBOLIC_HOPS} if symbolic else {}
    if shape in SHAPES:
        questions: Sequence[Question] = ood_questions(rng, shape, training)
    else:
        questions = find_matched_questions(rng, **hops) if matched else (find_question(rng, **hops),)
    edges = questions[0].edges
    if symbolic:
        symbols = draw_words(rng, NODES, 1 + max(itertools.chain(*edges)))
        return render_records(rng, symbols, questions, symbolic_record)
    return render_records(rng, draw_names(rng, edges), questions)


def prosqa_records(
    count: int,
    seed: int,
    split: str,
    exclude: Collection[Hashable] = (),
    symbolic: bool = False,
    matched: bool = False,
    shape: str = "graph",
) -> list[Record]:
    """`count` different records over random graphs; `exclude`: questions that must not occur.

    With `matched` or a shape of SHAPES, records 2i and 2i + 1 are over one graph, and `count` must be even.
    """
    draw = functools.partial(draw_group, symbolic=symbolic, matched=matched, shape=shape, training=split == "train")
    paired = matched or shape in SHAPES
    stream = (STREAMS["matched" if matched else shape],) if paired or shape == "walk" else ()
    return draw_records(draw, count // 2 if paired else count, seed, split, exclude, stream=stream)


def parse_arguments(given: list[str]) -> argparse.Namespace:
    """Command line, checked. UserError: a contradiction."""
    parser = Parser("python preprocessing/prosqa.py", __doc__, EXAMPLES)
    parser.add_argument(
        "--shape", choices=("graph", "chains", "walk", *SHAPES), default="graph", help="ProsQA, or other graphs"
    )
    parser.add_argument("--depth-matched", action="store_true", help="options of equal depth, each graph asked about twice")
    parser.add_argument("--symbolic", action="store_true", help="symbols in place of sentences, 3 and 4 hops")
    defaults = "default " + ", ".join(f"{name} {sizes}" for name, sizes in SIZES.items())
    parser.add_argument("--train", type=natural, metavar="N", help=f"records; 0 writes no such file ({defaults})")
    parser.add_argument("--valid", type=natural, metavar="N")
    parser.add_argument("--test", type=natural, metavar="N")
    parser.add_argument("--out-prefix", type=Path, help="files are PREFIX_train.json, ... (default data/NAME)")
    parser.add_argument("--seed", type=natural, default=0)
    lengths = range(1, len(CONCEPTS) // 2 + 1)
    parser.add_argument("--hops", type=int, nargs="+", choices=lengths, metavar="H", help="lengths of chains (default 2 3)")
    parser.add_argument("--train-hops", type=int, nargs="+", choices=lengths, metavar="H", help="those in train, if different")
    parser.add_argument("--branches", type=natural, metavar="N", help="chains: up to N further leaves (default 0)")
    parser.add_argument("--concepts", type=int, choices=range(2, len(CONCEPTS) + 1), metavar="K", help="use the first K only")
    parser.add_argument("--names", type=int, choices=range(2, len(NAMES) + 1), metavar="M", help="use the first M only")
    args = parser.parse_args(given)
    if problem := find_problem(args):
        parser.error(problem)
    args = fill_defaults(args)
    if not any(getattr(args, split) for split in SPLITS):
        parser.error("--train, --valid and --test are all 0: nothing to write")
    return args


def find_problem(args: argparse.Namespace) -> str | None:
    """What contradicts itself on the command line, or None."""
    only_chains = [key for key in ("hops", "train_hops", "branches", "concepts", "names") if getattr(args, key) is not None]
    if only_chains and args.shape != "chains":
        return f"--{only_chains[0].replace('_', '-')} needs --shape chains"
    if args.depth_matched and args.shape != "graph":
        return "--depth-matched needs --shape graph"
    if args.shape == "walk" and not args.symbolic:
        return "--shape walk needs --symbolic"
    if args.symbolic and args.shape == "chains":
        return "--symbolic needs graphs, not --shape chains"
    paired = "--depth-matched" if args.depth_matched else f"--shape {args.shape}" if args.shape in SHAPES else None
    for split in SPLITS:
        if paired and (size := getattr(args, split) or 0) % 2:
            return f"--{split} must be even with {paired} (two questions over each graph), is {size}"
    return None


def fill_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The values that depend on other options."""
    parts = {"small": args.shape == "chains", "symbolic": args.symbolic, "matched": args.depth_matched}
    parts[args.shape] = args.shape in (*SHAPES, "walk")
    name = "_".join(["prosqa", *(part for part, chosen in parts.items() if chosen)])
    args.out_prefix = args.out_prefix or Path("data", name)
    for split, size in SIZES.get(name, SIZES.get(f"prosqa_{args.shape}", SIZES["prosqa"])).items():
        if getattr(args, split) is None:
            setattr(args, split, size)
    args.hops = args.hops or [2, 3]
    args.train_hops = args.train_hops or args.hops
    args.branches = args.branches or 0
    args.concepts, args.names = CONCEPTS[: args.concepts], NAMES[: args.names]
    return args


def generate(args: argparse.Namespace) -> dict[str, list[Record]]:
    """All splits, each without the questions (of chains: without the pairs of chains) of those drawn before it."""
    splits: dict[str, list[Record]] = {}
    exclude: set[Hashable] = set()
    for split in ("test", "valid", "train"):
        count = getattr(args, split)
        if args.shape == "chains":
            hops = args.train_hops if split == "train" else args.hops
            records = chain_records(count, args.seed, split, hops, args.branches, args.concepts, args.names, exclude)
        else:
            records = prosqa_records(count, args.seed, split, exclude, args.symbolic, args.depth_matched, args.shape)
        exclude |= {chain_pair(record) if args.shape == "chains" else record["question"] for record in records}
        splits[split] = records
    return {split: splits[split] for split in SPLITS if splits[split]}


@entry_point
def main(given: list[str]) -> None:
    args = parse_arguments(given)
    prepare_directory(args.out_prefix.parent)
    splits = generate(args)
    write_splits(args.out_prefix, splits)
    if args.shape == "walk":
        return  # without options there are no shortcuts to count
    columns = {split: statistics(records) for split, records in splits.items()}
    print_statistics(columns | (PUBLISHED if args.shape != "chains" and not args.symbolic else {}))


if __name__ == "__main__":
    main()
