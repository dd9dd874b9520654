"""Mutated configurations and data files: each runs, or ends with one line, exit code 2 and nothing half-written.

The mutations are drawn from the number of the case, so that a case that fails is the same case everywhere. They are not drawn
by hypothesis: most of them are about bytes and text that no strategy describes, and its shrinking would start hundreds of runs.
`python -m pytest tests/test_fuzz.py -k "configuration-17"` runs one case.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, chain_records
from transformers import LlamaConfig, LlamaForCausalLM

import evaluation
import run
import training
from config import RunConfig
from experiments.noise import sweep
from experiments.noise.settings import SweepConfig
from methods import METHODS
from systems import metrics, watchdog

CONFIGURATIONS, COMMAND_LINES, DATA_FILES, SWEEPS = 220, 90, 310, 60
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))  # number of the first case: others find more
STEPS = 3  # optimizer steps after which a run is stopped as by a signal
ROOM = 6 * 2**30  # bytes of address space that a case may take
LEFTOVERS = (".partial", ".removed", ".lock")


class Place(NamedTuple):
    """Where a case may write (root, and cwd inside it), and what it may read."""

    root: Path
    cwd: Path
    values: dict[str, str]  # the configuration before it is mutated, values as YAML writes them


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its weights and the words of the tests, for from_scratch and for only_eval."""
    directory = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "configs" / "llama_small" / name, directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    root = tmp_path / "root"
    cwd = root / "a" / "b"
    cwd.mkdir(parents=True)
    monkeypatch.chdir(cwd)
    (cwd / "loop").symlink_to("loop")
    (cwd / "data.json").write_text(json.dumps(chain_records(4)))
    values = {
        "name": "run",
        "save_path": "saved",
        "method": "coconut",
        "c_thought": "1",
        "max_latent_stage": "1",
        "num_epochs": "2",
        "lr": "1e-3",
        "batch_size_training": "2",
        "model_id": str(model),
        "from_scratch": "true",
        "train_path": "data.json",
        "val_path": "data.json",
        "max_new_tokens": "2",
        "num_workers": "0",
        "wandb": "disabled",
        "log_every": "1",
    }
    return Place(root, cwd, values)


@pytest.fixture(autouse=True)
def short_and_harmless(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs stop soon and as by a signal, start no wandb, no compiler and no watchdog, ask no hub; memory is limited."""
    step = training.Trainer._optimizer_step

    def stopping(self: training.Trainer, batches: Any) -> Any:
        self.stop.requested = self.state.global_step + 1 >= STEPS
        return step(self, batches)

    wandb = SimpleNamespace(id="x", log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setattr(training.Trainer, "_optimizer_step", stopping)
    monkeypatch.setattr(metrics, "start_wandb", lambda *_, **__: wandb)
    monkeypatch.setattr(metrics.Reporter, "first_batch", lambda *_: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM if used else limits[0], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


# --- what must hold of every case ---


def start(main: Callable[[], None], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a program with these arguments; any exception but SystemExit is the failure of the test."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def tree(root: Path) -> dict[str, bytes]:
    """Every file below, with its content, and every directory."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
        for path in sorted(root.rglob("*"))
        if not path.is_symlink()
    }


def unknown_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check(
    main: Callable[[], None], arguments: list[str], place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> str | None:
    """The error of a refused start, None after a run. Fails if it was neither refused in one line nor ran to a tidy end."""
    begun: list[int] = []
    for owner, name in ((training.Trainer, "fit"), (evaluation.Evaluator, "evaluate"), (sweep, "open_progress")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, original=original: (begun.append(1), original(*given))[1])
    before = tree(place.root)
    code = start(main, arguments, monkeypatch)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    after = tree(place.root)
    assert code in (0, 2)
    assert len(errors) == (code == 2), errors
    assert all(len(line) < 2100 and line.isprintable() for line in errors)
    if not begun:
        assert after == before
        assert code == 2
    assert not [name for name in after if name.endswith(LEFTOVERS)]
    assert not [name for name in after if name.endswith("ran")], "code of the configuration was run"
    for name, content in after.items():
        if name.endswith(".jsonl"):
            for line in content.decode().split("\n")[:-1]:
                json.loads(line, parse_constant=unknown_constant)
    if stats := os.environ.get("FUZZ_STATS"):  # a file for a line a case: what came of it
        with Path(stats).open("a") as file:
            file.write(f"{code} {bool(begun)} {(errors or ['-'])[0][:230]}\n")
    return None if begun else errors[0]


# --- what was found: each of these once ended with a stack trace, hung, or left something behind ---

RECORD = '{"question": "Is Tom a lempus?", "answer": "Tom.", "steps": ["Tom."]%s}'
LORA = ["from_scratch=false", "lora_r=2"]
FOUND = (
    (["model_id=" + "x" * 5000], "cannot be used"),
    (["x" * 5000 + ".yaml"], "cannot be"),
    (["lr=!!bool x"], "command line: 'lr': not valid YAML"),
    (["lr=" + "[" * 5000], "not valid YAML: maximum recursion depth"),
    (["lr={a: 1, a: 2}"], "the key 'a' is given twice"),
    (["seed=0x" + "f" * 5000], "write the number in plain decimal digits"),
    ([f"seed={2**64}"], "seed: input should be less than or equal to"),
    (["num_epochs=1000000000"], "num_epochs: input should be less than or equal to"),
    (["method=no_thoughts", "max_latent_stage=1000000000"], "max_latent_stage: input should be less than or equal to"),
    ([f"examples_per_epoch={10**15}"], "examples_per_epoch: input should be less than or equal to"),
    (["num_workers=1000000"], "num_workers: input should be less than or equal to"),
    (["method=icot", "icot_tokens_per_epoch=1e308"], "icot_tokens_per_epoch: input should be less than or equal to"),
    (["project=a/b", "wandb=offline"], "project: 'a/b': wandb takes at most 128 characters, and none of"),
    (["name=."], "name: '.' must be a folder below save_path"),
    (["parallel=fsdp"], "fsdp needs a process group"),
    (["parallel=fsdp", "from_scratch=false", "only_eval=true", "load_model_path={model}"], "fsdp needs a process group"),
    (["attn_implementation=flash_attention_2"], "no model can be made from its configuration"),
    (["attn_implementation=flex_attention"], "PyTorch cannot train with it on a CPU"),
    ([*LORA, "lora_target_modules=("], "fits no module of the model"),
    ([*LORA, "lora_target_modules=[]"], "lora_target_modules: value should have at least 1 item"),
    ([*LORA, "lora_r=1000000"], "lora_r: 1000000 is more than the model's width, 8"),
)
FOUND_IN_DATA = (
    (f"[{RECORD}]" % (', "number": ' + "9" * 5000), "not valid JSON: Exceeds the limit"),
    (f"[{RECORD % ''}]".replace("Tom.", "\\ud800"), "field 'answer' holds half a character ('\\ud800' alone)"),
    (f"[{RECORD % ''}]".replace("Is", "<|latent|>"), "field 'question' holds <|latent|>, which stands for a thought"),
)


@pytest.mark.parametrize(("arguments", "message"), FOUND, ids=lambda value: str(value)[:40] if isinstance(value, str) else "")
def test_what_was_found_in_configurations(
    arguments: list[str], message: str, place: Place, monkeypatch: Any, capsys: Any
) -> None:
    values = [f"{key}={value}" for key, value in place.values.items()]
    more = [argument.replace("{model}", place.values["model_id"]) for argument in arguments]
    assert message in str(check(run.main, [*values, *more], place, monkeypatch, capsys))


@pytest.mark.parametrize(("text", "message"), FOUND_IN_DATA, ids=lambda value: value[-40:])
def test_what_was_found_in_data(text: str, message: str, place: Place, monkeypatch: Any, capsys: Any) -> None:
    (place.cwd / "data.json").write_text(text)
    assert message in str(
        check(run.main, [f"{key}={value}" for key, value in place.values.items()], place, monkeypatch, capsys)
    )


# --- configurations ---

NASTY = (
    *(
        "null",
        "~",
        "None",
        '"None"',
        "",
        "true",
        '"true"',
        "yes",
        "0",
        "1",
        "-1",
        "2.5",
        "1e3",
        "1e-320",
        "1e308",
        "-0.0",
        "'1'",
    ),
    *(".nan", ".inf", "-.inf", "1e999", str(2**31), str(2**63), str(2**64), str(10**15), "1" * 5000, "0x" + "f" * 5000, "1_0"),
    *("1:99:99", "0b11", "0o17", "[]", "{}", "[1, 2]", "[[[[]]]]", "{a: 1}", "[null]", "[x, x]", "2024-01-01", "2024-13-45"),
    *("!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "!!python/object/new:os.system [touch ran]"),
    *(
        "!!binary aGVsbG8=",
        "!!binary '/////w=='",
        "!!binary '!'",
        "!!float '1e-4'",
        "!!float x",
        "!!bool x",
        "!!int ''",
        "!x y",
    ),
    *("!!timestamp x", "!!set {a}", "!!omap [a: 1]", "!!null x", "!!str 1", "!!seq x", "&a [*a]", "&a {b: *a}", "*nowhere"),
    *(
        '"\\0"',
        '"\\ud800"',
        '"a\\nb"',
        '"\\e[2J"',
        "x" * 300,
        "x" * 10_000,
        "x/" * 3000,
        "''",
        "' '",
        "ö",
        "\U0001f600",
        '"\\u2028"',
    ),
    *(
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "/proc/nothing",
        ".",
        "..",
        "../../x",
        "a/../../b",
        "/nowhere/x",
        "loop",
        "a/b/c",
    ),
    *(
        "data.json",
        "data.json/x",
        "missing.json",
        "file://x",
        "s3://x",
        "https://x.invalid",
        "http://",
        "openai-community/gpt2",
    ),
    *(
        "'",
        '"',
        "[",
        "{",
        "%",
        "@x",
        "`x`",
        "a: b",
        "#",
        "|",
        ">",
        "&",
        "*",
        "!",
        "? x",
        "- x",
        "\t",
        "\tx",
        "---",
        "...",
        "<<",
    ),
    *("$(touch ran)", "`touch ran`", "; touch ran", "{{x}}", "%s", "(", "(a+)+$", "*", "\\", "\x7f", "\x85", "\ufeff"),
)
NUMBERS = (
    "0",
    "1",
    "2",
    "7",
    "1000",
    "100000",
    "1e-9",
    "0.5",
    "1.0",
    "1e9",
    "10000000",
    str(10**9),
    str(10**12),
    str(2**31 - 1),
)
VALUES: dict[str, tuple[str, ...]] = {  # what may be right, so that what contradicts each other is reached too
    "method": [*METHODS],
    "bf16": ("true", "pure"),
    "reset_optimizer": ("true", "epoch"),
    "nonfinite_loss": ("stop", "skip"),
    "parallel": ("ddp", "fsdp"),
    "fsdp_gather": ("pass", "step"),
    "matmul_precision": ("high", "medium"),
    "wandb": ("online", "offline"),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", "nobody/knows"),
    "epochs_per_stage": ("1", "[1, 2]", "[100000, 1]"),
    "lora_r": ("2", "100000"),
    "from_scratch": ("false",),
    "lora_target_modules": ("q_proj", "[q_proj, v_proj]", "nothing", "(", "'.*'", "[1]"),
    "load_model_path": ("{model}", "{model}/model.safetensors", "{model}/config.json", "data.json", "None"),
    "num_workers": ("0", str(10**6)),
    "gguf_file": ("x.gguf", "../x.gguf", "config.json"),
}
WHOLE: dict[str, Callable[[bytes, random.Random], bytes]] = {  # of a file's bytes
    "byte order mark": lambda text, _: b"\xef\xbb\xbf" + text,
    "carriage returns": lambda text, _: text.replace(b"\n", b"\r\n"),
    "utf-16": lambda text, _: text.decode(errors="replace").encode("utf-16"),
    "compressed": lambda text, _: gzip.compress(text, mtime=0),
    "empty": lambda text, _: b"",
    "blank": lambda text, _: b" \n\t\n",
    "cut": lambda text, draw: text[: draw.randrange(len(text) + 1)],
    "beginning lost": lambda text, draw: text[draw.randrange(len(text) + 1) :],
    "nul": lambda text, draw: splice(text, draw, b"\0"),
    "control": lambda text, draw: splice(text, draw, bytes([draw.randrange(32)])),
    "tab": lambda text, draw: splice(text, draw, b"\t"),
    "no utf-8": lambda text, draw: splice(text, draw, draw.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"])),
    "twice": lambda text, _: text + text,
    "deep": lambda text, draw: b"[" * draw.choice([900, 5000, 100_000]) + text,
    "deep and closed": lambda text, _: b"[" * 400 + b"]" * 400,
}


STARTS = (  # what is mutated: training of random weights, of the model's own, of matrices beside them, and an evaluation
    {},
    {"from_scratch": "false"},
    {"from_scratch": "false", "lora_r": "2"},
    {"from_scratch": "false", "only_eval": "true", "load_model_path": "{model}"},
)


class Space(NamedTuple):
    """What is mutated: the keys of a program, values for them that may be right, and changes to begin with."""

    fields: dict[str, Any]
    plausible: dict[str, tuple[str, ...]]
    starts: tuple[dict[str, str], ...]


TRAINING = Space(RunConfig.model_fields, VALUES, STARTS)
SWEEPING = Space(
    SweepConfig.model_fields,
    {
        "dtype": ("bfloat16", "float16"),
        "noise_type": ("all", "snr", "[targeted, dropout]", "[gaussian, gaussian]"),
        "noise_direction": ("same", "opposite"),
        "noise_scales": ("0", "[0, 1]", "[1.0e+300]", "[.inf]", "[-1]"),
        "schedule": ("constant", "adaptive"),
        "controls": ("[zero, mean]", "all"),
        "benchmark": ("gsm8k", "mmlu", "prontoqa"),
        "n_latents": ("1", "100"),
    },
    ({}, {"num_branches": "2", "temperature": "0.7"}),
)


def splice(text: bytes, draw: random.Random, what: bytes) -> bytes:
    at = draw.randrange(len(text) + 1)
    return text[:at] + what + text[at:]


def flipped(text: bytes, draw: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(draw.choice([1, 1, 2, 5, 40])):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def misspelt(key: str, draw: random.Random) -> str:
    at = draw.randrange(len(key))
    return draw.choice(
        [key[:at] + key[at + 1 :], key.upper(), key + "s", key.replace("_", "-"), key[:at] + "ü" + key[at:], f" {key}"]
    )


def mutated_values(values: dict[str, str], draw: random.Random, space: Space) -> dict[str, str]:
    """One to four changes: a value that is wrong, too large or contradicts others, a key that is missing or unknown."""
    values = values | draw.choice(space.starts)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 4])):
        present, every = sorted(values), sorted(space.fields)
        kind = draw.randrange(20)
        if kind == 0:
            values.pop(draw.choice(present))
        elif kind == 1:
            key = draw.choice(present)
            values[misspelt(key, draw)] = values[key] if draw.random() < 0.5 else values.pop(key)
        elif kind <= 4:
            values[draw.choice(present)] = draw.choice(NASTY)
        elif kind == 5:
            values[draw.choice(every)] = draw.choice(NASTY)
        elif kind <= 10:
            values[
                draw.choice(
                    [key for key in every if any(kind in str(space.fields[key].annotation) for kind in ("int", "float"))]
                )
            ] = draw.choice(NUMBERS)
        elif kind <= 13:
            key = draw.choice([one for one in every if space.fields[one].annotation is bool])
            values[key] = draw.choice(["true", "false"])
        else:
            key = draw.choice(sorted(space.plausible))
            values[key] = draw.choice(space.plausible[key])
    return {key: value.replace("{model}", values.get("model_id", "")) for key, value in values.items()}


def mutated_file(values: dict[str, str], draw: random.Random) -> bytes:
    """A YAML file of mutated values, or of the right ones with its text mutated."""
    kind = draw.randrange(10)
    lines = [f"{key}: {value}" for key, value in (mutated_values(values, draw, TRAINING) if kind < 6 else values).items()]
    if kind == 6:
        lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    elif kind == 7:
        lines.insert(
            draw.randrange(len(lines)), draw.choice(["- x", "x", ": x", "? [a]: b", "<<: {lr: 1}", "<<: 1", "&a b: *a", "%TAG"])
        )
    text = "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
    if kind == 8:
        return flipped(text, draw)
    return WHOLE[draw.choice(sorted(WHOLE))](text, draw) if kind == 9 else text


@pytest.mark.parametrize("number", range(FIRST, FIRST + CONFIGURATIONS), ids=lambda number: f"configuration-{number}")
def test_a_mutated_configuration_runs_or_is_one_line(number: int, place: Place, monkeypatch: Any, capsys: Any) -> None:
    (place.cwd / "x.yaml").write_bytes(mutated_file(place.values, random.Random(f"configuration {number}")))
    check(run.main, ["x.yaml"], place, monkeypatch, capsys)


@pytest.mark.parametrize("number", range(FIRST, FIRST + COMMAND_LINES), ids=lambda number: f"command-line-{number}")
def test_a_mutated_command_line_runs_or_is_one_line(number: int, place: Place, monkeypatch: Any, capsys: Any) -> None:
    draw = random.Random(f"command line {number}")
    arguments = [f"{key}={value}" for key, value in mutated_values(place.values, draw, TRAINING).items()]
    if draw.random() < 0.15:
        arguments.append(
            draw.choice(["", "=", "==", "x", "x=", "=x", "a.yaml", ".yaml", "y.yml=1", "a.yaml" * 900, "\udcff=1", "loop.yaml"])
        )
    check(run.main, arguments, place, monkeypatch, capsys)


# --- data files ---

DEEP: Any = 0
for _ in range(300):
    DEEP = [DEEP]
STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**400, float("nan"), float("inf"), [], {}, [[]], [None], {"a": 1}, DEEP),
    *(
        "",
        " ",
        "\n",
        "\t\u2028",
        "\0",
        "a\0b",
        "\ud800",
        "\udfff x",
        "\ufeff",
        "\u200b",
        "\u0301",
        "\x85",
        "\x1b[2J",
        "\U0001f600",
    ),
    *(
        "<|latent|>",
        "<|start-latent|>",
        "<|end-latent|>",
        "<pause>",
        "<eos>",
        "</s>",
        "<|endoftext|>",
        "<unk>",
        "<pad>",
        "[UNK]",
    ),
    *(
        "#",
        "###",
        "### Tom",
        "# # #",
        "Tom\nis\na lempus.",
        "1,234",
        "-1",
        "Tom " * 200,
        "lempus" * 1000,
        "x" * 100_000,
        "Tom",
        ".",
    ),
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places inside a value, itself first."""
    yield path
    if isinstance(value, (list, dict)) and len(path) < 6:
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(entry, (*path, key))


def strange(draw: random.Random) -> Any:
    return json.loads(json.dumps(draw.choice(STRANGE)))  # of its own: it may be changed


def changed(records: Any, draw: random.Random) -> Any:
    """One place inside replaced, removed, doubled, or with something added."""
    *parents, last = draw.choice([path for path in paths(records) if path])
    holder = records
    for key in parents:
        holder = holder[key]
    kind = draw.randrange(8)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(last, holder[last])
    elif kind == 1:
        holder[draw.choice(["extra", "", "idx", "question_tokenized", "ö", "\ud800", last + " "])] = strange(draw)
    elif kind == 2 and isinstance(holder[last], str):
        holder[last] += draw.choice([one for one in STRANGE if isinstance(one, str)])
    else:
        holder[last] = strange(draw)
    return records


def mutated_data(draw: random.Random) -> bytes:
    records: Any = chain_records(draw.choice([1, 2, 4]))
    kind = draw.randrange(10)
    for _ in range(draw.choice([1, 1, 2, 5]) if kind < 6 else 0):
        if isinstance(records, list) and records:
            records = changed(records, draw)
    text = json.dumps(records, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind == 6:
        return flipped(text, draw)
    if kind == 7:
        return WHOLE[draw.choice(sorted(WHOLE))](text, draw)
    if kind == 8:
        lines = "\n".join(json.dumps(record) for record in records)
        whole = (
            lines,
            json.dumps({"data": records}),
            json.dumps(json.dumps(records)),
            f"{text.decode()},",
            f"{text.decode()} x",
        )
        return draw.choice(whole).encode()
    if kind == 9:
        at = text.index(b'"question"')
        extra = (
            b'"question": "Tom", ',
            b'"number": %s, ' % (b"9" * 5000),
            b'"x": NaN, ',
            b'"x": %s1%s, ' % (b"[" * 5000, b"]" * 5000),
        )
        return text[:at] + draw.choice(extra) + text[at:]
    return text


@pytest.mark.parametrize("number", range(FIRST, FIRST + DATA_FILES), ids=lambda number: f"data-{number}")
def test_a_mutated_data_file_runs_or_is_one_line(number: int, place: Place, monkeypatch: Any, capsys: Any) -> None:
    draw = random.Random(f"data {number}")
    (place.cwd / "mutated.json").write_bytes(mutated_data(draw))
    values = {
        **place.values,
        "method": draw.choice([*METHODS]),
        "num_epochs": "1",
        "pad_latent_to_max": draw.choice(["true", "false"]),
    }
    values |= dict.fromkeys(draw.choice([["train_path"], ["val_path"], ["train_path", "val_path"]]), "mutated.json")
    if draw.random() < 0.2:
        values |= {
            "only_eval": "true",
            "from_scratch": "false",
            "load_model_path": values["model_id"],
            "val_path": "mutated.json",
        }
    check(run.main, [f"{key}={value}" for key, value in values.items()], place, monkeypatch, capsys)


# --- noise experiments ---


@pytest.mark.parametrize("number", range(FIRST, FIRST + SWEEPS), ids=lambda number: f"sweep-{number}")
def test_a_mutated_noise_sweep_runs_or_is_one_line(number: int, place: Place, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).touch())
    values = {
        "name": "sweep",
        "results_path": "results",
        "model_id": place.values["model_id"],
        "benchmark": "prosqa",
        "data_path": "data.json",
        "num_questions": "1",
        "noise_scales": "[0, 1]",
        "n_latents": "2",
        "max_new_tokens": "2",
    }
    mutated = mutated_values(values, random.Random(f"sweep {number}"), SWEEPING)
    main = runpy.run_path(str(ROOT / "test.py"), run_name="started")["main"]
    check(main, [f"{key}={value}" for key, value in mutated.items()], place, monkeypatch, capsys)
