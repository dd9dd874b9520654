"""Train or evaluate: `python run.py args/X.yaml [key=value ...]`, or the same under torchrun.

torchrun --nproc_per_node 4 run.py args/prosqa_coconut.yaml
python run.py args/prosqa_coconut_eval.yaml load_model_path=checkpoints/prosqa-coconut@best
"""

from __future__ import annotations

if __name__ == "__main__":
    import systems.startup  # noqa: F401

from pathlib import Path
from typing import Any

import torch

from config import DEBUG_TRAIN, DEBUG_VALID, RunConfig
from dataset import check_lengths
from evaluation import Asking, Evaluator, answer_scores
from systems import distributed, meta_start, sources
from systems.batches import Batching, Samples
from systems.checkpoint import id_facts
from systems.files import Facts
from systems.machine import machine, warn_of_slow_bfloat16
from systems.metrics import Outputs, Reporter, print_config, save_predictions, schedule_table, show
from systems.models import LatentIds, build_model, latent_ids
from systems.signals import PREEMPTION, StopRequest
from systems.storage import alone
from systems.tokens import get_dataset
from systems.watchdog import Watchdog
from systems.writing import config_changes, save_config
from training import InterruptibleEvaluator, Trainer
from utils import entry_point, get_logger, load_config, set_seed

RESOLVED = ("model_id", "load_model_path")  # a run's directory there is named by its newest checkpoint at the first start


def train(config: RunConfig, device: torch.device, stop: StopRequest) -> None:
    """Staged training with an evaluation after each epoch; goes on where an earlier run of the same command stopped."""
    data = sources.agreed_hashes(config)
    resume_from, source = distributed.run_on_main(lambda: starting_point(config, data))
    config = source if resume_from is None else config
    tokenizer = sources.load_run_tokenizer(source)
    ids = latent_ids(tokenizer, config.method)
    with distributed.first_on_each_node():
        train_set = get_dataset(str(config.train_path), tokenizer, DEBUG_TRAIN if config.debug else None, config.chat_template)
        valid_set = get_dataset(config.val_path, tokenizer, DEBUG_VALID if config.debug else None, config.chat_template)
    set_seed(config.seed)  # the same random weights on all processes
    model, whole = meta_start.build(lambda: build_model(source, tokenizer, ids), config.parallel == "fsdp")
    check_lengths([train_set, valid_set], config.curriculum, config.max_new_tokens, model.max_positions, config.eval_latents)
    wrapped = distributed.wrap(model, config.part(distributed.Parallelism), device, config.loss_options, whole)
    del whole
    set_seed(config.seed + distributed.rank())  # other dropout masks on each
    watchdog = Watchdog(config.hang_timeout)
    evaluator = InterruptibleEvaluator(
        config.part(Asking), config.curriculum, valid_set, tokenizer, ids, device, watchdog.beat, stop
    )
    spread = (distributed.rank(), distributed.world_size())
    samples = Samples(config.part(Batching), train_set, str(config.train_path), *spread)
    trainer = Trainer(config, wrapped, samples, evaluator, facts_of(config, ids, data), resume_from)
    keep_config(config, resumed=resume_from is not None)
    show(schedule_table(config.curriculum, samples, range(trainer.state.epoch, config.num_epochs), len(samples.groups(0))))
    with watchdog:
        complete = trainer.fit()
    if complete:
        trainer.reporter.finish()  # unwatched: wandb may take its time
        place = "nothing saved (debug)" if config.debug else f"checkpoints in {config.save_dir}"
        get_logger().info(f"finished: {trainer.state.global_step} steps, {place}")


def facts_of(config: RunConfig, ids: LatentIds, data: dict[str, str]) -> Facts:
    """What checkpoints say of a run before its first step. data: hashes of the data."""
    told = {name: getattr(config, name) for name in RunConfig.model_fields if name in Facts.__annotations__}
    return Facts(**told, **id_facts(ids), data=data, stage=0, epoch=config.resume, accuracy=None)


def starting_point(config: RunConfig, data: dict[str, str]) -> tuple[Path | None, RunConfig]:
    """The checkpoint from which training goes on, if any, and where the model comes from. data: hashes of the data."""
    resume_from = sources.newest_for(config, data)
    if resume_from is None:
        return None, sources.resolve_paths(config)
    return resume_from, sources.resumed_source(config, resume_from)


def evaluate(config: RunConfig, device: torch.device) -> None:
    """Loss and accuracy of a checkpoint, its paths resolved, at the stage and with the method it was trained with."""
    sources.agreed_hashes(config)
    config, stage, epoch = sources.evaluation_config(config)
    tokenizer = sources.load_run_tokenizer(config)
    ids = latent_ids(tokenizer, config.method)
    with distributed.first_on_each_node():
        valid_set = get_dataset(config.val_path, tokenizer, DEBUG_VALID if config.debug else None, config.chat_template)
    model, whole = meta_start.build(lambda: build_model(config, tokenizer, ids), config.parallel == "fsdp")
    most = "max" if config.eval_latents == "gold" else config.eval_latents
    check_lengths([valid_set], config.curriculum, config.max_new_tokens, model.max_positions, most)
    wrapped = distributed.wrap(model, config.part(distributed.Parallelism), device, whole=whole)
    del whole
    watchdog = Watchdog(config.hang_timeout)
    evaluator = Evaluator(config.part(Asking), config.curriculum, valid_set, tokenizer, ids, device, watchdog.beat)
    keep_config(config)
    with watchdog:
        result = evaluator.evaluate(wrapped, stage)
        fixed = evaluator.answers_with_fixed_latents(wrapped, stage)
    asked = {"val_path": config.val_path, "model": config.load_model_path, "eval_latents": config.eval_latents}
    facts = {"step": 0, "epoch": epoch, "stage": stage, **asked, "machine": machine(device)}
    fixed_scores = answer_scores(fixed or result.predictions)
    outputs = config.part(Outputs)
    reporter = Reporter(outputs, config.model_dump(), keep_rows=None)
    reporter.row("evaluation", {**facts, **result.metrics(), **{f"{key}_fixed": fixed_scores[key] for key in fixed_scores}})
    save_predictions(outputs, epoch, result.predictions)
    if fixed is not None:
        save_predictions(outputs, epoch, fixed, "fixed_predictions")
    reporter.finish()
    with_fixed = "" if fixed is None else f"with as many latents for every question {_shown(fixed_scores)}, "
    get_logger().info(
        f"{config.val_path}: stage {stage}, {result.questions} questions, accuracy {_shown(result.metrics())}, {with_fixed}"
        f"loss {result.loss:.4f}, steps right {result.cot_match:.1%}, {result.new_tokens:.1f} new tokens a question"
    )


def _shown(scores: dict[str, Any]) -> str:
    at_once = "" if scores["accuracy_at_once"] is None else f", {scores['accuracy_at_once']:.1%} of the others right"
    bounds = f"95% interval {scores['low']:.1%} to {scores['high']:.1%}"
    return f"{scores['accuracy']:.1%} ({bounds}; {scores['wrote_steps']:.1%} wrote steps before the answer{at_once})"


def keep_config(config: RunConfig, resumed: bool = False) -> None:
    """The resolved configuration beside the results, once nothing is left that could be wrong with it."""
    if not config.debug:
        distributed.run_on_main(lambda: _keep_config(config, config.save_dir / "config.yaml", resumed))


def _keep_config(config: RunConfig, path: Path, resumed: bool) -> None:
    changes = [change for change in config_changes(config, path) if not change.startswith(RESOLVED)] if resumed else []
    if changes:
        get_logger().warning(f"the configuration has changed since the run was last started: {'; '.join(changes)}")
    save_config(config, path)


@entry_point
def main(arguments: list[str]) -> None:
    config = load_config(RunConfig, arguments, __doc__)
    torch.set_float32_matmul_precision(config.matmul_precision)
    with distributed.process_group(config.hang_timeout) as device:
        if config.only_eval:
            given = config
            config = distributed.run_on_main(lambda: sources.resolve_paths(given))
        with alone(None if config.debug else config.save_dir):
            print_config(config)
            if config.bf16:
                warn_of_slow_bfloat16(f"bf16: {config.bf16}", "bf16=false", device)
            if config.only_eval:
                evaluate(config, device)
                return
            with StopRequest().listening(PREEMPTION) as stop:  # while the model is loaded; Ctrl-C ends that at once
                train(config, device, stop)


if __name__ == "__main__":
    main()
