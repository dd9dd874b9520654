"""ProsQA generation: the questions are answerable as stated, repeat from their seed, and match the published statistics."""

import itertools
import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from preprocessing import prosqa

ROOT = Path(__file__).parents[1]
OFFICIAL = ROOT.parent / "shared" / "data" / "prosqa_official_valid.json"


@pytest.fixture(scope="module")
def graphs() -> list[prosqa.Record]:
    return prosqa.prosqa_records(400, seed=0, split="test")


@pytest.fixture(scope="module")
def chains() -> list[prosqa.Record]:
    return prosqa.chain_records(300, seed=0, split="test", hops=(1, 2, 4), branches=3)


@pytest.fixture(params=["graphs", "chains"])
def records(request: pytest.FixtureRequest) -> list[prosqa.Record]:
    return request.getfixturevalue(request.param)


def run(*arguments: object) -> None:
    prosqa.main([str(argument) for argument in arguments])


def test_answer_is_reachable_and_the_other_option_is_not(records):
    for record in records:
        graph = nx.DiGraph(record["edges"])
        assert nx.is_directed_acyclic_graph(graph)
        assert sorted(graph) == list(range(len(record["idx_to_symbol"])))
        assert nx.has_path(graph, record["root"], record["target"])
        assert not nx.has_path(graph, record["root"], record["neg_target"])
        assert nx.has_path(graph, 1 - record["root"], record["neg_target"])
        assert graph.out_degree(record["target"]) == graph.out_degree(record["neg_target"]) == 0


def test_steps_are_a_shortest_path_along_edges(records):
    for record in records:
        graph, symbols = nx.DiGraph(record["edges"]), record["idx_to_symbol"]
        words = [step.removesuffix(".").removeprefix("Every ").split(" is a ") for step in record["steps"]]
        path = [symbols.index(words[0][0])] + [symbols.index(word) for _, word in words]
        assert [symbols.index(word) for word, _ in words] == path[:-1]
        assert (path[0], path[-1]) == (record["root"], record["target"])
        assert all(graph.has_edge(*edge) for edge in itertools.pairwise(path))
        assert len(path) == len(nx.shortest_path(graph, path[0], path[-1]))


def test_question_lists_every_edge_once_and_both_options(records):
    for record in records:
        symbols = record["idx_to_symbol"]
        text, _, asked = record["question"].rpartition(" Is ")
        sentences = {f"{symbols[a]} is a {symbols[b]}." for a, b in record["edges"]}
        assert {s.removeprefix("Every ") for s in text.replace(". ", ".|").split("|")} == sentences
        assert text.count(".") == len(record["edges"])
        person, options = asked.removesuffix("?").split(" a ")
        assert person == symbols[record["root"]]
        assert set(options.split(" or ")) == {symbols[record["target"]], symbols[record["neg_target"]]}
        assert record["answer"] == f"{person} is a {symbols[record['target']]}."


def test_persons_are_the_nodes_without_parents(records):
    for record in records:
        children = {child for _, child in record["edges"]}
        for node, symbol in enumerate(record["idx_to_symbol"]):
            assert symbol in (prosqa.CONCEPTS if node in children else prosqa.NAMES)
        assert len(set(record["idx_to_symbol"])) == len(record["idx_to_symbol"])


def test_neither_order_nor_node_number_gives_the_answer_away(records):
    def first(record):
        symbol = record["idx_to_symbol"][record["target"]]
        return record["question"].rpartition(" Is ")[2].split(" ")[2] == symbol

    for share in (np.mean([first(r) for r in records]), np.mean([r["root"] for r in records])):
        assert 0.4 < share < 0.6


def test_the_same_seed_repeats_and_another_differs():
    draw = prosqa.prosqa_records
    assert draw(5, 3, "test") == draw(5, 3, "test")
    assert draw(8, 3, "test")[:5] == draw(5, 3, "test")
    assert draw(5, 3, "test") != draw(5, 4, "test")
    assert draw(5, 3, "test") != draw(5, 3, "valid")


def test_statistics_match_the_published_test_set(graphs):
    found, published = prosqa.statistics(graphs), prosqa.PUBLISHED["published test"]
    for key in ("nodes", "edges", "shortest path", "shortest paths"):
        assert found[key] == pytest.approx(published[key], rel=0.05), key
    for hops, count in published["hops"].items():
        assert found["hops"][hops] / len(graphs) == pytest.approx(count / 500, abs=0.06)
    assert found["depth shortcut"] == pytest.approx(0.902, abs=0.04)


def test_the_depth_shortcut_is_at_chance_on_chains(chains):
    assert {prosqa.depth_shortcut(record) for record in chains} == {0.5}


def test_chains_have_the_hops_and_branches_asked_for(chains):
    assert {len(record["steps"]) for record in chains} == {1, 2, 4}
    leaves = {len(record["edges"]) - 2 * len(record["steps"]) for record in chains}
    assert leaves == {0, 1, 2, 3}


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the published file is not here")
def test_the_depth_shortcut_on_the_published_valid_file():
    records = json.loads(OFFICIAL.read_text())
    assert np.mean([prosqa.depth_shortcut(r) for r in records]) == pytest.approx(0.913, abs=0.0005)
    symbols = {symbol for record in records for symbol in record["idx_to_symbol"]}
    assert symbols == {*prosqa.NAMES, *prosqa.CONCEPTS}


def test_no_question_stands_in_two_splits(tmp_path):
    # 48 different questions in all: without the exclusion nearly every draw would stand in two splits.
    vocabulary = ("--hops", 1, "--concepts", 2, "--names", 3)
    sizes = ("--train", 24, "--valid", 12, "--test", 12)
    run("--shape", "chains", "--out-prefix", tmp_path / "small", *vocabulary, *sizes)
    files = [json.loads((tmp_path / f"small_{split}.json").read_text()) for split in prosqa.SPLITS]
    assert [len(records) for records in files] == [24, 12, 12]
    assert len({record["question"] for records in files for record in records}) == 48
    assert not list(tmp_path.glob(".*"))


def test_training_may_have_other_hops_and_a_split_may_be_left_out(tmp_path):
    sizes = ("--train", 20, "--valid", 0, "--test", 20)
    run("--shape", "chains", "--out-prefix", tmp_path / "x", *sizes, "--hops", 3, "--train-hops", 1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_test.json", "x_train.json"]
    hops = {s: {len(r["steps"]) for r in json.loads((tmp_path / f"x_{s}.json").read_text())} for s in ("train", "test")}
    assert hops == {"train": {1, 2}, "test": {3}}


@pytest.mark.parametrize("split", prosqa.SPLITS)
def test_the_files_in_data_are_what_the_command_writes(split):
    path = ROOT / "data" / f"prosqa_{split}.json"
    if not path.exists():
        pytest.skip(f"{path.name} has not been made")
    with path.open(encoding="utf-8") as file:
        assert next(file) == "[\n"
        first = [json.loads(next(file).rstrip(",\n")) for _ in range(10)]
    assert first == prosqa.prosqa_records(10, seed=0, split=split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hops", "3"], "--hops needs --shape chains"),
        (["--shape", "chains", "--hops", "3", "20"], "need 40 concepts, 38 available"),
        (["--shape", "chains", "--concepts", "6", "--branches", "1"], "need 7 concepts, 6 available"),
        (["--shape", "chains", "--hops", "0"], "--hops must be at least 1, is 0"),
        (["--shape", "chains", "--names", "1"], "--names must be 2..17, is 1"),
        (["--train", "-1"], "--train must be at least 0, is -1"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (
            ["--shape", "chains", "--hops", "1", "--concepts", "2", "--names", "2"],
            "different questions found for",
        ),
    ],
)
def test_bad_options_end_with_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run("--out-prefix", tmp_path / "x", *arguments)
    error = [line for line in capsys.readouterr().err.splitlines() if "prosqa.py: error:" in line]
    assert end.value.code == 2
    assert len(error) == 1
    assert message in error[0]
    assert not list(tmp_path.iterdir())


def test_an_unwritable_directory_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        run("--out-prefix", tmp_path / "file" / "below" / "x", "--train", 1)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"prosqa.py: error: cannot write to {tmp_path}")
