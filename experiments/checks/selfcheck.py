"""Whether noise and generation work on this machine: on its device, in its dtypes, with its torch and transformers.

Shapes: B questions, T positions, K branches, N thoughts, D width, V vocabulary.

What must agree bit for bit is compared so. What only rounding may change (other batches, no cache) may differ by TOLERANCE.
Texts must then be the same in float32; in 16 bits, where rounding often chooses among tokens, they are counted, no more.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from rich.table import Table
from torch import Tensor

from experiments.answers.benchmarks import extract_answer
from experiments.answers.questions import BenchmarkQuestion
from experiments.checks.noise_laws import NoiseSetting, measure
from experiments.checks.stand_ins import QuickConfig, quick_questions, quick_subject
from experiments.noise.progress import Record
from experiments.noise.settings import Voters
from experiments.noise.subjects import Subject
from experiments.noise.sweep import Answerer, conditions
from experiments.tables import terminal
from generation import generate_from
from noise import NOISES, apply_noise_to_hidden_states, derived_generator
from states import Branch, Branches, Details
from systems import distributed
from systems.machine import described, machine
from systems.metrics import show
from thoughts import Intervention, Noise, ThoughtInterventions
from utils import Positive, UserError, get_logger

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}  # relative, of thoughts and logits
STATES = 64  # random ones that the formulas are tried on
RATIO = 0.5  # the scale of the noise, or its inverse where less noise is a larger scale
NOISE: dict[str, Any] = {"noise_scale": 0.5, "noise_type": "gaussian_scaled"}  # in the thoughts of the model
HOT = 100.0  # a temperature at which even a model that is sure draws all kinds of tokens
RECOMPUTED = 2  # questions that are decoded again without a cache, or branch by branch

SAMPLES = {  # a text of each benchmark, and its answer
    "gsm8k": ("He pays 2 * $617 = $1,234.\n#### 1,234 dollars", "1234"),
    "gsm-hard": ("It is 7 / 2.\n#### 3.50", "3.5"),
    "svamp": ("So 27 more.\n#### 27.0", "27"),
    "multiarith": ("The answer is 10 songs.", "10"),
    "gsm-symbolic": ("The change is 5 - 8 = -3.\n#### -3", "-3"),
    "mmlu": ("It is a mammal, so not B.\nThe answer is (C).", "C"),
    "math": ("Half of it is left: $\\boxed{\\frac{1}{2}}$.", "0.5"),
    "gpqa": ("Option A violates parity. The correct answer is **D**.", "D"),
    "prosqa": ("Tom is a lempus.\nEvery lempus is a yumpus.\n### Tom is a yumpus.", "Tom is a yumpus."),
    "prontoqa": ("Max is not small.\n### False", "False"),
}


class CheckConfig(QuickConfig):
    """Keys of quick_test.py."""

    num_questions: Positive | None = 4
    num_branches: Voters = 3
    max_new_tokens: Positive = 12

    @classmethod
    def unused(cls) -> tuple[str, ...]:
        noise = ("noise_type", "noise_direction", "noise_scales", "noise_at_step", "schedule", "shared_noise")
        branches = ("apply_noise_to_all_passes", "self_consistency_temperature", "batch_size")
        return (*super().unused(), *noise, *branches)


class Check(NamedTuple):
    """One line: what was checked, the numbers that decided, whether it is as it should be; None where nothing is asserted."""

    name: str
    number: str
    passed: bool | None


# --- the subject at work ---


@dataclass
class Bench:
    """A subject, its prompts, and how several checks have them answered. Batches are padded on the left."""

    config: CheckConfig
    subject: Subject
    questions: list[BenchmarkQuestion]

    def __post_init__(self) -> None:
        self.model = self.subject.model
        self.dtype = self.model.embedding.weight.dtype
        self.prompts = [self.subject.prompt(question) for question in self.questions]
        self.ids, self.mask = self.subject.batch(self.prompts)  # (B, T)

    def generate(self, rows: Sequence[int] | None = None, **settings: Any) -> tuple[Tensor, Details]:
        """New tokens (B, new) and details of some prompts, or of all, in one batch."""
        chosen = range(len(self.prompts)) if rows is None else rows
        ids, mask = self.subject.batch([self.prompts[row] for row in chosen])
        settings = {"max_new_tokens": self.config.max_new_tokens, "question_index": chosen, **settings}
        tokens, details = cast("tuple[Tensor, Details]", self.model.generate(ids, mask, return_details=True, **settings))
        return tokens[:, ids.shape[1] :], details

    def branches(self, **settings: Any) -> Branches:
        settings = {**NOISE, "seed": self.config.seed, "max_new_tokens": self.config.max_new_tokens, **settings}
        found = self.model.generate_with_branching(
            self.ids, self.mask, num_branches=self.config.num_branches, return_details=True, **settings
        )
        return cast("Branches", found)

    def judge(self, name: str, alike: Sequence[bool], what: str, distance: float) -> Check:
        """Texts and some numbers, with their largest relative distance, that only rounding may have changed."""
        number = f"{sum(alike)} of {len(alike)} texts alike, {what} differ by {distance:.1e}"
        passed = distance <= TOLERANCE[self.dtype] and (all(alike) or self.dtype != torch.float32)
        return Check(name, number, passed)


def apart(first: Tensor, second: Tensor) -> float:
    """The largest distance of two states (..., D), relative to the norm of the second one."""
    first, second = first.double().cpu(), second.double().cpu()
    sizes = second.norm(dim=-1).clamp(min=1e-9)
    return float(((first - second).norm(dim=-1) / sizes).max())


def largest(values: Iterable[float]) -> float:
    """Not a number if one is none, which the built-in maximum may pass over."""
    return float(torch.tensor([*values]).max())


def differing(first: Tensor, second: Tensor) -> int:
    return int((first != second).sum())


def same_tokens(first: Tensor, second: Tensor, eos: int) -> bool:
    """Whether two rows of new tokens are the same up to the end of the sequence."""
    one, other = ([*itertools.takewhile(lambda token: token != eos, row.tolist())] for row in (first, second))
    return one == other


# --- noise ---


def settings() -> list[NoiseSetting]:
    return [NoiseSetting(row.noise_type, row.direction, 1 / RATIO if row.reciprocal else RATIO) for row in NOISES.values()]


def check_formula(bench: Bench, setting: NoiseSetting) -> Check:
    """`noise_laws` on random states of the model's width: norms, cosines, distributions, and 16 bits against float32."""
    generator = derived_generator("selfcheck", setting.name)
    states = torch.randn(STATES, bench.model.embedding.weight.shape[1], generator=generator)

    def on_device(hidden: Tensor, *noise: Any) -> tuple[Tensor, dict[str, Any]]:
        perturbed, info = apply_noise_to_hidden_states(hidden.to(bench.subject.device), *noise)
        return perturbed.cpu(), info

    rows = [
        measure(states.to(dtype), setting, functools.partial(derived_generator, "selfcheck"), on_device) for dtype in DTYPES
    ]
    ratios = " / ".join(f"{row['ratio']:.4f}" for row in rows)
    wrong = [name for row in rows for name, check in row["checks"].items() if not check["passed"]]
    said = f"; wrong: {', '.join(dict.fromkeys(wrong))}" if wrong else ""
    name = f"{setting.name}, scale {setting.scale:g}"
    return Check(name, f"{ratios}, by the formula {rows[0]['expected_ratio']:.4f}{said}", not wrong)


def check_no_noise(bench: Bench) -> Check:
    """Scale 0 (infinity for snr) of every type, on random states and in the thoughts of the model."""
    states = torch.randn(STATES, bench.model.embedding.weight.shape[1], generator=derived_generator("no noise"))
    changed = total = 0
    for setting in settings():
        for dtype in DTYPES:
            hidden = states.to(bench.subject.device, dtype)
            perturbed, _ = apply_noise_to_hidden_states(hidden, setting.kind.no_noise, setting.noise_type, setting.direction)
            changed += differing(perturbed, hidden)
            total += hidden.numel()
    clean, noisy = bench.generate(), bench.generate(noise_scale=0.0)
    for one, other in ((clean[0], noisy[0]), (clean[1].thoughts, noisy[1].thoughts)):
        changed += differing(one, other)
        total += one.numel()
    return Check("scale 0 changes nothing", f"{changed:,} of {total:,} numbers differ", changed == 0)


def check_prompt_states(bench: Bench) -> Check:
    """Noise in the first thought leaves states, keys and values of the prompt as they are."""
    latent = bench.ids == bench.subject.ids.latent  # (B, T)
    noisy = ThoughtInterventions(
        latent=latent,
        rows=[Intervention(Noise(NOISE["noise_scale"], NOISE["noise_type"]))] * len(bench.ids),
        questions=range(len(bench.ids)),
        branches=[0] * len(bench.ids),
        seed=bench.config.seed,
    )
    with torch.no_grad():
        before, after = (
            bench.model.think(bench.ids, bench.mask, keep_cache=True, interventions=noise) for noise in (None, noisy)
        )
    prompt = latent.cumsum(dim=1) == 0  # (B, T)
    states = [(before.hidden, after.hidden)]
    for one, other in zip(before.cache.layers, after.cache.layers, strict=True):  # type: ignore[union-attr]
        states += [(getattr(one, name).transpose(1, 2), getattr(other, name).transpose(1, 2)) for name in ("keys", "values")]
    changed = sum(differing(one[prompt[:, : one.shape[1]]], other[prompt[:, : one.shape[1]]]) for one, other in states)
    first = latent.long().argmax(dim=1, keepdim=True)[..., None].expand(-1, 1, before.inputs_embeds.shape[-1])
    moved = apart(after.inputs_embeds.gather(1, first), before.inputs_embeds.gather(1, first))
    number = f"{changed} numbers differ there, the thought by {moved:.3f}"
    arrived = math.isclose(moved, NOISE["noise_scale"], rel_tol=0.05)
    return Check("noise leaves the prompt's states", number, changed == 0 and arrived)


# --- generation ---


def check_batch(bench: Bench) -> Check:
    tokens, details = bench.generate()
    singles = [bench.generate([row]) for row in range(len(tokens))]
    alike = [same_tokens(tokens[row], one[0], bench.subject.ids.eos) for row, (one, _) in enumerate(singles)]
    steps = details.steps.tolist()
    distances = [apart(details.thoughts[row, : steps[row]], one.thoughts[0]) for row, (_, one) in enumerate(singles)]
    return bench.judge("one batch equals one by one", alike, "thoughts", largest(distances))


def check_cache(bench: Bench) -> Check:
    """Thoughts and log-probabilities of decoding with a cache, computed again without; the latter by the logits' spread."""
    thoughts_apart = scores_apart = 0.0
    for row in range(min(RECOMPUTED, len(bench.prompts))):
        point = bench.subject.branch_point([bench.prompts[row]], 1)
        found = generate_from(bench.model, point, [Branch(0, row)], bench.config.max_new_tokens)
        thoughts, logits = recompute(bench, row, found.tokens)
        scores = logits.log_softmax(dim=-1).gather(1, found.tokens[0, :, None]).squeeze(1)
        spread = logits.amax(dim=-1) - logits.mean(dim=-1)  # (new,)
        thoughts_apart = largest([thoughts_apart, apart(found.thoughts[0], thoughts)])
        scores_apart = largest([scores_apart, *((scores - found.log_probabilities[0]).abs() / spread).tolist()])
    number = f"thoughts differ by {thoughts_apart:.1e}, scores by {scores_apart:.1e}"
    return Check("with a cache equals without", number, largest([thoughts_apart, scores_apart]) <= TOLERANCE[bench.dtype])


@torch.no_grad()
def recompute(bench: Bench, row: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """Thoughts (N, D), and float32 logits (new, V) that chose the new tokens (1, new): every pass over the whole sequence."""
    base = bench.model.base_causallm
    prompt, _ = bench.subject.batch([bench.prompts[row]])
    embeds = bench.model.embedding(torch.cat([prompt, new], dim=1))
    thoughts = []
    for column in (prompt[0] == bench.subject.ids.latent).nonzero().flatten().tolist():
        states = base(inputs_embeds=embeds[:, :column], use_cache=False, output_hidden_states=True).hidden_states
        thoughts.append(bench.model.thought_map([states[layer][:, -1:] for layer in bench.model.thought_map.layers])[0, 0])
        embeds = torch.cat([embeds[:, :column], thoughts[-1][None, None], embeds[:, column + 1 :]], dim=1)
    logits = base(inputs_embeds=embeds, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    return torch.stack(thoughts), logits.float()


def check_seed(bench: Bench) -> Check:
    """Noise and samples."""
    seed = bench.config.seed
    (first, thoughts), (again, repeated), (other, changed) = (
        bench.generate(seed=one, temperature=HOT, **NOISE) for one in (seed, seed, seed + 1)
    )
    repeats = differing(thoughts.thoughts, repeated.thoughts) + (0 if torch.equal(first, again) else 1)
    length = min(first.shape[1], other.shape[1])
    tokens = differing(first[:, :length], other[:, :length])
    moved = differing(thoughts.thoughts[:, 0], changed.thoughts[:, 0])
    number = f"same seed: {repeats} differ; another: {tokens} of {len(first) * length} tokens"
    return Check("a seed repeats, another differs", number, repeats == 0 and tokens > 0 and moved > 0)


# --- branches ---


def check_noise_of_branches(bench: Bench) -> Check:
    """K branches; each has its own first thought, or with shared noise all the same."""
    own, shared = bench.branches(), bench.branches(shared_noise=True)
    least = min(_first_thoughts_apart(own.thoughts))
    most = largest(_first_thoughts_apart(shared.thoughts))
    right = tuple(own.tokens.shape[:2]) == (len(bench.ids), bench.config.num_branches)
    number = f"{own.tokens.shape[1]} branches apart by {least:.3f} or more; shared: {most:.3f}"
    return Check("branches: noise of their own or shared", number, right and least > 0 and most == 0)


def _first_thoughts_apart(thoughts: Tensor) -> list[float]:
    """Of every pair of branches of (B, K, N, D)."""
    firsts = thoughts[:, :, 0]
    return [apart(row[one], row[other]) for row in firsts for one, other in itertools.combinations(range(len(row)), 2)]


def check_first_branch(bench: Bench) -> Check:
    """Branch 0 is what `generate` gives with the same noise."""
    found = bench.branches()
    tokens, details = bench.generate(seed=bench.config.seed, **NOISE)
    alike = [same_tokens(found.tokens[row, 0], one, bench.subject.ids.eos) for row, one in enumerate(tokens)]
    return bench.judge("branch 0 equals generate", alike, "thoughts", apart(found.thoughts[:, 0], details.thoughts))


def check_batch_size(bench: Bench) -> Check:
    """What an experiment with noise and samples records: a branch at a time, and all branches of all questions at once."""
    few = bench.questions[:RECOMPUTED]
    alone = [record for question in few for record in records_of(bench, [question], batch_size=1)]
    together = records_of(bench, bench.questions, batch_size=1000)[: len(few)]
    (texts, numbers), (other_texts, other_numbers) = texts_and_paths(alone), texts_and_paths(together)
    alike = [one == other for one, other in zip(texts, other_texts, strict=True)]
    distance = largest(abs(one / other - 1) for one, other in zip(numbers, other_numbers, strict=True))
    return bench.judge("answers do not depend on the batch", alike, "paths", distance)


def records_of(bench: Bench, questions: Sequence[BenchmarkQuestion], batch_size: int) -> list[Record]:
    """UserError: a question failed."""
    noise = {"noise_type": [NOISE["noise_type"]], "noise_scales": [NOISE["noise_scale"]]}
    config = bench.config.model_copy(update={**noise, "batch_size": batch_size})
    records = Answerer(config, bench.subject, conditions(config), None).answer(questions)
    if failed := [record["error"] for record in records if record["error"] is not None]:
        raise UserError(failed[0])
    return records


def texts_and_paths(records: Sequence[Record]) -> tuple[list[str], list[float]]:
    """All texts; and of the noisy branches the noise ratios and the distance of their paths."""
    outcomes = [one for record in records for one in record["conditions"].values()]
    noisy = [one for one in outcomes if one["noise_ratio"] is not None]
    texts = [branch["text"] for one in outcomes for branch in one["branches"]]
    return texts, [number for one in noisy for number in (*one["noise_ratio"], one["diversity"]["all_steps"])]


# --- answers and speed ---


def check_extraction(bench: Bench) -> Check:
    found = {name: extract_answer(name, text) for name, (text, _) in SAMPLES.items()}
    wrong = [f"{name} {found[name]!r}" for name, (_, answer) in SAMPLES.items() if found[name] != answer]
    number = f"{len(SAMPLES) - len(wrong)} of {len(SAMPLES)} benchmarks" + (f"; wrong: {', '.join(wrong)}" if wrong else "")
    return Check("answers are read from texts", number, not wrong)


def measure_speed(bench: Bench) -> Check:
    """Tokens a second of branches that go on to the end: what is decoded, not how soon a model stops."""
    began = time.perf_counter()
    found = bench.branches()
    tokens = int(found.lengths.sum())
    seconds = time.perf_counter() - began
    number = f"{tokens / seconds:,.0f} tokens a second, {found.lengths.numel()} branches at once"
    return Check("speed", number, None)


# --- all of them ---


def all_checks(bench: Bench) -> Iterator[Check]:
    for setting in settings():
        yield _attempt(f"{setting.name} noise", functools.partial(check_formula, bench, setting))
    checks: list[Callable[[Bench], Check]] = [
        check_no_noise,
        check_prompt_states,
        check_batch,
        check_cache,
        check_seed,
        check_noise_of_branches,
        check_first_branch,
        check_batch_size,
        check_extraction,
        measure_speed,
    ]
    for check in checks:
        yield _attempt(check.__name__.removeprefix("check_").replace("_", " "), functools.partial(check, bench))


def _attempt(name: str, check: Callable[[], Check]) -> Check:
    """What raises has failed; the other checks go on."""
    try:
        return check()
    except Exception as error:  # whatever this machine cannot do
        return Check(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False)


def run_checks(config: CheckConfig, device: torch.device) -> bool:
    """Show every check; whether all passed, on all processes."""
    bench = Bench(config, quick_subject(config, device), quick_questions(config))
    checks = list(all_checks(bench))
    failed = [check.name for check in checks if check.passed is False]
    show(result_table(bench, checks))
    if failed:
        get_logger().warning(f"process {distributed.rank()} on {device}: FAILED: {', '.join(failed)}")
    return distributed.max_over_ranks(len(failed)) == 0


def result_table(bench: Bench, checks: Sequence[Check]) -> Table:
    subject, where = bench.subject, bench.subject.device
    title = f"{subject.source}, {bench.config.dtype}; {described(machine(where))}"
    dtypes = " / ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    words = {True: "ok", False: "FAILED", None: "-"}
    rows = ([check.name, words[check.passed], check.number] for check in checks)
    caption = f"noise types: norm of the noise by norm of the thought in {dtypes}"
    return terminal(title, ("check", "", "decided by"), rows, caption, left=("", "decided by"))
