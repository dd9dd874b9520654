"""Configuration of the noise experiments: test.py, run_noisy_experiment.py, full_test.py and experiments.ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from config import check_kernel
from experiments.answers.benchmarks import find_benchmark
from experiments.answers.questions import BenchmarkQuestion, load_questions
from experiments.noise.controls import CONTROLS
from methods import MOST_THOUGHTS, EvalLatents
from noise import DECAY, DECAYING, SCHEDULES, NoiseType, check_noise, noise_rows, noise_types
from thoughts import Noise, ThoughtMapSetting
from utils import Config, OptionalPath, OptionalText, PathText, Positive, Seed, check_folder_name, null, one_of

NoiseName = Annotated[str, one_of(noise_types)]
Schedule = Annotated[str, one_of(lambda: list(SCHEDULES))]
SELF_CONSISTENCY_TEMPERATURE = 0.7  # temperature of the baseline
# Keys that change no answer, and may differ when a run goes on:
WITHOUT_INFLUENCE = ("results_path", "fresh", "batch_size", "tokens_per_batch", "trust_remote_code", "device_map")
MOST_BRANCHES = 10_000  # of a question: what only a slip of the finger exceeds
Branches = Annotated[int, Field(ge=1, le=MOST_BRANCHES)]
Voters = Annotated[int, Field(ge=2, le=MOST_BRANCHES)]  # one alone does not vote


def listed(value: Any) -> Any:
    """One value stands for a list of it; "None" and "all" as in the other configurations."""
    if value == "None":
        return None
    if value == "all":
        return noise_types()
    return value if isinstance(value, list) or value is None else [value]


Rate = Annotated[float, Field(gt=0, lt=1)]
ControlNames = Annotated[list[Annotated[str, one_of(CONTROLS)]], BeforeValidator(lambda value: listed(value) or [])]
NoiseNames = Annotated[list[NoiseName], Field(min_length=1), BeforeValidator(listed)]


class SweepConfig(Config):
    """Keys of the noise experiments; accuracy against noise, greedy and without branches, is the default."""

    # general
    name: PathText
    """Folder of the experiment below results_path."""
    results_path: PathText = "results"
    """Folder below which every experiment has its own."""
    seed: Seed = 0
    """Of noise, samples and drawn questions."""
    fresh: bool = False
    """Forget the experiment of this name, with its results, and start over."""
    # who answers: a checkpoint of this project, or any causal language model without training
    model_id: OptionalPath = None
    """A causal language model without training: hub id or local directory."""
    load_model_path: OptionalPath = None
    """A trained checkpoint of this project, or a run's directory (its newest checkpoint; RUN@best: its best)."""
    gguf_file: OptionalPath = None
    """A GGUF file in model_id."""
    attn_implementation: OptionalText = None
    """Attention of transformers: sdpa, eager, ...; null: its default."""
    trust_remote_code: bool = False
    """Run code that comes with a model: read it first."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """float32, bfloat16 or float16."""
    device_map: Annotated[Literal["auto"] | None, BeforeValidator(null)] = None
    """auto: the layers are spread over all GPUs of a single process, for models that do not fit one; null: one device."""
    hidden_layer_idx: Annotated[int | None, BeforeValidator(null)] = None
    """The layer whose state is fed back: -1 the last one, after the final norm; published gpt-oss experiments used 1.
    null: as trained, else -1."""
    thought_map: Annotated[ThoughtMapSetting | None, BeforeValidator(null)] = None
    """Another map from states to thoughts, as the key of run.py; null: as trained, else identity."""
    n_latents: Annotated[int | None, Field(ge=1, le=MOST_THOUGHTS), BeforeValidator(null)] = None
    """Thoughts of every question; null: as trained, else 8."""
    eval_latents: EvalLatents = "gold"
    """Thoughts of a checkpoint trained with pad_latent_to_max: False: gold: as the record's steps; max: as the most steps; or
    a number."""
    # questions
    benchmark: str
    """gsm8k, gsm-hard, svamp, multiarith, gsm-symbolic, mmlu, math, gpqa, prosqa or prontoqa."""
    data_path: OptionalPath = None
    """A local file in place of the hub's data set; needed for prosqa and prontoqa."""
    subset: OptionalText = None
    """Configuration of the hub's data set; null: the usual one."""
    split: OptionalText = None
    """Split of the hub's data set; null: its test split."""
    num_questions: Annotated[int | None, Field(ge=1), BeforeValidator(null)] = None
    """So many: of a file the first ones, of the hub drawn with the seed; null: all."""
    # noise
    noise_type: NoiseNames = Field(default=["gaussian"])
    """One, a list, or all: gaussian, gaussian_scaled, snr, orthogonal, uniform, dropout, targeted."""
    noise_direction: Annotated[Literal["same", "opposite"] | None, BeforeValidator(null)] = None
    """Of targeted noise: same or opposite; null: both."""
    noise_scales: Annotated[list[float] | None, Field(min_length=1), BeforeValidator(listed)] = None
    """A scale or a list; null: the recommended ones of each type."""
    noise_at_step: Positive = 1
    """The thought that is perturbed, from 1."""
    apply_noise_to_all_passes: bool = False
    """Perturb every thought, from noise_at_step on."""
    schedule: Schedule = "none"
    """Noise of the thoughts after that one: none, constant, linear, cosine, exponential or adaptive."""
    lambda_decay: Annotated[float, Field(ge=0)] = DECAY
    """Decay per thought of the schedules exponential and adaptive."""
    shared_noise: bool = False
    """One noise vector for all branches of a question."""
    controls: ControlNames = Field(default=[])
    """What stands in place of thoughts: one, a list or none of zero, mean, other, pause."""
    mc_dropout: Annotated[list[Rate], BeforeValidator(lambda value: listed(value) or [])] = Field(default=[])
    """Rates of Monte Carlo dropout in the blocks at the thoughts (arXiv 1506.02142), beside noise: one, a list or none."""
    # branches
    num_branches: Branches = 1
    """Branches of a question that vote."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the branches' samples; 0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass from which samples are drawn."""
    self_consistency_temperature: Annotated[float, Field(gt=0)] = SELF_CONSISTENCY_TEMPERATURE
    """Of the baseline without noise, where temperature is 0."""
    max_new_tokens: Positive = 64
    """Most tokens of an answer."""
    # running
    batch_size: Positive = 64
    """Branches decoded at once; no answer depends on it."""
    tokens_per_batch: Annotated[int | None, Field(ge=1), BeforeValidator(null)] = None
    """As many branches at once as fit into so many positions, padding and the longest answers included; null: batch_size."""

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        find_benchmark(self.benchmark)
        if self.model_id is None and self.load_model_path is None:
            raise ValueError("model_id or load_model_path is missing: a model without training, or a trained checkpoint")
        if self.hidden_layer_idx is not None and self.thought_map is not None:
            raise ValueError("hidden_layer_idx and thought_map contradict each other: set one of them")
        if self.apply_noise_to_all_passes and self.schedule not in ("none", "constant"):
            raise ValueError("apply_noise_to_all_passes and schedule contradict each other: set one of them")
        check_folder_name(self.name, "results_path")
        check_kernel(self.attn_implementation, self.trust_remote_code)
        for key, value in self:
            if isinstance(value, list) and len(set(value)) < len(value):
                raise ValueError(f"{key}: {value} holds something twice")
        self._check_effects()
        for kind in self.settings():
            check_noise(self.scales(kind), kind.noise_type, kind.direction)
        return self

    def _check_effects(self) -> None:
        """Raise ValueError for a key that is set and changes nothing."""
        greedy = self.num_branches == 1 and self.temperature == 0
        compared = self.num_branches > 1 and self.temperature == 0  # with self-consistency
        warmth = self.self_consistency_temperature
        without_effect = {
            "noise_direction": (self.noise_direction and not self.targeted, "noise_type: targeted"),
            "shared_noise": (self.shared_noise and self.num_branches == 1, "num_branches of at least 2"),
            "top_p": ("top_p" in self.model_fields_set and self.top_p != 1 and greedy, "temperature above 0, or branches"),
            "eval_latents": (self.eval_latents != "gold" and self.n_latents is not None, "n_latents: null"),
            "subset": (self.subset and self.data_path, "the hub's data set in place of data_path"),
            "split": (self.split and self.data_path, "the hub's data set in place of data_path"),
            "self_consistency_temperature": (
                warmth != SELF_CONSISTENCY_TEMPERATURE and not compared,
                "temperature: 0 and branches",
            ),
            "lambda_decay": (self.lambda_decay != DECAY and not self.decays, "schedule: exponential or adaptive"),
        }
        for key, (idle, needed) in without_effect.items():
            if idle:
                raise ValueError(f"{key}: {getattr(self, key)} has no effect without {needed}: leave it out")

    @property
    def targeted(self) -> bool:
        """Whether some noise has a direction."""
        return any(kind.direction for kind in self.settings())

    @property
    def decays(self) -> bool:
        """Whether the noise of later thoughts depends on lambda_decay."""
        return self.schedule in DECAYING

    @property
    def directory(self) -> Path:
        return Path(self.results_path) / self.name

    def questions(self) -> list[BenchmarkQuestion]:
        """Raises UserError as `load_questions`."""
        return load_questions(self.benchmark, self.data_path, self.subset, self.split, self.num_questions, self.seed)

    def settings(self) -> list[NoiseType]:
        """The rows of all noise types; targeted noise without a direction goes in both."""
        return [row for one in self.noise_type for row in noise_rows(one, self.noise_direction)]

    def scales(self, kind: NoiseType) -> list[float]:
        """Those of the configuration, or the recommended ones."""
        return [float(scale) for scale in (kind.scales if self.noise_scales is None else self.noise_scales)]

    def noise(self, kind: NoiseType, scale: float) -> Noise:
        schedule = "constant" if self.apply_noise_to_all_passes else self.schedule
        return Noise(scale, kind.noise_type, kind.direction, self.noise_at_step, schedule, self.lambda_decay)


class BranchConfig(SweepConfig):
    """The same keys with the defaults of run_noisy_experiment.py: five noisy branches vote (NoisyCoconut, arXiv 2605.08221)."""

    num_branches: Branches = 5
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_new_tokens: Positive = 256


class FullConfig(SweepConfig):
    """The same keys for full_test.py: all noise types and controls greedily, then branches with the keys about branches."""

    noise_type: NoiseNames = Field(default_factory=noise_types)
    """One, a list, or all."""
    controls: ControlNames = Field(default_factory=lambda: list(CONTROLS))
    """One, a list, or none."""
    branch_noise_type: NoiseName = "gaussian_scaled"
    """Noise of the branches that vote."""
    harmless_margin: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Points of accuracy: noise is called harmless where its loss is shown to be smaller."""
    num_branches: Voters = 5
    temperature: Annotated[float, Field(ge=0)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95

    @property
    def targeted(self) -> bool:
        return super().targeted or len(noise_rows(self.branch_noise_type)) > 1

    @model_validator(mode="after")
    def _parts_possible(self) -> FullConfig:
        if self.apply_noise_to_all_passes:
            raise ValueError("apply_noise_to_all_passes: full_test.py tries noise in one pass and in all of them; leave it out")
        for kind in self.model_copy(update={"noise_type": [self.branch_noise_type]}).settings():
            check_noise(self.scales(kind), kind.noise_type, kind.direction)
        return self
