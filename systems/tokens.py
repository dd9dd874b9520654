"""The tokens of records: question, steps and answer, in a chat template if wanted, kept on disk for the next start."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import tokenizers
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedTokenizerBase

from dataset import machine_cpus, parse_records, row_of
from systems.files import first_line
from utils import UserError, get_logger, is_main_process, read_text

RECORDS_PER_WORKER = 20_000  # below this, starting another tokenising process costs more than it saves
CHECKED = 200  # records in which unknown words are looked for
CACHED_FROM = 2**20  # bytes of a data file: smaller ones are tokenised faster than looked up


def get_dataset(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, max_size: int | None = None, chat_template: bool = False
) -> Dataset:
    """Records of a JSON file, tokenised: the first `max_size`, all if None.

    Columns: idx int, question, answer, extra str, steps [str]; question_tokenized [int] (question and newline, with the
    tokenizer's special tokens), steps_tokenized [[int]] (each step and newline), answer_tokenized [int] ("### ", answer, EOS).
    chat_template: the question is a user's turn in the tokenizer's chat template instead, up to where the assistant begins.

    The tokens of a large file are kept on disk (`datasets`' cache, HF_DATASETS_CACHE) and mapped into memory, for a restart and
    for the other processes of the machine: let one come first (`distributed.first_on_each_node`).

    Raises UserError naming file, record and field, or that the tokenizer has no chat template.
    """
    if chat_template and not tokenizer.chat_template:
        raise UserError("chat_template: True, but the tokenizer of this model has no chat template; set chat_template: False")
    if not is_main_process():
        disable_progress_bars()
    tokenize = _Tokenize(tokenizer, chat_template)
    text = read_text(Path(path))
    cache = _cache_directory(text, tokenize, max_size)
    dataset = _load_tokens(cache)
    if dataset is None:
        dataset = _save_tokens(_tokenised(parse_records(text, path)[:max_size], tokenize, path), cache)
    _check_tokens(dataset[0], tokenize, path)
    some = dataset[:CHECKED]
    steps = [step for row in some["steps_tokenized"] for step in row]
    check_known([*some["question_tokenized"], *steps, *some["answer_tokenized"]], tokenizer, str(path))
    return dataset


def _tokenised(records: list[dict[str, Any]], tokenize: _Tokenize, path: str | Path) -> Dataset:
    dataset = Dataset.from_list([row_of(index, record) for index, record in enumerate(records)])
    workers = max(1, min(machine_cpus(), len(records) // RECORDS_PER_WORKER))
    title = f"tokenising {Path(path).name}"
    tokens = dataset.map(tokenize, batched=True, num_proc=workers if workers > 1 else None, desc=title)
    nothing = pyarrow.compute.index(pyarrow.compute.list_value_length(tokens.data.column("question_tokenized")), 0).as_py()
    if nothing >= 0:
        raise UserError(f"{path}: record {nothing}: field 'question': the tokenizer makes no token of it")
    if hashes := [index for index, record in enumerate(records) if "#" in record["answer"]]:
        get_logger().warning(
            f"{path}: {len(hashes)} answers hold '#', first that of record {hashes[0]}; they cannot be judged right, as what "
            "follows the last '#' is taken for the answer"
        )
    return tokens


def _cache_directory(text: str, tokenize: _Tokenize, max_size: int | None) -> Path | None:
    """Where the tokens of a file's text are kept; None where it is not worth it, or the tokenizer's state cannot be read.

    The name is a hash of all that decides the tokens, this file included; not of paths, so that a run and its continuation
    from a checkpoint, with the tokenizer saved there, find the same tokens.
    """
    tokenizer = tokenize.tokenizer
    if len(text) < CACHED_FROM or not hasattr(tokenizer, "backend_tokenizer"):
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["truncation"], state["padding"]  # as the last call left them
    python_side = [tokenizer.eos_token_id, tokenizer.special_tokens_map, getattr(tokenizer, "split_special_tokens", False)]
    template = tokenizer.chat_template if tokenize.chat_template else None
    parts = [state, python_side, template, max_size, tokenizers.__version__, Path(__file__).read_text(encoding="utf-8"), text]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    return Path(datasets.config.HF_DATASETS_CACHE) / "coconut" / key.hexdigest()[:32]


def _load_tokens(directory: Path | None) -> Dataset | None:
    """The data set in a cache directory, None where there is no whole one."""
    if directory is None or not directory.is_dir():
        return None
    try:
        return Dataset.load_from_disk(str(directory))
    except Exception as error:  # a damaged file can raise anything from pyarrow or json
        get_logger().warning(f"{directory}: damaged, tokenising again: {' '.join(str(error).split())}")
        shutil.rmtree(directory, ignore_errors=True)
        return None


def _save_tokens(dataset: Dataset, directory: Path | None) -> Dataset:
    """Keep a data set on disk, whole or not at all; returns it from there, or as it is where it cannot be kept."""
    if directory is None:
        return dataset
    partial = directory.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        dataset.save_to_disk(str(partial))
        partial.rename(directory)
    except OSError as error:
        if not directory.is_dir():  # else another process was faster
            get_logger().warning(f"{directory}: the tokens cannot be kept: {error}; every process and restart tokenises anew")
        shutil.rmtree(partial, ignore_errors=True)
    return _load_tokens(directory) or dataset


def check_known(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, of: str) -> None:
    """Warn where a tokenizer does not know what stands in a text, so that a model cannot read it.

    rows: tokens. Raises UserError where it knows less than half of them. GPT-2 and others know everything.
    """
    unknown = tokenizer.unk_token_id
    tokens = [token for row in rows for token in row]
    if unknown in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) or not tokens:
        return
    share = tokens.count(unknown) / len(tokens)
    said = f"{of}: {share:.0%} of the tokens are {tokenizer.unk_token}: the tokenizer was made for other words (docs/DATA.md)"
    if share > 0.5:
        raise UserError(said)
    if share > 0.01:
        get_logger().warning(said)


def question_ids(tokenizer: PreTrainedTokenizerBase, questions: list[str], chat_template: bool = False) -> list[list[int]]:
    """The tokens of questions as they stand before the thoughts, see `get_dataset`."""
    texts = [_prompt(tokenizer, question, chat_template) for question in questions]
    return tokenizer(texts, add_special_tokens=not chat_template)["input_ids"]  # a template writes special tokens itself


def _prompt(tokenizer: PreTrainedTokenizerBase, question: str, chat_template: bool) -> str:
    """What stands before the thoughts, as text."""
    return in_chat_template(tokenizer, question) if chat_template else question + "\n"


def in_chat_template(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question as a user's turn in the tokenizer's chat template, up to where the assistant begins.

    Raises UserError with the template's message.
    """
    turn = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template may raise what it likes
        place = f"chat template of {tokenizer.name_or_path}"
        raise UserError(f"{place}: cannot be used for a question: {first_line(error)}") from None


@dataclass
class _Tokenize:
    """Batched map function: text columns to token columns."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: bool

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        steps = [step + "\n" for row in rows["steps"] for step in row]
        answers = ["### " + answer for answer in rows["answer"]]
        ids = iter(self.tokenizer([*steps, *answers], add_special_tokens=False)["input_ids"])
        return {
            "question_tokenized": question_ids(self.tokenizer, rows["question"], self.chat_template),
            "steps_tokenized": [[next(ids) for _ in row] for row in rows["steps"]],
            "answer_tokenized": [[*answer, self.tokenizer.eos_token_id] for answer in ids],
            "before_answer": [self._before_answer(answer) for answer in answers],
        }

    def _before_answer(self, text: str) -> int:
        """How many tokens stand before the first one that holds some of the answer's own text."""
        if not getattr(self.tokenizer, "is_fast", False):  # it does not say where its tokens stand
            return len(self.tokenizer(text[:3], add_special_tokens=False)["input_ids"])
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return next((number for number, (_, end) in enumerate(places) if end > len("### ")), len(places) - 1)


def _check_tokens(row: dict[str, Any], tokenize: _Tokenize, path: str | Path) -> None:
    """Warn where a tokenizer merges across the joints of question, steps and answer (checked on the first record)."""
    tokenizer = tokenize.tokenizer
    prompt = _prompt(tokenizer, row["question"], tokenize.chat_template)
    whole = prompt + "\n".join([*row["steps"], "### " + row["answer"]])
    expected = tokenizer(whole, add_special_tokens=not tokenize.chat_template)["input_ids"] + [tokenizer.eos_token_id]
    parts = row["question_tokenized"] + [token for step in row["steps_tokenized"] for token in step] + row["answer_tokenized"]
    if parts != expected:
        at = next((i for i, (a, b) in enumerate(zip(parts, expected, strict=False)) if a != b), min(len(parts), len(expected)))
        get_logger().warning(
            f"{path}: this tokenizer joins question, steps and answer differently when they are one text (from token {at}, "
            f"{tokenizer.decode(parts[max(at - 2, 0) : at + 3])!r}); training and evaluation both use the separate parts"
        )
