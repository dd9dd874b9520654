"""GSM8K and GSM8K-Aug: lines to records, the command lines, and the download script against a server of its own."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PUBLISHED, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset import load_records
from preprocessing import gsm8k, gsm_icot

LINE = "How many clips?||<<48/2=24>> <<48+24=72>> #### 72"
RECORD = {"question": "How many clips?", "answer": "72", "steps": ["<<48/2=24>>", "<<48+24=72>>"]}
PROBLEM = {
    "question": "How many clips?",
    "answer": "In May 48/2 = <<48/2=24>>24 clips.\n\nAltogether <<48+24=72>>72.\n#### 1,072",
}
SCRIPTS = {"gsm_icot.py": gsm_icot, "gsm8k.py": gsm8k}


def run(script, *arguments):
    script.main([str(argument) for argument in arguments])


def error_of(script, capsys, *arguments) -> str:
    """The one line on standard error with which the call ends, exit code 2."""
    with pytest.raises(SystemExit) as end:
        run(script, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


# GSM8K-Aug

ANY_SPEED = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
EQUATION = st.text("0123456789+-*/=(). x", min_size=1, max_size=12).map(lambda body: f"<<{body}>>")
TEXT = st.text(min_size=1, max_size=20).map(str.strip).filter(lambda text: text and "\n" not in text)
ANSWER = TEXT.filter(lambda text: "||" not in text and "####" not in text)
QUESTION = TEXT.filter(lambda text: not text.endswith("|"))


@ANY_SPEED
@given(QUESTION, st.lists(EQUATION), ANSWER)
def test_a_line_comes_back_as_it_was(question, steps, answer):
    record = gsm_icot.parse_line(f"{question}||{' '.join(steps)} #### {answer}")
    assert record == {"question": question, "answer": answer, "steps": steps}


@pytest.mark.parametrize(
    ("rationale", "steps"),
    [
        ("", []),
        ("   ", []),
        ("<<1+1=2>>", ["<<1+1=2>>"]),
        ("<<1+1=2>>  <<2+2=4>><<4+4=8>> ", ["<<1+1=2>>", "<<2+2=4>>", "<<4+4=8>>"]),
        ("<<5 * 2 = 10>> <<10 / 2 = 5>>", ["<<5 * 2 = 10>>", "<<10 / 2 = 5>>"]),
        ("so <<1+1=2>> then", ["so <<1+1=2>> then"]),
    ],
)
def test_steps_are_cut_between_the_equations_only(rationale, steps):
    assert gsm_icot.parse_line(f"q||{rationale}#### 5,000") == {"question": "q", "answer": "5,000", "steps": steps}


def test_a_question_may_contain_the_separators():
    assert gsm_icot.parse_line("Is |x||y| #### odd?||<<1=1>> #### 1")["question"] == "Is |x||y| #### odd?"


def test_a_text_becomes_a_data_set_that_loads(tmp_path, capsys):
    text = tmp_path / "in.txt"
    # Line ends of another system, a byte order mark, and a character at which splitlines would cut.
    text.write_bytes("\ufeffa\u2028b||<<1=1>> #### 1\r\nc|| #### 2\r\n\r\n".encode())
    run(gsm_icot, text, tmp_path / "new" / "out.json")
    assert load_records(tmp_path / "new" / "out.json") == [
        {"question": "a\u2028b", "answer": "1", "steps": ["<<1=1>>"]},
        {"question": "c", "answer": "2", "steps": []},
    ]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["out"], ["records", "2"], ["0", "steps", "1"], ["1", "steps", "1"], ["mean", "steps", "0.50"]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"no bar #### 1", "line 2: expected question||steps #### answer"),
        (b"q||<<1=1>> 1", "line 2: expected question||steps #### answer"),
        (b"  ||<<1=1>> #### 1", "line 2: expected question||steps #### answer"),
        (b"q||<<1=1>> ####  ", "line 2: expected question||steps #### answer"),
        (b"q\xff||<<1=1>> #### 1", "line 2: cannot be read: not UTF-8 (byte 0xff)"),
        (b"", "line 2: expected question||steps #### answer"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(bad, message, tmp_path, capsys):
    text = tmp_path / "in.txt"
    text.write_bytes(b"\n".join([LINE.encode(), bad, LINE.encode()]))
    assert f"{text}: {message}" in error_of(gsm_icot, capsys, text, tmp_path / "new" / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_bad_files_end_with_one_line(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "good.txt").write_text(LINE)
    out = tmp_path / "out.json"
    assert "no such file" in error_of(gsm_icot, capsys, tmp_path / "missing.txt", out)
    assert "not a regular file" in error_of(gsm_icot, capsys, tmp_path, out)
    assert "nothing in it; expected at least one line" in error_of(gsm_icot, capsys, tmp_path / "empty.txt", out)
    assert "cannot be written" in error_of(gsm_icot, capsys, tmp_path / "good.txt", tmp_path / "empty.txt" / "out.json")
    assert "required: OUT.json" in error_of(gsm_icot, capsys, tmp_path / "good.txt")
    assert not out.exists()


@pytest.mark.published_data("gsm_icot_valid.txt")
def test_the_published_valid_file(tmp_path):
    run(gsm_icot, PUBLISHED / "gsm_icot_valid.txt", tmp_path / "out.json")
    records = load_records(tmp_path / "out.json")
    assert len(records) == 500
    assert sum(record["steps"] == [] for record in records) == 6
    assert all(re.fullmatch(r"<<[^<> ]+=[^<> ]+>>", step) for record in records for step in record["steps"])
    assert [record["answer"] for record in records if "," in record["answer"]] == ["5,000", "30,000", "27,200", "3,380"]


# GSM8K


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(count: int) -> list[dict[str, str]]:
    """Problems of which every fourth has no annotation."""
    return [
        {"question": f"{i}?", "answer": f"It is {'' if i % 4 == 3 else f'<<{i}={i}>>'}{i}.\n#### {i}"} for i in range(count)
    ]


def test_both_kinds_of_steps():
    problem = gsm8k.parse_row(PROBLEM)
    assert gsm8k.to_record(problem, "equations") == {**RECORD, "answer": "1072"}
    lines = ["In May 48/2 = 24 clips.", "Altogether 72."]
    assert gsm8k.to_record(problem, "sentences") == {"question": "How many clips?", "answer": "1072", "steps": lines}


PLAIN = st.text("abc $=.<>48", max_size=8).filter(lambda text: "<<" not in text and ">>" not in text)


@ANY_SPEED
@given(st.lists(st.tuples(PLAIN, EQUATION, PLAIN), max_size=4))
def test_equations_and_sentences_together_are_the_whole_rationale(parts):
    # A "<" or ">" beside an annotation would belong to it by its looks alone.
    parts = [(before.rstrip("<"), equation, after.lstrip(">")) for before, equation, after in parts]
    rationale = "\n".join("".join(part) for part in parts)
    assert gsm8k.equations(rationale) == [equation for _, equation, _ in parts]
    lines = [(before + after).strip() for before, _, after in parts]
    assert gsm8k.sentences(rationale) == [line for line in lines if line]


def test_valid_is_taken_out_of_train(tmp_path, capsys):
    train, test = write_rows(tmp_path / "a.jsonl", numbered(40)), write_rows(tmp_path / "b.jsonl", numbered(5))
    run(gsm8k, "--train", train, "--test", test, "--valid", 8, "--out-prefix", tmp_path / "out" / "g")
    splits = {split: load_records(tmp_path / "out" / f"g_{split}.json") for split in ("train", "valid", "test")}
    numbers = {split: [int(record["answer"]) for record in records] for split, records in splits.items()}
    assert sorted(numbers["train"] + numbers["valid"]) == list(range(40))
    assert numbers["valid"] == sorted(random.Random(0).sample(range(40), 8)) == [2, 16, 19, 24, 25, 26, 31, 32]
    assert numbers["test"] == list(range(5))
    assert all(bool(record["steps"]) == (int(record["answer"]) % 4 != 3) for record in splits["train"])
    assert re.search(r"no annotation, kept +8 +2 +1\n", capsys.readouterr().out)


def test_the_other_options_leave_the_draw_as_it_is(tmp_path, capsys):
    train = write_rows(tmp_path / "a.jsonl", numbered(40))
    options = ("--train", train, "--valid", 8, "--out-prefix", tmp_path / "g", "--steps", "sentences")
    run(gsm8k, *options, "--without-annotation", "drop")
    assert [int(r["answer"]) for r in load_records(tmp_path / "g_valid.json")] == [2, 16, 24, 25, 26, 32]
    assert [r["steps"] for r in load_records(tmp_path / "g_train.json")][:2] == [["It is 0."], ["It is 1."]]
    assert re.search(r"no annotation, dropped +8 +2\n", capsys.readouterr().out)
    run(gsm8k, *options, "--seed", 1)
    assert [int(r["answer"]) for r in load_records(tmp_path / "g_valid.json")] != [2, 16, 19, 24, 25, 26, 31, 32]


def test_no_valid_file_if_none_is_wanted(tmp_path):
    run(gsm8k, "--train", write_rows(tmp_path / "a.jsonl", numbered(4)), "--valid", 0, "--out-prefix", tmp_path / "g")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "g_train.json"]
    assert len(load_records(tmp_path / "g_train.json")) == 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "row 2: expected an object"),
        ('{"question": "q"}', "row 2: field 'answer' is missing, blank or no string"),
        ('{"question": 3, "answer": "#### 1"}', "row 2: field 'question' is missing, blank or no string"),
        ('{"question": " ", "answer": "#### 1"}', "row 2: field 'question' is missing, blank or no string"),
        ('{"question": "q", "answer": "It is 1."}', "row 2: field 'answer': expected '####'"),
        ('{"question": "q", "answer": "It is 1.\\n#### "}', "row 2: field 'answer': expected '####'"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(bad, message, tmp_path, capsys):
    good = json.dumps(PROBLEM)
    (tmp_path / "a.jsonl").write_text("\n".join([good, bad, good]))
    error = error_of(gsm8k, capsys, "--train", tmp_path / "a.jsonl", "--valid", 1, "--out-prefix", tmp_path / "new" / "g")
    assert f"{tmp_path / 'a.jsonl'}: {message}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --train and --test (or one of them), or else --hub"),
        (["--hub", "--train", "TRAIN"], "give --train and --test (or one of them), or else --hub"),
        (["--train", "TRAIN", "--valid", "-1"], "argument --valid: must be at least 0, is -1"),
        (["--train", "TRAIN", "--valid", "x"], "argument --valid: must be a whole number, is x"),
        (["--train", "TRAIN", "--valid", "4"], "--valid 4 would leave nothing of the 4 training questions"),
        (["--train", "TRAIN"], "--valid 500 would leave nothing of the 4 training questions"),
        (["--train", "TRAIN", "--steps", "words"], "invalid choice: 'words'"),
        (["--train", "no/such/file"], "no/such/file: no such file"),
    ],
)
def test_bad_options_end_with_one_line(arguments, message, tmp_path, capsys):
    train = write_rows(tmp_path / "a.jsonl", numbered(4))
    arguments = [str(train) if argument == "TRAIN" else argument for argument in arguments]
    assert message in error_of(gsm8k, capsys, "--out-prefix", tmp_path / "new" / "g", *arguments)
    assert not (tmp_path / "new").exists()


def test_the_hub(tmp_path, capsys, monkeypatch):
    import datasets

    asked = []

    def load(*names):
        asked.append(names)
        return {"train": numbered(8), "test": numbered(3)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    run(gsm8k, "--hub", "--valid", 2, "--out-prefix", tmp_path / "g")
    assert asked == [("openai/gsm8k", "main")]
    assert [len(load_records(tmp_path / f"g_{split}.json")) for split in ("train", "valid", "test")] == [6, 2, 3]
    capsys.readouterr()

    def refuse(*names):
        raise ConnectionError("no network\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    error = error_of(gsm8k, capsys, "--hub", "--out-prefix", tmp_path / "new" / "g")
    assert "cannot load openai/gsm8k: no network (offline); files on disk can be given with --train and --test" in error


@pytest.mark.published_data("gsm8k_train.jsonl", "gsm8k_test.jsonl")
def test_the_published_files(tmp_path):
    files = ("--train", PUBLISHED / "gsm8k_train.jsonl", "--test", PUBLISHED / "gsm8k_test.jsonl")
    run(gsm8k, *files, "--out-prefix", tmp_path / "g", "--valid", 0)
    splits = {split: load_records(tmp_path / f"g_{split}.json") for split in ("train", "test")}
    assert {split: len(records) for split, records in splits.items()} == {"train": 7473, "test": 1319}
    assert {s: sum(not r["steps"] for r in records) for s, records in splits.items()} == {"train": 95, "test": 18}
    assert all(re.fullmatch(r"-?[0-9.]+", record["answer"]) for records in splits.values() for record in records)


# The download

TEXTS = {
    split: "".join(f"{split} {i}?||<<{i}={i}>> #### {i}\n" for i in range(400)).encode() for split in ("valid", "test", "train")
}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 87805358\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `ranges`: knows byte ranges; `cut`: closes the connection after so many bytes of a body."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/{split}.txt": text for split, text in TEXTS.items()}
        self.ranges, self.cut = True, 10**9
        self.sent: list[tuple[str, int]] = []  # path, first byte


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        asked = self.headers.get("Range") if self.server.ranges else None
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked and first >= len(body):
            return self.send_error(416)
        self.server.sent.append((self.path, first))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body) - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[first : first + self.server.cut])
        return None

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def facts_of(split: str) -> str:
    """A row of the script's table; as in the published one, size and hash of test are not known."""
    text = TEXTS[split]
    known = "- -" if split == "test" else f"{len(text)} {hashlib.sha256(text).hexdigest()}"
    return f"{split} 400 {known}"


def download(server: Server, directory: Path, url: str | None = None) -> subprocess.CompletedProcess[str]:
    url = url or f"http://127.0.0.1:{server.server_port}"
    environment = {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        "GSM_RAW_URL": url,
        "GSM_MEDIA_URL": url,
        "GSM_FACTS": "\n".join(facts_of(split) for split in TEXTS),
        "PYTHON": sys.executable,
    }
    command = ["bash", ROOT / "preprocessing" / "gsm_icot.bash", directory]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("gsm_icot.bash: error: ")
    return done.stderr


def assert_complete(directory: Path) -> None:
    names = {f"gsm_{split}.{ending}" for split in TEXTS for ending in ("txt", "json")}
    assert {path.name for path in directory.iterdir()} == names
    for split, text in TEXTS.items():
        assert (directory / f"gsm_{split}.txt").read_bytes() == text
        assert len(load_records(directory / f"gsm_{split}.json")) == 400


def test_a_download_and_a_second_one_that_fetches_nothing(server, tmp_path):
    done = download(server, tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    assert_complete(tmp_path / "new")
    server.sent.clear()
    assert download(server, tmp_path / "new").returncode == 0
    assert server.sent == []
    (tmp_path / "new" / "gsm_valid.txt").write_bytes(TEXTS["valid"][:-9])
    assert download(server, tmp_path / "new").returncode == 0
    assert server.sent == [("/valid.txt", 0)]
    assert_complete(tmp_path / "new")


def test_files_beside_it_serve_too(server, tmp_path):
    for split, text in TEXTS.items():
        (tmp_path / f"{split}.txt").write_bytes(text)
    assert download(server, tmp_path / "new", tmp_path.as_uri()).returncode == 0
    assert_complete(tmp_path / "new")


@pytest.mark.parametrize(
    ("split", "body", "message"),
    [
        ("train", POINTER, "a Git LFS pointer instead of the data"),
        ("test", PAGE, "an HTML page instead of the data"),
        ("valid", TEXTS["valid"][:-20], f"{len(TEXTS['valid']) - 20} bytes instead of {len(TEXTS['valid'])}"),
        ("test", TEXTS["test"][:-20], "399 lines instead of 400"),
        ("train", TEXTS["train"].replace(b"train 7?", b"train 8?"), f"its sha256 is not {facts_of('train').split()[-1]}"),
        ("test", b"", "0 lines instead of 400"),
    ],
)
def test_a_wrong_file_is_refused_named_and_not_kept(server, tmp_path, split, body, message):
    server.files[f"/{split}.txt"] = body
    error = refusal(download(server, tmp_path))
    assert f"/{split}.txt gave {message}" in error or (not body and "/test.txt: nothing in it" in error)
    assert not list(tmp_path.glob(f"gsm_{split}*"))


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.cut = 1000
    error = refusal(download(server, tmp_path))
    assert "valid.txt" in error
    assert "run this again, it goes on from what came" in error
    assert [path.name for path in tmp_path.iterdir()] == ["gsm_valid.txt.part"]
    server.cut = 10**9
    server.sent.clear()
    assert download(server, tmp_path).returncode == 0
    assert server.sent == [("/valid.txt", 1000), ("/test.txt", 0), ("/train.txt", 0)]
    assert_complete(tmp_path)


def test_a_server_without_byte_ranges_starts_over(server, tmp_path):
    (tmp_path / "gsm_valid.txt.part").write_bytes(TEXTS["valid"][:1000])
    server.ranges = False
    assert download(server, tmp_path).returncode == 0
    assert_complete(tmp_path)


def test_a_complete_part_needs_no_request_and_too_long_a_part_starts_over(server, tmp_path):
    (tmp_path / "gsm_valid.txt.part").write_bytes(TEXTS["valid"])
    (tmp_path / "gsm_test.txt.part").write_bytes(TEXTS["test"] + b"more\n")
    assert download(server, tmp_path).returncode == 0
    assert server.sent == [("/test.txt", 0), ("/train.txt", 0)]
    assert_complete(tmp_path)


def test_an_error_of_the_server_keeps_the_part(server, tmp_path):
    (tmp_path / "gsm_valid.txt.part").write_bytes(TEXTS["valid"][:1000])
    del server.files["/valid.txt"]
    error = refusal(download(server, tmp_path))
    assert "/valid.txt: curl: (22)" in error
    assert "404" in error
    assert (tmp_path / "gsm_valid.txt.part").stat().st_size == 1000


def test_the_script_refuses_a_directory_it_cannot_make(server, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"cannot write to {tmp_path / 'file' / 'below'}" in refusal(download(server, tmp_path / "file" / "below"))
    assert "expected at most one argument" in refusal(download(server, Path("--help")))


def test_the_table_of_the_script_is_the_one_of_the_readme():
    script = (ROOT / "preprocessing" / "gsm_icot.bash").read_text(encoding="utf-8")
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    hashes = re.findall(r"\b[0-9a-f]{64}\b", script)
    assert len(hashes) == 2
    assert all(known in readme for known in hashes)


def test_the_configurations_use_the_names_that_the_script_writes():
    paths = set()
    for path in (ROOT / "args").glob("gsm_*.yaml"):
        paths |= set(re.findall(r"^(?:train|val)_path: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert paths == {f"data/gsm_{split}.json" for split in TEXTS}
