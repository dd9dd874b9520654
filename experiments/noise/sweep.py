"""The runner of the noise experiments: every question under every condition, many branches at once, resumable.

A condition is one way to treat the thoughts; its key is written as in `summary`. K branches, N thoughts, D width.

Questions are cut into chunks that depend on the configuration alone. A chunk is computed, saved and given to a process as one,
so a run that was killed, or is split over other processes, computes every number in the same way.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from experiments.answers.benchmarks import extract_answer as extract
from experiments.answers.benchmarks import same_answer
from experiments.answers.questions import BenchmarkQuestion, selection
from experiments.noise.controls import PLACES, Thoughts
from experiments.noise.progress import Progress, Record, open_progress
from experiments.noise.settings import WITHOUT_INFLUENCE, SweepConfig
from experiments.noise.subjects import Subject, load_subject
from experiments.noise.summary import (
    CLEAN,
    DIVERSITY,
    GREEDY,
    MC_DROPOUT,
    NO_LATENTS,
    SELF_CONSISTENCY,
    condition_key,
    control_key,
    control_of,
    votes,
)
from generation import generate_from
from states import Branch, BranchPoint
from systems import distributed
from systems.batches import cut
from systems.machine import machine
from systems.signals import Preempted, preemptible
from systems.storage import alone
from systems.tokens import CHECKED, check_known, question_ids
from thoughts import Intervention, path_diversity
from utils import UserError, get_logger, is_main_process

DIGITS = 6  # significant ones of recorded numbers
ASKED = ("benchmark", "data_path", "seed", "max_new_tokens", "dtype", "eval_latents")
BRANCHING = ("num_branches", "temperature", "top_p", "self_consistency_temperature")
TOLD = (*ASKED, *BRANCHING, "noise_at_step", "lambda_decay", "shared_noise")  # keys that the result files repeat


class Condition(NamedTuple):
    """key: its name in the results. branches: K. temperature: of the samples, 0 is greedy.

    noise: what is done to the thoughts; of a control, which displaces them, the key says it all.
    distinct: how many branches differ: without noise and samples of their own all K are one, or 0 if that is the greedy one.
    """

    key: str
    branches: int
    temperature: float
    noise: Intervention = Intervention()
    distinct: int = 1


def conditions(config: SweepConfig) -> list[Condition]:
    """All conditions of a configuration, the baselines first. Scale 0 of every type is the condition `clean`."""
    k, temperature = config.num_branches, config.temperature
    clean = Condition(CLEAN, k, temperature, distinct=k if temperature else 0)
    found = [Condition(NO_LATENTS, 1, 0.0), Condition(GREEDY, 1, 0.0), clean]
    if k > 1 and temperature == 0:
        found.append(Condition(SELF_CONSISTENCY, k, config.self_consistency_temperature, distinct=k))
    for kind in config.settings():
        for scale in config.scales(kind):
            if scale != kind.no_noise:
                alike = temperature == 0 and (config.shared_noise or kind.draw is None)
                noise = Intervention(config.noise(kind, scale))
                found.append(Condition(condition_key(kind, scale), k, temperature, noise, distinct=1 if alike else k))
    for rate in config.mc_dropout:
        alike = temperature == 0 and config.shared_noise
        intervention = Intervention(dropout=rate)
        found.append(Condition(f"{MC_DROPOUT}{rate}", k, temperature, intervention, distinct=1 if alike else k))
    for control in config.controls:
        found += [Condition(control_key(control, place), 1, 0.0) for place in PLACES]
    return found


def think(subject: Subject, questions: Sequence[BenchmarkQuestion]) -> dict[int, Tensor]:
    """The clean thoughts (N, D) of some questions by their indices; float32, on the CPU."""
    point = subject.branch_point([subject.prompt(question) for question in questions], 1)
    generated = generate_from(subject.model, point, [Branch(row, q.index) for row, q in enumerate(questions)], 1)
    steps = point.prompt.latent.sum(dim=1).tolist()
    thought = zip(questions, generated.thoughts.float().cpu(), steps, strict=True)
    return {question.index: path[:count] for question, path, count in thought}


def _paths(subject: Subject, questions: Sequence[BenchmarkQuestion]) -> dict[int, Tensor]:
    """As `think`. A question that cannot be thought about is left out, and takes no other with it."""
    try:
        return think(subject, questions)
    except (UserError, ValueError):  # said when the question itself is answered
        return {} if len(questions) == 1 else {k: v for one in questions for k, v in _paths(subject, [one]).items()}


def all_paths(subject: Subject, questions: Sequence[BenchmarkQuestion], batch_size: int) -> dict[int, Tensor]:
    """As `think`, spread over all processes. Questions that cannot be thought about are left out."""
    mine: dict[int, Tensor] = {}
    for chunk in _cut(questions, batch_size)[distributed.rank() :: distributed.world_size()]:
        mine |= _paths(subject, chunk)
    gathered = {index: path for part in distributed.gather_objects(mine) for index, path in part.items()}
    return {index: gathered[index] for index in sorted(gathered)}  # sums over them do not depend on who thought what


def width_of(config: SweepConfig, subject: Subject, question: BenchmarkQuestion) -> int:
    """Positions of a question and of the longest answer that it may get."""
    try:
        return len(subject.prompt(question)) + config.max_new_tokens
    except (UserError, ValueError):  # said when the question is answered
        return config.max_new_tokens


def rows_of(config: SweepConfig, width: int) -> int:
    """So many rows of this width are a batch."""
    room = config.tokens_per_batch
    return config.batch_size if room is None else max(1, room // width)


def at_once(config: SweepConfig, subject: Subject, questions: Sequence[BenchmarkQuestion]) -> int:
    """So many of the questions are a batch, whichever they are."""
    return rows_of(config, max((width_of(config, subject, question) for question in questions), default=1))


def clean_thoughts(subject: Subject, questions: Sequence[BenchmarkQuestion], batch_size: int, seed: int) -> Thoughts:
    """What the controls need of all questions, see `all_paths`."""
    paths = all_paths(subject, questions, batch_size)
    if not paths or not all(len(path) for path in paths.values()):
        raise UserError("the controls displace thoughts, but there are questions without any: set n_latents")
    latent = torch.tensor(subject.ids.latent, device=subject.model.embedding.weight.device)
    return Thoughts(paths, subject.model.embedding(latent).detach().float().cpu(), seed)


# --- answering ---


class Answer(NamedTuple):
    """One branch of one condition: its text, log-probabilities of its tokens, description of its first noise, its thoughts."""

    text: str
    log_probabilities: list[float]
    noise: dict[str, Any] | None
    thoughts: Tensor


@dataclass
class Answerer:
    """Answers questions under all conditions, a chunk at a time."""

    config: SweepConfig
    subject: Subject
    conditions: list[Condition]
    thoughts: Thoughts | None

    def chunks(self, questions: Sequence[BenchmarkQuestion]) -> list[list[BenchmarkQuestion]]:
        """Questions that are answered together: their branches fill a batch."""
        branches, room = sum(condition.distinct for condition in self.conditions), self.config.tokens_per_batch
        rows = max(1, self.config.batch_size // branches) if room is None else len(questions)
        widths = [0] * len(questions) if room is None else [width_of(self.config, self.subject, one) for one in questions]
        chunks = cut(range(len(questions)), widths, rows, None if room is None else room // branches)
        return [[questions[at] for at in chunk] for chunk in chunks]

    def answer(self, questions: Sequence[BenchmarkQuestion]) -> list[Record]:
        """The records of some questions. One that fails takes no other with it."""
        began = time.perf_counter()
        try:
            records = self._answer(questions)
        except Exception as error:  # whatever goes wrong with one question, the others are to be answered
            if len(questions) > 1:
                return [record for question in questions for record in self.answer([question])]
            reason = " ".join(str(error).split())
            get_logger().warning(f"question {questions[0].index} failed: {type(error).__name__}: {reason}")
            records = [_record(questions[0], f"{type(error).__name__}: {reason}")]
        seconds = (time.perf_counter() - began) / len(questions)
        return [{**record, "seconds": round(seconds, 3)} for record in records]

    def _answer(self, questions: Sequence[BenchmarkQuestion]) -> list[Record]:
        prompts = [self.subject.prompt(question) for question in questions]
        first_change = 1 if self.thoughts or self.config.mc_dropout else self.config.noise_at_step
        point = self.subject.branch_point(prompts, first_change)
        plain = self.subject.branch_point([self.subject.plain_prompt(question) for question in questions], 1)
        answers = self._branches(point, questions, [one for one in self.conditions if one.key != NO_LATENTS])
        answers |= self._branches(plain, questions, [one for one in self.conditions if one.key == NO_LATENTS])
        latents = point.prompt.latent.sum(dim=1).tolist()
        return [
            {
                **_record(question, None),
                "n_latents": latents[row],
                "prompt_tokens": len(prompts[row]),
                "conditions": {
                    condition.key: self._judge(
                        question, condition, answers[row, condition.key if condition.distinct else GREEDY]
                    )
                    for condition in self.conditions
                },
            }
            for row, question in enumerate(questions)
        ]

    def _branches(
        self, point: BranchPoint, questions: Sequence[BenchmarkQuestion], asked: Sequence[Condition]
    ) -> dict[tuple[int, str], list[Answer]]:
        """The answers of every question under some conditions, a batch of branches at a time."""
        answers: dict[tuple[int, str], list[Answer]] = {}
        wanted = [
            (row, condition, branch)
            for row in range(len(questions))
            for condition in asked
            for branch in range(condition.distinct)
        ]
        for part in _cut(wanted, rows_of(self.config, point.prompt.mask.shape[1] + self.config.max_new_tokens)):
            rows = [self._row(questions[row], row, condition, branch) for row, condition, branch in part]
            for (row, condition, _), answer in zip(part, self._generate(point, rows), strict=True):
                answers.setdefault((row, condition.key), []).append(answer)
        return answers

    def _row(self, question: BenchmarkQuestion, row: int, condition: Condition, branch: int) -> Branch:
        noise_branch = 0 if self.config.shared_noise else branch
        intervention = condition.noise
        if displaced := control_of(condition.key):
            replacements = cast("Thoughts", self.thoughts).replacements(question.index, *displaced)
            intervention = Intervention(replacements=replacements)
        return Branch(row, question.index, branch, noise_branch, intervention, condition.temperature)

    def _generate(self, point: BranchPoint, rows: list[Branch]) -> Iterator[Answer]:
        config = self.config
        generated = generate_from(self.subject.model, point, rows, config.max_new_tokens, config.top_p, config.seed)
        tokens, lengths = generated.tokens.tolist(), generated.lengths.tolist()
        scores, thoughts = generated.log_probabilities.tolist(), generated.thoughts.float().cpu()
        steps = point.prompt.latent.sum(dim=1).tolist()  # of each question; what follows in `thoughts` is padding
        for row in range(len(rows)):
            new = tokens[row][: lengths[row]]
            text = self.subject.text(new[:-1] if new[-1:] == [self.subject.ids.eos] else new)
            noise = next(iter(generated.noise[row]), None)
            yield Answer(text, scores[row][: lengths[row]], noise, thoughts[row, : steps[rows[row].row]])

    def _judge(self, question: BenchmarkQuestion, condition: Condition, found: list[Answer]) -> dict[str, Any]:
        """What the K branches say, each and together."""
        given = found * condition.branches if len(found) < condition.branches else found
        same = functools.cache(functools.partial(same_answer, question.benchmark))
        ratios = [0.0 if answer.noise is None else _rounded(float(answer.noise["scale_ratio"])) for answer in given]
        branches: list[dict[str, Any]] = []
        for answer in given:
            said = extract(question.benchmark, answer.text)
            branches.append(
                {
                    "text": answer.text,
                    "answer": said,
                    "correct": same(said, question.gold),
                    "new_tokens": len(answer.log_probabilities),
                    "log_probability": math.fsum(min(score, 0.0) for score in answer.log_probabilities),
                }
            )
        together = votes(branches, ratios, same)
        outcome: dict[str, Any] = {
            "branches": [{**one, "log_probability": _rounded(one["log_probability"])} for one in branches],
            "votes": dict(Counter(branch["answer"] for branch in branches)),
            **{name: {**one, "confidence": _rounded(one["confidence"])} for name, one in together.items()},
            "noise_ratio": ratios if given[0].noise is not None else None,
            "diversity": self._diversity(given),
        }
        if condition.key.startswith(control_key("other", "")):
            outcome["displaced_by"] = cast("Thoughts", self.thoughts).other(question.index)
        return outcome

    def _diversity(self, given: list[Answer]) -> dict[str, float | None] | None:
        """None for one branch; all but all_steps are None where no thought comes after the perturbed one."""
        if len(given) < 2:
            return None
        thoughts, step = torch.stack([answer.thoughts for answer in given]), self.config.noise_at_step
        measured, defined = path_diversity(thoughts, step), DIVERSITY if thoughts.shape[1] > step else ("all_steps",)
        return {name: _rounded(getattr(measured, name)) if name in defined else None for name in DIVERSITY}


def _record(question: BenchmarkQuestion, error: str | None) -> Record:
    asked = {"index": question.index, "question": question.question, "gold": question.gold}
    known = {"subject": question.subject, "choices": [*question.choices]}
    return {**asked, **{key: value for key, value in known.items() if value}, "error": error}


def _rounded(value: float) -> float:
    """As results hold it. ValueError, with which the question fails alone: JSON has no such number."""
    if not math.isfinite(value):
        raise ValueError(f"a number that is not finite: {value}")
    return float(f"{value:.{DIGITS}g}")


def _cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


# --- the run ---


class Sweep(NamedTuple):
    """A finished run: what was asked for, facts about it, and one record for each question in their order."""

    config: SweepConfig
    info: dict[str, Any]
    records: list[Record]


def run_sweep(config: SweepConfig, device: torch.device) -> Sweep | None:
    """Answer all questions under all conditions, going on where an earlier run stopped; None if a signal stopped this one.

    Called by all processes, which share the questions. Raises UserError for whatever the user can put right.
    """
    progress = None
    try:
        with preemptible(), alone(config.directory):
            questions = config.questions()
            subject = load_subject(config, device)
            _check_step(config, subject, questions)
            texts = question_ids(subject.tokenizer, [one.question for one in questions[:CHECKED]])
            check_known(texts, subject.tokenizer, config.benchmark)
            influences = _influences(config, subject, questions)
            defaults = {key: one.default for key, one in type(config).model_fields.items() if key not in WITHOUT_INFLUENCE}
            progress = open_progress(config.directory, influences, config.fresh, defaults)
            records = _run(config, subject, questions, progress)
    except Preempted as stop:
        done = [] if progress is None else [one for one in progress.records() if one["error"] is None]
        get_logger().info(f"stopped by {stop} after {len(done)} questions; the same command goes on from there")
        return None
    if all(record["error"] is not None for record in records):
        raise UserError(f"all {len(records)} questions failed; the first with {records[0]['error']}")
    return Sweep(config, _information(config, subject, records, progress), records)


def _run(config: SweepConfig, subject: Subject, questions: list[BenchmarkQuestion], progress: Progress) -> list[Record]:
    done = {record["index"] for record in progress.records() if record["error"] is None}
    distributed.barrier()  # nobody appends before everybody has read
    wanted = conditions(config)
    answerer = Answerer(config, subject, wanted, None)
    if config.controls and len(done) < len(questions):
        answerer.thoughts = clean_thoughts(subject, questions, at_once(config, subject, questions), config.seed)
    by_length = sorted(questions, key=lambda question: (len(question.question), question.index))  # little padding
    chunks = answerer.chunks(by_length)
    left = [chunk for chunk in chunks if not {question.index for question in chunk} <= done]
    branches = sum(condition.distinct for condition in wanted)
    title = f"{config.name}: {branches} branches a question"
    bar = tqdm(total=len(questions), initial=len(done), desc=title, unit="question", disable=not is_main_process())
    for number, chunk in enumerate(left):
        if number % distributed.world_size() == distributed.rank():
            progress.append(answerer.answer(chunk))
        bar.update(len(chunk))
    bar.close()
    distributed.barrier()
    return progress.records()


def _check_step(config: SweepConfig, subject: Subject, questions: list[BenchmarkQuestion]) -> None:
    """Raise UserError if no question has so many thoughts as noise_at_step wants; say where only some have."""
    counts = [*subject.count_thoughts(questions).values()]
    enough = sum(count >= config.noise_at_step for count in counts)
    if counts and not enough:
        raise UserError(f"noise_at_step: {config.noise_at_step}: no question has so many thoughts; the most is {max(counts)}")
    if enough < len(counts):
        get_logger().info(f"{enough} of {len(counts)} questions have {config.noise_at_step} thoughts; the others get no noise")


def _influences(config: SweepConfig, subject: Subject, questions: list[BenchmarkQuestion]) -> dict[str, Any]:
    """Everything that the answers depend on: settings, weights and questions by their content."""
    values = config.model_dump(mode="json", exclude=set(WITHOUT_INFLUENCE))
    content = hashlib.sha256(repr([(one.index, one.question, one.choices, one.gold) for one in questions]).encode())
    scales = values["noise_scales"]
    return {
        **values,
        "noise_scales": scales and [scale if math.isfinite(scale) else str(scale) for scale in scales],  # JSON has no infinity
        "model": subject.source,
        "weights_sha256": _fingerprint(subject.model),
        "questions_sha256": content.hexdigest(),
    }


def _fingerprint(model: torch.nn.Module) -> str:
    """Of the beginning of every parameter: a checkpoint that was trained anew differs there, and large models take no time."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.is_meta:  # accelerate has left it on the disk
            continue
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _information(config: SweepConfig, subject: Subject, records: list[Record], progress: Progress) -> dict[str, Any]:
    """experiment_info of the result files."""
    return {
        "timestamp": progress.timestamp,
        **{key: getattr(config, key) for key in TOLD},
        "questions": len(records),
        "selection": selection(config.data_path, config.num_questions, config.seed),
        "errors": sum(record["error"] is not None for record in records),
        **subject.describe(),
        "checkpoint": config.load_model_path,
        "n_latents": sorted({record["n_latents"] for record in records if record["error"] is None}),
        "schedule": "constant" if config.apply_noise_to_all_passes else config.schedule,
        "passes": "all" if config.apply_noise_to_all_passes and config.noise_at_step == 1 else config.noise_at_step,
        **machine(subject.device),
        "git_commit": progress.commit,
        "git_commits": sorted({str(record.get("git_commit")) for record in records}),  # of the code that answered
        "seconds": round(sum(record["seconds"] for record in records), 1),
    }
