"""What is fed back as thoughts: the map from states to thoughts, interventions on them (noise, replacement), and how far noisy
paths part.

Shapes: B rows of the batch, T positions, D width of the model, K branches, N thoughts of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from noise import (
    DECAY,
    Scales,
    apply_noise_to_hidden_states,
    check_noise,
    check_schedule,
    dropout_generator,
    length,
    noise_generator,
    schedule_factor,
    scheduled_scale,
)

EMBEDDINGS_AT_ONCE = 4096  # rows of a table that are read together


class ThoughtMap(nn.Module):
    """Maps the states of a position to the thought that a latent after it is given. This one gives the last state as it is.

    layers: the states that it reads: 0 is the embeddings, l what layer l gives, -1 the last one, after the final norm.
    """

    layers: tuple[int, ...] = (-1,)
    setting: str | dict[str, Any] = "identity"  # of the key thought_map

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """states: one (B, 1, D) for each of `layers`. Returns (B, 1, D)."""
        return states[0]


class LayerMap(ThoughtMap):
    """The state of any layer. Raises ValueError if the model has none of this number."""

    def __init__(self, base: PreTrainedModel, layer: Annotated[int, Field(ge=-1)] = -1) -> None:
        super().__init__()
        most = base.config.get_text_config().num_hidden_layers
        if not -1 <= layer <= most:
            raise ValueError(f"layer is {layer}; the model has {most} layers: use -1, or 0 to {most}")
        self.layers = (layer,)


class NormMap(ThoughtMap):
    """The last state, rescaled to the mean norm that the token embeddings have when the map is made.

    Trained models have last states many times as long as their embeddings (facebookresearch/coconut issues 29 and 51).
    """

    norm: Tensor

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.register_buffer("norm", embedding_norm(base))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return F.normalize(states[0], dim=-1) * self.norm


@torch.no_grad()
def embedding_norm(base: PreTrainedModel) -> Tensor:
    """The mean norm of the token embeddings as the model reads them: Gemma's are the weights by the root of the width."""
    embedding = cast("nn.Embedding", base.get_input_embeddings())
    tokens = torch.arange(len(embedding.weight), device=embedding.weight.device)
    return torch.cat([length(embedding(some)) for some in tokens.split(EMBEDDINGS_AT_ONCE)]).mean()


class ProjectionMap(ThoughtMap):
    """Linear, GELU, Linear, LayerNorm of the last state (CODI, arXiv 2502.21074).

    width: between the two linear layers; by default that of the model.
    """

    def __init__(self, base: PreTrainedModel, width: Annotated[int | None, Field(ge=1)] = None) -> None:
        super().__init__()
        size = base.config.get_text_config().hidden_size
        width = width or size
        self.steps = nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, size), nn.LayerNorm(size))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return self.steps(states[0])


@dataclass(frozen=True)
class MapKind:
    """A row of THOUGHT_MAPS. make: gives the map of a base model; its further arguments are the options of the key."""

    make: Callable[..., ThoughtMap]
    about: str


THOUGHT_MAPS: dict[str, MapKind] = {
    "identity": MapKind(lambda base: ThoughtMap(), "the last state, after the final norm"),
    "layer": MapKind(LayerMap, "the state of any layer"),
    "norm": MapKind(NormMap, "the last state with the mean norm of the token embeddings"),
    "projection": MapKind(ProjectionMap, "Linear, GELU, Linear, LayerNorm of the last state"),
}


def check_thought_map(setting: Any) -> str | dict[str, Any]:
    """The setting of the key thought_map in its shortest form. Raises ValueError, naming what there is, if it is none."""
    options = {"name": setting} if isinstance(setting, str) else dict(setting)
    name = options.pop("name", None)
    if name not in THOUGHT_MAPS:
        raise ValueError(f"it must name one of {', '.join(THOUGHT_MAPS)}")
    known = dict([*inspect.signature(THOUGHT_MAPS[name].make, eval_str=True).parameters.items()][1:])
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; it has {', '.join(known) or 'none'}")
        try:
            TypeAdapter(known[key].annotation).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{key} of {name} is {value!r}: {error.errors()[0]['msg']}") from None
    return {"name": name, **options} if options else name


LatentMode = Literal["sequential", "jacobi"]  # how thoughts are computed; `RunConfig.latent_mode` explains it
ThoughtMapSetting = Annotated[str | dict[str, Any], AfterValidator(check_thought_map)]


def make_thought_map(setting: str | dict[str, Any], base: PreTrainedModel, seed: int = 0) -> ThoughtMap:
    """The map of a setting. Random weights are drawn from the seed alone. Raises ValueError if it does not fit the model."""
    options = {"name": setting} if isinstance(setting, str) else dict(setting)
    make = THOUGHT_MAPS[options.pop("name")].make
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        thought_map = make(base, **options)
    thought_map.setting = setting
    return thought_map


class Noise(NamedTuple):
    """Noise in thoughts.

    scale: one, or in a batch one for each row. type, direction: as in `apply_noise_to_hidden_states`.
    first_pass: the pass, counted from 1, whose thought is perturbed first. schedule, decay: what later ones get
    (`schedule_factor`).
    """

    scale: Scales
    type: str = "gaussian"
    direction: str | None = None
    first_pass: int = 1
    schedule: str = "none"
    decay: float = DECAY

    def reaches(self, latent_pass: int) -> bool:
        return latent_pass == self.first_pass or (latent_pass > self.first_pass and self.schedule != "none")

    def check(self) -> None:
        """Raise ValueError if a setting is out of range, naming the valid ones."""
        check_noise(self.scale, self.type, self.direction)
        check_schedule(self.schedule)
        if not self.decay >= 0:
            raise ValueError(f"the decay of the schedule is {self.decay}; it must not be negative")
        if self.first_pass < 1:
            raise ValueError(f"the first noisy pass is {self.first_pass}; passes are counted from 1")


def published_noise(
    noise_scale: Scales | None, noise_type: str, noise_direction: str | None, apply_noise_to_all_passes: bool
) -> Noise | None:
    """The arguments of the published code as one."""
    if noise_scale is None:
        return None
    schedule = "constant" if apply_noise_to_all_passes else "none"
    return Noise(noise_scale, noise_type, noise_direction, schedule=schedule)


class Intervention(NamedTuple):
    """What is done to the thoughts of one row.

    replacements: thoughts (D,) under the numbers of the passes whose own thoughts they displace; noise comes on top.
    dropout: rate, 0 to 1, of dropout in all blocks at the positions of the latents (Monte Carlo dropout, arXiv 1506.02142).
    """

    noise: Noise | None = None
    replacements: Mapping[int, Tensor] = MappingProxyType({})
    dropout: float = 0.0

    def is_noisy(self, latent_pass: int) -> bool:
        return self.noise is not None and self.noise.reaches(latent_pass)

    def changes(self, latent_pass: int) -> bool:
        return latent_pass in self.replacements or self.is_noisy(latent_pass) or self.dropout > 0


@dataclass
class ThoughtInterventions:
    """What is done to the thoughts in the latent passes of one batch; made anew for each batch, as it records what it did.

    Args:
        latent: (B, T) bool, where the rows hold latents. A row's passes are numbered by its own latents, from 1: pass p
            produces the thought that its p-th latent is given.
        rows: one intervention for each row.
        questions, branches: of each row; with `seed` and the number of the pass they decide the draws.

    Attributes:
        infos: for each row the descriptions of its perturbed thoughts, in order, with the number of the pass as "pass".
    """

    latent: Tensor
    rows: Sequence[Intervention]
    questions: Sequence[int]
    branches: Sequence[int]
    seed: int = 0
    infos: list[list[dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        for noise in {row.noise for row in self.rows if row.noise is not None}:
            noise.check()
        for name, values in {"interventions": self.rows, "questions": self.questions, "branches": self.branches}.items():
            if len(values) != len(self.latent):
                raise ValueError(f"{len(values)} {name} for {len(self.latent)} rows")
        self._passes = count_passes(self.latent)
        self._norms: list[list[float]] = []  # of each row the norms of the thoughts after the first noisy one
        self.restart()

    @classmethod
    def of_noise(cls, noise: Noise, latent: Tensor, seed: int, questions: Sequence[int]) -> ThoughtInterventions:
        """Noise in a batch without branches: each row is branch 0 of its question."""
        scale, rows = torch.as_tensor(noise.scale, dtype=torch.float64), len(latent)
        if scale.dim() and scale.shape != (rows,):
            raise ValueError(f"{scale.numel()} scales for {rows} rows")
        each = [Intervention(noise._replace(scale=one)) for one in scale.expand(rows).tolist()]
        return cls(latent, each, questions, [0] * rows, seed)

    def restart(self) -> None:
        """Forget what was done: the thoughts of all columns are computed anew."""
        self._norms, self.infos = [[] for _ in self.rows], [[] for _ in self.rows]

    def first_column(self) -> int:
        """The first column that is fed a changed thought in some row; T if there is none."""
        columns = [
            next((column for column, latent_pass in enumerate(passes) if latent_pass and row.changes(latent_pass)), None)
            for row, passes in zip(self.rows, self._passes, strict=True)
        ]
        return min((column for column in columns if column is not None), default=self.latent.shape[1])

    def apply(self, thoughts: Tensor, column: int) -> Tensor:
        """The thoughts (B, 1, D) that are about to be fed to this column, changed where their rows want it."""
        thoughts = self._replace(thoughts, column)
        alike: dict[tuple[str, str | None], list[int]] = {}  # rows that can be perturbed in one go
        for number, row in enumerate(self.rows):
            if row.noise is not None and row.noise.reaches(self._passes[number][column]):
                alike.setdefault((row.noise.type, row.noise.direction), []).append(number)
        for (noise_type, noise_direction), numbers in alike.items():
            thoughts = self._perturb(thoughts, column, numbers, noise_type, noise_direction)
        return thoughts

    def kept(self, start: int, end: int, blocks: int, width: int) -> Tensor:
        """Factors on what each block adds at the columns [start, end): (blocks, B, end - start, width) float32.

        At a row's latents 0 where dropout takes an entry and 1 / (1 - rate) where it does not; everywhere else 1. The
        rate is no part of the draws' key: a higher one takes what a lower one takes, and more.
        """
        factors = torch.ones(blocks, len(self.rows), end - start, width)
        for number, row in enumerate(self.rows):
            for column in range(start, end):
                if row.dropout and (latent_pass := self._passes[number][column]):
                    source = dropout_generator(self.seed, self.questions[number], self.branches[number], latent_pass)
                    kept = torch.rand(blocks, width, generator=source) >= row.dropout
                    factors[:, number, column - start] = kept / (1 - row.dropout)
        return factors

    def _replace(self, thoughts: Tensor, column: int) -> Tensor:
        found = {
            number: row.replacements[self._passes[number][column]]
            for number, row in enumerate(self.rows)
            if self._passes[number][column] in row.replacements
        }
        if not found:
            return thoughts
        index = torch.tensor([*found], device=thoughts.device)
        return thoughts.index_copy(0, index, torch.stack([*found.values()])[:, None].to(thoughts))

    def _perturb(
        self, thoughts: Tensor, column: int, numbers: list[int], noise_type: str, noise_direction: str | None
    ) -> Tensor:
        index = torch.tensor(numbers, device=thoughts.device)
        chosen = thoughts[index]
        self._remember_norms(numbers, chosen, column)
        scales = [self._scale(number, self._passes[number][column]) for number in numbers]
        generators = [
            noise_generator(self.seed, self.questions[number], self.branches[number], self._passes[number][column])
            for number in numbers
        ]
        perturbed, info = apply_noise_to_hidden_states(chosen, scales, noise_type, noise_direction, generators)
        self._record(numbers, column, info)
        return thoughts.index_copy(0, index, perturbed)

    def _noise(self, number: int) -> Noise:
        return cast("Noise", self.rows[number].noise)

    def _remember_norms(self, numbers: list[int], thoughts: Tensor, column: int) -> None:
        """Only the adaptive schedule looks at them."""
        if not any(self._noise(number).schedule == "adaptive" for number in numbers):
            return
        for number, norm in zip(numbers, length(thoughts.detach().float()).flatten().tolist(), strict=True):
            if self._passes[number][column] > self._noise(number).first_pass:
                self._norms[number].append(norm)

    def _scale(self, number: int, latent_pass: int) -> float:
        noise = self._noise(number)
        scale = float(cast("float", noise.scale))
        if latent_pass == noise.first_pass:
            return scale
        later, step = max(self._passes[number]) - noise.first_pass, latent_pass - noise.first_pass - 1
        factor = schedule_factor(noise.schedule, step, later, self._norms[number], noise.decay)
        return scheduled_scale(scale, factor, noise.type)

    def _record(self, numbers: list[int], column: int, info: dict[str, Any]) -> None:
        by_row = {key: value.tolist() if isinstance(value, Tensor) else [value] * len(numbers) for key, value in info.items()}
        for place, number in enumerate(numbers):
            values = {key: column_values[place] for key, column_values in by_row.items()}
            self.infos[number].append({"pass": self._passes[number][column], **values})


def count_passes(latent: Tensor) -> list[list[int]]:
    """For each row and column of (B, T) the number of the latent there, from 1; 0 where there is none."""
    return (latent.long().cumsum(dim=1) * latent).tolist()


class PathDiversity(NamedTuple):
    """How far K paths of thoughts are apart; distances are Euclidean, averaged over steps.

    diversity: D_K, the mean distance of two paths after the branch point; 0 for fewer than two paths or no step there.
    all_steps: the same over all steps, the perturbed thought and the shared ones before it included.
    late_half: the same over the later half of the steps after the branch point, the middle one included.
    normalised: D_K divided by the mean norm of the thoughts after the branch point.
    pairwise: the distances of the pairs (0, 1), (0, 2), ... (K-2, K-1) after the branch point, whose mean is D_K.
    """

    diversity: float
    all_steps: float
    late_half: float
    normalised: float
    pairwise: list[float]


def path_diversity(thoughts: Tensor, branch_pass: int) -> PathDiversity:
    """The diversity of K paths of N thoughts, (K, N, D) of any dtype, that part when thought `branch_pass` is perturbed.

    D_K = 2/(K(K-1)) sum over pairs i < j of (1/T) sum over steps t of |h_t^i - h_t^j|, over the T = N - `branch_pass`
    thoughts that the model computed after the perturbed one.
    """
    states = thoughts.float()
    first, second = torch.triu_indices(len(states), len(states), offset=1, device=states.device)
    distances = length(states[first] - states[second]).squeeze(-1)  # (pairs, N)
    after = distances[:, branch_pass:]
    mean_norm = _mean(length(states[:, branch_pass:]))
    diversity = _mean(after)
    return PathDiversity(
        diversity=diversity,
        all_steps=_mean(distances),
        late_half=_mean(after[:, after.shape[1] // 2 :]),
        normalised=diversity / mean_norm if mean_norm > 0 else 0.0,
        pairwise=[_mean(pair) for pair in after],
    )


def thought_health(thoughts: Sequence[Tensor]) -> dict[str, float]:
    """Whether thoughts still say different things: numbers that show a collapse while accuracy may not yet.

    thoughts: of each question (N, D), N of at least 1, in units of the mean norm of the text's token embeddings.

    Returns, as means over questions:
        thought_norm: norm of a thought.
        thought_distance, thought_cosine: of two thoughts of a question.
        thought_change: distance of a thought from the one before it, by the norm of the latter.
        question_cosine: of the same thought of two questions; 1 where thoughts do not depend on the question.
        effective_rank: exp of the entropy of the shares of the singular values of all thoughts, their mean taken away
            (Roy and Vetterli 2007).
    Those that nobody can tell, for example from one thought a question, are left out.
    """
    values: dict[str, list[float]] = {
        name: [] for name in ("thought_norm", "thought_distance", "thought_cosine", "thought_change")
    }
    for own in thoughts:
        states, norms = own.double(), own.double().norm(dim=-1)
        values["thought_norm"].append(_mean(norms))
        if len(states) > 1:
            first, second = torch.triu_indices(len(states), len(states), offset=1)
            values["thought_distance"].append(_mean((states[first] - states[second]).norm(dim=-1)))
            values["thought_cosine"].append(_mean(F.cosine_similarity(states[first], states[second], dim=-1)))
            values["thought_change"].append(_mean((states[1:] - states[:-1]).norm(dim=-1) / norms[:-1]))
    directions = [F.normalize(own.double(), dim=-1) for own in thoughts]
    steps = [torch.stack([own[step] for own in directions if len(own) > step]) for step in range(max(map(len, directions)))]
    between = [_mean_cosine(step) for step in steps if len(step) > 1]
    every = torch.cat([own.double() for own in thoughts])
    shares = torch.linalg.svdvals(every - every.mean(dim=0))
    shares = shares[shares > 0] / shares.sum()
    means = {name: sum(found) / len(found) for name, found in values.items() if found}
    if between:
        means["question_cosine"] = sum(between) / len(between)
    return {**means, "effective_rank": (-shares * shares.log()).sum().exp().item()}


def _mean_cosine(directions: Tensor) -> float:
    """Of all pairs of different unit vectors (M, D)."""
    count = len(directions)
    return ((directions.sum(dim=0).square().sum() - count) / (count * (count - 1))).item()


def _mean(values: Tensor) -> float:
    """0 where there is nothing to average."""
    return values.mean().item() if values.numel() else 0.0


def gather_thoughts(inputs_embeds: Tensor, latent: Tensor) -> Tensor:
    """The embeddings (B, T, D) at the latents (B, T) -> (B, N, D) in their order; zeros after a row's last latent."""
    steps = latent.sum(dim=1, keepdim=True)  # (B, 1)
    order = latent.long().argsort(dim=1, descending=True, stable=True)[:, : int(steps.max())]  # (B, N)
    thoughts = inputs_embeds.gather(1, order[..., None].expand(-1, -1, inputs_embeds.shape[-1]))
    missing = torch.arange(order.shape[1], device=order.device) >= steps  # (B, N)
    return thoughts.masked_fill(missing[..., None], 0)
