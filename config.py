"""The keys of run.py, what they mean, and which of them fit together."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BeforeValidator, Field, model_validator

from methods import ALL_TOKENS, METHODS, MOST_THOUGHTS, Curriculum, EvalLatents, Method, TokenRemoval, scheduled_stage
from systems.optimization import LEARNING_RATES
from thoughts import LatentMode, ThoughtMapSetting
from utils import (
    LARGEST,
    Config,
    NonNegative,
    OptionalPath,
    OptionalText,
    PathText,
    Positive,
    Seed,
    check_folder_name,
    null,
    one_of,
    shown,
)

MethodName = Annotated[str, one_of(METHODS)]
# What only a slip of the finger exceeds, and what would take all memory or forever.
MOST_EPOCHS, MOST_EXAMPLES, MOST_WORKERS = 100_000, 10_000_000, 512
DEBUG_TRAIN, DEBUG_VALID = 5000, 32  # records that `debug: True` keeps, as in the published code

Part = TypeVar("Part")


def check_kernel(attn_implementation: str | None, trust_remote_code: bool) -> None:
    """Raise ValueError if the attention is a repository of kernels, which transformers would fetch and run, without trust."""
    if attn_implementation is not None and "/" in attn_implementation and not trust_remote_code:
        raise ValueError(
            f"attn_implementation: {shown(attn_implementation)} is code from a hub, which is not run: set trust_remote_code: "
            "True if you have read it and trust it"
        )


CONTRADICTIONS = (
    ("resume", "from_scratch"),  # it starts from a model that was trained
    ("lora_r", "from_scratch"),  # LoRA adapts trained weights
    ("from_scratch", "load_model_path"),
    ("warmup_steps", "warmup_share"),
    ("uniform_prob", "earlier_stage_prob"),
)
ICOT_KEYS = ("icot_tokens_per_epoch", "icot_smoothing", "icot_start_epoch", "icot_remove_all_beyond")


class RunConfig(Config):
    """Keys of run.py. The published YAML files load unchanged; after loading, `method` alone says what is trained."""

    # general
    project: str = "coconut"
    """Project in wandb."""
    save_path: PathText = "checkpoints"
    """Folder below which every run has its own."""
    name: PathText
    """Folder of the run below save_path."""
    only_eval: bool = False
    """Evaluate load_model_path instead of training."""
    debug: bool = False
    """5,000 training and 32 validation records; nothing is saved, no wandb."""
    seed: Seed = 0
    """Of weights, data order and dropout."""
    # method: a name, or exactly one of the four booleans of the published files
    method: MethodName | None = None
    """coconut, cot, no_cot, no_thoughts, no_curriculum, pause, pause_as_thought, icot, codi, simcot, codi_simcot or
    codi_kv; see docs/METHODS.md."""
    coconut: bool = False
    """The same as method: coconut."""
    cot: bool = False
    """The same as method: cot."""
    no_thoughts: bool = False
    """The same as method: no_thoughts."""
    no_cot: bool = False
    """The same as method: no_cot."""
    # training
    c_thought: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)] = 1
    """Latents that stand for one step."""
    epochs_per_stage: Positive | Annotated[list[Positive], Field(min_length=1)] = 1
    """A number, or a list with the epochs of stage 0, 1, ...; its last entry holds for all further stages."""
    max_latent_stage: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)] = 0
    """The last stage with written steps; past it all steps are latent."""
    pad_latent_to_max: bool = True
    """False: a question has no more latents than steps x c_thought. Not with codi and its kin."""
    uniform_prob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a sample is trained at a stage drawn from all of its own steps."""
    earlier_stage_prob: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The same, drawn from the stages up to the current one."""
    examples_per_epoch: Annotated[int | None, Field(ge=1, le=MOST_EXAMPLES), BeforeValidator(null)] = None
    """Training examples of an epoch; null: the whole file."""
    icot_tokens_per_epoch: Annotated[float, Field(gt=0, le=ALL_TOKENS)] = 8.0
    """icot: tokens of the steps removed in each epoch."""
    icot_smoothing: Annotated[float | None, Field(gt=0), BeforeValidator(null)] = 4.0
    """icot: lambda of removal smoothing; null: none."""
    icot_start_epoch: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] = 0
    """icot: epochs that write everything."""
    icot_remove_all_beyond: Annotated[int | None, Field(ge=0, le=ALL_TOKENS), BeforeValidator(null)] = None
    """icot: once more tokens than this are removed, all are; null: never."""
    codi_teacher_weight: Annotated[float, Field(ge=0)] = 1.0
    """codi: weight of the teacher's cross entropy."""
    codi_distillation_weight: Annotated[float, Field(ge=0)] = 1.0
    """codi: weight of the distance of the student's states from the teacher's; published 1 for GPT-2, 20 for Llama 3.2 1B."""
    codi_kv_weight: Annotated[float, Field(ge=0)] = 1.0
    """codi_kv: weight of the distance of the thoughts' keys and values from the teacher's."""
    codi_kv_importance: Annotated[float, Field(ge=0, le=1)] = 0.1
    """codi_kv: which of the teacher's entries stand for its steps: this share of their score is the attention that the answer
    pays to them, the rest how little they are like one another."""
    codi_kv_power: Literal[1, 2] = 1
    """codi_kv: 1: absolute distances, 2: squared ones."""
    simcot_weight: Annotated[float, Field(ge=0)] = 1.0
    """simcot, codi_simcot: weight of the cross entropy of the second model, which writes steps from thoughts."""
    num_epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = 1
    """Epochs of the whole training."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of AdamW after the warm-up."""
    lr_schedule: Annotated[str, one_of(LEARNING_RATES)] = "constant"
    """Learning rate in the last stage: constant, or falling to 0 over its epochs (linear, cosine). Earlier stages have lr; a
    method without stages has one stage, the last; with icot it falls in the epochs in which the most tokens are removed. Epochs
    that resume counts as done are among them."""
    warmup_steps: NonNegative = 0
    """Steps in which the learning rate grows from 0."""
    warmup_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The same as a share (0 to 1) of all optimizer steps of the training."""
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Beta 2 of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW."""
    group_by_length: bool = False
    """Make each optimizer step of examples of like length, so that little is padding; the order still depends on seed and epoch
    alone, and on the global batch."""
    batch_size_training: Positive = 32
    """Questions of a micro-batch, per process."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches of one optimizer step."""
    bf16: bool | Literal["pure"] = False
    """True: bfloat16 compute with float32 weights; pure: bfloat16 weights, as the published code has."""
    reset_optimizer: bool | Literal["epoch"] = False
    """True: a new optimizer on each new stage; epoch: on every epoch, as the published code does."""
    grad_clip: Annotated[float | None, Field(gt=0), BeforeValidator(null)] = None
    """Largest norm of the gradients; null: no limit."""
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """What happens where loss or gradients are NaN or infinite: stop before the step, or skip it and count."""
    advance_accuracy: Annotated[float | None, Field(gt=0, le=1), BeforeValidator(null)] = None
    """Leave a stage once validation accuracy (0 to 1) reaches this; null: never early."""
    advance_cot_match: Annotated[float | None, Field(gt=0, le=1), BeforeValidator(null)] = None
    """And once this share (0 to 1) of questions has all written steps right; null: not asked."""
    # model
    model_id: PathText
    """Hub id, or local directory, of the base model."""
    load_model_path: OptionalPath = None
    """Weights to begin with or to evaluate: a checkpoint, a run's directory (its newest checkpoint; RUN@best: its best), a
    hub id, or a published state-dict file."""
    resume: Annotated[int, Field(ge=0, le=MOST_EPOCHS)] = 0
    """Epochs that count as done. Without load_model_path a pretrained model so skips the first stages."""
    from_scratch: bool = False
    """Random weights from the configuration of model_id."""
    marker_init: Annotated[str | None, BeforeValidator(null)] = None
    """The token from whose embedding the markers start, best one after which a step begins; null: "<<", as published, or the
    mean embedding where the tokenizer has no such token."""
    thought_map: ThoughtMapSetting = "identity"
    """What is fed back as a thought: a name (identity, layer, norm, projection), or a mapping with it and options, such as
    {name: layer, layer: 6}."""
    latent_mode: LatentMode = "sequential"
    """How thoughts are computed: sequential, one after the other (Coconut), or jacobi, all at once and again from one another
    (PCCoT, arXiv 2506.18582)."""
    jacobi_iterations: Annotated[int, Field(ge=0, le=MOST_THOUGHTS)] = 3
    """How often with latent_mode: jacobi; 0 leaves pause tokens, as many as there are thoughts is sequential."""
    attend_padding: bool = False
    """True: thoughts and what follows them also attend to the padding before the question, as in the published CODI. An answer
    then depends on the other questions of its batch."""
    attn_implementation: OptionalText = None
    """Attention of transformers: sdpa, eager, ...; null: its default, with codi_kv eager, which it needs."""
    trust_remote_code: bool = False
    """Run code that comes with a model: read it first."""
    gguf_file: OptionalPath = None
    """A GGUF file in model_id."""
    lora_r: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(null)] = None
    """Rank of LoRA; null: all weights are trained."""
    lora_alpha: Annotated[float | None, Field(gt=0), BeforeValidator(null)] = None
    """Alpha of LoRA; null: twice lora_r."""
    lora_dropout: Annotated[float | None, Field(ge=0, lt=1), BeforeValidator(null)] = None
    """Dropout of LoRA; null: 0."""
    lora_target_modules: Annotated[str | list[str] | None, Field(min_length=1), BeforeValidator(null)] = None
    """Modules that LoRA adapts: a name, a list or a regular expression; null: all linear ones."""
    # data
    train_path: OptionalPath = None
    """JSON file of training records."""
    val_path: PathText
    """JSON file of validation records."""
    chat_template: bool = False
    """Wrap each question in the tokenizer's chat template."""
    # checkpoints
    save_only_improve: bool = False
    """Save a checkpoint only when its accuracy is the best of its stage."""
    save_every_steps: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(null)] = None
    """Also save inside epochs, every so many steps; null: never."""
    async_save: bool = False
    """Write checkpoints while training goes on."""
    sharded_checkpoints: bool = False
    """parallel: fsdp: each process writes its part."""
    allow_changed_data: bool = False
    """Go on although a data file is not what it was."""
    keep_last: Annotated[int | None, Field(ge=1, le=LARGEST), BeforeValidator(null)] = None
    """Checkpoints that are kept, the best one besides; null: all."""
    # evaluation
    batch_size_eval: Positive = 16
    """Questions of an evaluation batch."""
    tokens_per_batch: Annotated[int | None, Field(ge=1, le=ALL_TOKENS), BeforeValidator(null)] = None
    """Evaluation batches of as many questions as fit into so many positions, padding and the longest answers included, in place
    of batch_size_eval; null: batch_size_eval."""
    max_new_tokens: Positive = 128
    """Most tokens of an answer. Not given or null: as in the published code, 64 where val_path holds "gsm", else 128."""
    eval_latents: EvalLatents = "gold"
    """Thoughts of an answer. gold: as in training, from its own steps where pad_latent_to_max is False; max: for every question
    as many as the stage allows; or so many latent tokens."""
    # systems
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp, or fsdp: weights, gradients and optimizer are sharded."""
    fsdp_gather: Literal["pass", "step"] = "pass"
    """pass: parameters are gathered for each latent pass; step: once per optimizer step."""
    activation_checkpointing: bool = False
    """Less memory for about one more forward pass."""
    hang_timeout: Annotated[float | None, Field(gt=0, le=1e6), BeforeValidator(null)] = 600.0
    """Seconds without progress after which a process writes its stacks and ends; null: never."""
    compile: bool = False
    """torch.compile of the decoder: eight graphs, made in the first steps, which takes a minute or more. For GPUs; on two CPU
    cores small models gain little (docs/LOG.md, "Compiled"). Not with parallel: fsdp. With activation_checkpointing the graphs
    themselves compute again what they do not keep."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 matrix products, see torch.set_float32_matmul_precision."""
    num_workers: Annotated[int | None, Field(ge=0, le=MOST_WORKERS), BeforeValidator(null)] = None
    """Processes that make batches; null: from the machine."""
    wandb: Literal["online", "offline", "disabled"] = "online"
    """online, offline or disabled."""
    log_every: Positive = 10
    """Optimizer steps between two rows of metrics.jsonl."""

    @model_validator(mode="before")
    @classmethod
    def _published_length(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The published code has no key max_new_tokens and decides so (its run.py)."""
        if null(values.get("max_new_tokens")) is not None:
            return values
        return {**values, "max_new_tokens": 64 if "gsm" in str(values.get("val_path")) else 128}

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self._choose_method()
        if self.only_eval and self.load_model_path is None:
            raise ValueError("only_eval needs load_model_path: a checkpoint directory, a hub id or a state-dict file")
        check_folder_name(self.name, "save_path")
        check_kernel(self.attn_implementation, self.trust_remote_code)
        if self.wandb != "disabled" and (len(self.project) > 128 or set(self.project) & set("/\\#?%:")):
            raise ValueError(f"project: {shown(self.project)}: wandb takes at most 128 characters, and none of / \\ # ? % :")
        method = METHODS[str(self.method)]
        if not self.only_eval:
            if method.reads_attention and self.attn_implementation is None:
                self.attn_implementation = "eager"
            found = [problem for problem, is_there in self._problems(method).items() if is_there]
            if found:
                raise ValueError(found[0])
        return self

    def _choose_method(self) -> None:
        published = [name for name in METHODS if name in type(self).model_fields]
        chosen = [name for name in published if getattr(self, name)]
        if self.method is not None and self.method not in chosen:
            chosen.append(self.method)
        if len(chosen) != 1:
            found = " and ".join(chosen) if chosen else "none"
            raise ValueError(f"method: exactly one of {', '.join(METHODS)} must be chosen, found {found}")
        self.method = chosen[0]
        for name in published:
            setattr(self, name, name == self.method)

    def _problems(self, method: Method) -> dict[str, Any]:
        """What may be wrong with a training, each with whether it is."""
        name, fsdp, lora = self.method, self.parallel == "fsdp", self.lora_r is not None
        sharded, each_step = self.sharded_checkpoints, self.fsdp_gather == "step"
        not_eager = method.reads_attention and self.attn_implementation != "eager"
        match_alone = self.advance_cot_match is not None and self.advance_accuracy is None
        in_stage_0 = method.has_stages and scheduled_stage(self.curriculum, self.num_epochs - 1) == 0  # all steps are written
        no_latent_stage = method.markers and self.max_latent_stage == 0 and not in_stage_0
        uneven = method.equal_latents and not self.pad_latent_to_max
        problems: dict[str, Any] = {
            "train_path is missing: a JSON file of records, or set only_eval: True": self.train_path is None,
            f"resume: {self.resume} leaves nothing to train: num_epochs is {self.num_epochs}": self.resume >= self.num_epochs,
            "advance_cot_match needs advance_accuracy, which turns leaving a stage early on": match_alone,
            f"attn_implementation: {name} needs eager, the one that tells where attention goes": not_eager,
            f"pad_latent_to_max: False: method {name} needs as many latents in every question": uneven,
            f"c_thought: 0 leaves {name} without thoughts: set at least 1": method.markers and self.c_thought == 0,
            f"max_latent_stage: 0 leaves {name} without thoughts: set at least 1, or method: no_cot": no_latent_stage,
            "lora_r: bf16: pure would train the LoRA matrices in bfloat16; use bf16: True": lora and self.bf16 == "pure",
            "lora_r: parallel: fsdp is not supported with LoRA; use parallel: ddp": lora and fsdp,
            "fsdp_gather: step needs parallel: fsdp": each_step and not fsdp,
            "sharded_checkpoints needs parallel: fsdp": sharded and not fsdp,
            "sharded_checkpoints: a model's own code is not kept beside shards": sharded and self.trust_remote_code,
            "compile: it takes the decoder as one piece, which parallel: fsdp splits: set one of them": self.compile and fsdp,
        }
        for one, other in CONTRADICTIONS:
            problems[f"{one} and {other} contradict each other: set one of them"] = getattr(self, one) and getattr(self, other)
        for key in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            problems[f"{key} needs lora_r, the rank, which turns LoRA on"] = not lora and getattr(self, key) is not None
        # A second model is gathered whole: it is small beside what sharding by parts is for.
        for key, given in (("sharded_checkpoints", sharded), ("fsdp_gather: step", each_step)):
            problem = f"{key}: not with method {name}, which trains a second model: leave it out"
            problems[problem] = given and method.step_vectors is not None
        for key, where in self._idle(method).items():
            value = getattr(self, key)
            problem = f"{key}: {value} has no effect with {where}: leave it out"
            problems[problem] = value != type(self).model_fields[key].default
        return problems

    def _idle(self, method: Method) -> dict[str, str]:
        """Keys that another method or mode has and this one does not read, each with what does not read it."""
        read = {field.name for field in fields(method.options)} if method.options else set()
        others = {field.name for one in METHODS.values() if one.options for field in fields(one.options)}
        keys = sorted(others - read - {"c_thought"})
        keys += [] if isinstance(method.schedule, TokenRemoval) else ICOT_KEYS
        keys += [] if method.feeds_back else ["thought_map", "latent_mode", "attend_padding"]
        keys += [] if method.has_stages else ["uniform_prob", "earlier_stage_prob", "advance_accuracy"]
        idle = dict.fromkeys(keys, f"method {self.method}")
        return idle if self.latent_mode == "jacobi" else {**idle, "jacobi_iterations": "latent_mode sequential"}

    @property
    def save_dir(self) -> Path:
        """Where a run writes. An evaluation has a place of its own below, named by its data, weights and eval_latents."""
        run = Path(self.save_path) / self.name
        if not self.only_eval:
            return run
        weights = Path(str(self.load_model_path)).resolve()
        near = next((one for one in (Path(self.save_path).resolve(), Path.cwd()) if weights.is_relative_to(one)), None)
        named = weights.parts[1:][-2:] if near is None else weights.relative_to(near).parts
        latents = [] if self.eval_latents == "gold" else [f"latents_{self.eval_latents}"]
        return run / "eval" / "-".join([Path(self.val_path).stem, *named, *latents])

    def part(self, kind: type[Part]) -> Part:
        """The keys that a dataclass has fields for: a module is given its part of the configuration, not everything."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(cast("Any", kind))})

    @property
    def loss_options(self) -> Any:
        """The keys that the method's loss is given; None where it needs none."""
        kind = METHODS[str(self.method)].options
        return None if kind is None else self.part(kind)

    @property
    def curriculum(self) -> Curriculum:
        return self.part(Curriculum)
