"""The exact training sequence of every method at every stage, and the schedules that choose the stage."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, read_rows
from datasets import Dataset
from processes import launch
from safetensors.torch import load_file
from same_run import differences
from test_run import start

import run
from config import RunConfig
from dataset import IGNORE_INDEX, check_lengths, get_cot_latent_dataset, get_question_latent_dataset
from methods import ALL_TOKENS, END_LATENT, LATENT, METHODS, PAUSE, START_LATENT, last_stage_share, scheduled_stage, stage_at
from systems.metrics import epoch_table, show
from systems.models import build_model, latent_ids, load_tokenizer
from training import Trainer
from utils import UserError, load_config

# Q, q: the question; a, b | c, d, e | f: three steps; A: the answer; .: end of the sequence
# (, *, ): start marker, what stands in a thought's place, end marker
NAMES = {name: number for number, name in enumerate("Qqabcdef A.(*)")}
SAMPLE = {
    "idx": 0,
    "question_tokenized": [NAMES[name] for name in "Qq"],
    "steps_tokenized": [[NAMES[name] for name in step] for step in ("ab", "cde", "f")],
    "answer_tokenized": [NAMES[name] for name in "A."],
}
CURRICULUM = ["c_thought=2", "max_latent_stage=2", "epochs_per_stage=1", "num_epochs=9"]


def configuration(method: str, *more: str) -> RunConfig:
    needed = ["name=x", "model_id=m", "train_path=t", "val_path=v"]
    return load_config(RunConfig, [*needed, *CURRICULUM, f"method={method}", *more])


def training_sequence(config: RunConfig, stage: int, epoch: int = 0, sample: dict[str, Any] = SAMPLE) -> tuple[str, str]:
    """The input and, aligned with it, the tokens that carry loss."""
    markers = (NAMES["("], NAMES["*"], NAMES[")"])
    examples = get_cot_latent_dataset(stage, Dataset.from_list([sample]), config, *markers, epoch)
    letters = {number: name for name, number in NAMES.items()} | {IGNORE_INDEX: "-"}
    return tuple("".join(letters[token] for token in examples[0][key]) for key in ("input_ids", "labels"))  # type: ignore[return-value]


EXPECTED = {
    # (method, further settings): {stage: sequence}; the loss is on what follows the bar
    ("cot", ""): {0: "Qq|abcdefA.", 5: "Qq|abcdefA."},
    ("no_cot", ""): {0: "Qq|A.", 5: "Qq|A."},
    ("coconut", ""): {0: "Qq()|abcdefA.", 1: "Qq(**)|cdefA.", 2: "Qq(****)|fA.", 3: "Qq(****)|A."},
    ("no_thoughts", ""): {0: "Qq|abcdefA.", 1: "Qq|cdefA.", 2: "Qq|fA.", 3: "Qq|A."},
    ("no_curriculum", ""): {0: "Qq(****)|A.", 3: "Qq(****)|A."},
    ("codi", ""): {0: "Qq(****)|A.", 3: "Qq(****)|A."},
    ("codi_simcot", ""): {0: "Qq(****)|A.", 3: "Qq(****)|A."},
    ("codi_kv", ""): {0: "Qq(****)|A.", 3: "Qq(****)|A."},
    ("simcot", ""): {0: "Qq()|abcdefA.", 1: "Qq(**)|cdefA.", 2: "Qq(****)|fA.", 3: "Qq(****)|A."},
    ("pause", ""): {0: "Qq****|A.", 3: "Qq****|A."},
    ("pause_as_thought", ""): {0: "Qq()|abcdefA.", 1: "Qq(**)|cdefA.", 2: "Qq(****)|fA.", 3: "Qq(****)|A."},
    ("icot", "icot_smoothing=null"): {0: "Qq|abcdefA.", 1: "Qq|bcdefA.", 4: "Qq|efA.", 6: "Qq|A.", ALL_TOKENS: "Qq|A."},
}


@pytest.mark.parametrize(("method", "more"), EXPECTED)
def test_training_sequences(method: str, more: str) -> None:
    config = configuration(method, *more.split())
    for stage, expected in EXPECTED[method, more].items():
        prompt, target = expected.split("|")
        assert training_sequence(config, stage) == (prompt + target, "-" * len(prompt) + target)
        markers = (NAMES["("], NAMES["*"], NAMES[")"])
        prompts = get_question_latent_dataset(stage, Dataset.from_list([SAMPLE]), config, *markers)
        assert prompts[0]["input_ids"] == [NAMES[name] for name in prompt]


def test_every_method_is_pinned() -> None:
    assert {method for method, _ in EXPECTED} == set(METHODS)


@pytest.mark.parametrize("method", ["coconut", "no_curriculum", "pause", "pause_as_thought"])
def test_without_padding_a_short_question_gets_fewer_thoughts(method: str) -> None:
    short = {**SAMPLE, "steps_tokenized": SAMPLE["steps_tokenized"][:1]}
    for pad, thoughts in ((True, 4), (False, 2)):
        sequence, _ = training_sequence(configuration(method, f"pad_latent_to_max={pad}"), 3, sample=short)
        assert sequence.count("*") == thoughts


@pytest.mark.parametrize(
    ("method", "more", "stages"),
    [
        ("cot", "", [0, 0, 0, 0, 0]),
        ("coconut", "", [0, 1, 2, 3, 3]),
        ("pause_as_thought", "epochs_per_stage=2", [0, 0, 1, 1, 2, 2, 3, 3]),
        ("no_thoughts", "epochs_per_stage=[3,1,2]", [0, 0, 0, 1, 2, 2, 3, 3, 3]),
        ("coconut", "epochs_per_stage=[2,1]", [0, 0, 1, 2, 3, 3]),
        ("no_curriculum", "", [3, 3, 3]),
        ("pause", "", [3, 3, 3]),
        ("icot", "icot_tokens_per_epoch=2 icot_start_epoch=1", [0, 1, 3, 5]),
        ("icot", "icot_tokens_per_epoch=0.5", [0, 0, 1, 1, 2]),
        ("icot", "icot_tokens_per_epoch=8 icot_remove_all_beyond=20", [7, 15, ALL_TOKENS, ALL_TOKENS]),
    ],
)
def test_schedules(method: str, more: str, stages: list[int]) -> None:
    config = configuration(method, *more.split())
    assert [scheduled_stage(config.curriculum, epoch) for epoch in range(len(stages))] == stages
    if method != "icot":
        assert [stage_at(config.curriculum, epoch, 3, 4) for epoch in range(len(stages))] == stages


def test_icot_removes_tokens_one_by_one_inside_an_epoch() -> None:
    config = configuration("icot", "icot_tokens_per_epoch=2", "icot_start_epoch=1")
    assert [stage_at(config.curriculum, 0, step, 4) for step in range(4)] == [0, 0, 0, 0]
    assert [stage_at(config.curriculum, 1, step, 4) for step in range(4)] == [0, 0, 1, 1]
    assert [stage_at(config.curriculum, 2, step, 4) for step in range(4)] == [2, 2, 3, 3]


def test_icot_smoothing_repeats_and_follows_its_distribution() -> None:
    """P(o) is proportional to exp(-lambda o), so P(0) = 1 - exp(-lambda)."""
    count = 4000
    base = Dataset.from_list([{**SAMPLE, "idx": index} for index in range(count)])

    def removed(epoch: int, **values: Any) -> list[int]:
        config = configuration("icot", "icot_smoothing=1.0", "icot_start_epoch=2").model_copy(update=values)
        examples = get_cot_latent_dataset(1, base, config, 90, 91, 92, epoch)
        return [len("Qqabcdef A.") - 1 - len(row) for row in examples[:]["input_ids"]]

    drawn = removed(2)
    assert drawn == removed(2) != removed(3)
    assert drawn != removed(2, seed=1)
    shares = {value: number / count for value, number in Counter(drawn).items()}
    assert shares[1] == pytest.approx(1 - math.exp(-1), abs=0.03)  # one token by schedule, none added
    assert shares[2] == pytest.approx((1 - math.exp(-1)) * math.exp(-1), abs=0.03)
    assert set(removed(1)) == {1}  # nothing is drawn before the first removal


@pytest.mark.parametrize("method", ["coconut", "no_thoughts", "pause_as_thought"])
def test_staged_methods_mix_stages_and_the_seed_repeats_it(method: str) -> None:
    config = configuration(method, "uniform_prob=0.5")
    base = Dataset.from_list([{**SAMPLE, "idx": index} for index in range(100)])

    def lengths(seed: int) -> list[int]:
        examples = get_cot_latent_dataset(3, base, config.model_copy(update={"seed": seed}), 90, 91, 92)
        return [len(row) for row in examples[:]["input_ids"]]

    assert lengths(0) == lengths(0) != lengths(1)
    assert len(set(lengths(0))) > 1


@pytest.mark.parametrize("method", ["cot", "no_cot", "no_curriculum", "pause", "icot"])
@pytest.mark.parametrize("key", ["uniform_prob", "earlier_stage_prob", "advance_accuracy"])
def test_methods_without_stages_refuse_what_needs_them(method: str, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: 0.5 has no effect with method {method}"):
        configuration(method, f"{key}=0.5")


@pytest.mark.parametrize("method", ["no_curriculum", "pause"])
def test_no_thoughts_at_all_is_a_contradiction(method: str) -> None:
    with pytest.raises(UserError, match="max_latent_stage: 0 leaves"):
        configuration(method, "max_latent_stage=0")
    with pytest.raises(UserError, match="c_thought: 0 leaves"):
        configuration(method, "c_thought=0")


@pytest.mark.parametrize(
    ("method", "tokens"),
    [
        ("coconut", [START_LATENT, END_LATENT, LATENT]),
        ("no_curriculum", [START_LATENT, END_LATENT, LATENT]),
        ("pause_as_thought", [START_LATENT, END_LATENT, PAUSE]),
        ("pause", [PAUSE]),
        ("icot", []),
        ("cot", []),
    ],
)
def test_methods_add_the_tokens_they_use_and_no_others(method: str, tokens: list[str], model_directory: Path) -> None:
    tokenizer = load_tokenizer(str(model_directory))
    before = len(tokenizer)
    ids = latent_ids(tokenizer, method)
    assert sorted(set(tokenizer.get_vocab()) & {START_LATENT, END_LATENT, LATENT, PAUSE}) == sorted(tokens)
    assert len(tokenizer) == before + len(tokens)
    assert len({ids.start, ids.end, ids.latent}) == 3
    assert min(ids[:3]) >= before
    if tokens:
        assert tokenizer.convert_ids_to_tokens(ids.thought) == tokens[-1]
    assert (ids.thought == ids.latent) == (LATENT in tokens or not tokens)  # pause tokens are looked up, not thought


def test_positions_are_checked_with_the_thoughts_of_every_method() -> None:
    """The longest sequence that it trains on at any stage, a teacher's too; or the last stage's prompt and the new tokens."""
    base = Dataset.from_list([SAMPLE])
    prompts = {"coconut": 2 + 2 + 4, "pause": 2 + 4, "no_cot": 2, "codi": 2 + 2 + 4}
    for method in METHODS:
        trained = max(len(training_sequence(configuration(method), stage)[0]) for stage in range(4))
        if method in ("codi", "codi_kv", "codi_simcot"):
            trained = max(trained, 2 + 5 + 2)  # the teacher's, without the last step
        for needed, new in [(trained, 1), *([(prompts[method] + 30, 30)] if method in prompts else [])]:
            check_lengths([base], configuration(method), new, needed)
            with pytest.raises(UserError, match=f"needs up to {needed} positions"):
                check_lengths([base], configuration(method), new, needed - 1)


def test_a_pause_checkpoint_starts_from_a_coconut_checkpoint(run_arguments: list[str], tmp_path: Path) -> None:
    """The markers that are there keep their rows; the one that is new gets one."""
    run.main.__wrapped__([*run_arguments, "num_epochs=1"])
    directory = tmp_path / "checkpoints" / "run" / "checkpoint_1"
    config = load_config(
        RunConfig, [*run_arguments, "method=pause_as_thought", "from_scratch=false", f"load_model_path={directory}"]
    )
    tokenizer = load_tokenizer(str(directory))
    ids = latent_ids(tokenizer, config.method)
    weight = build_model(config, tokenizer, ids).base_causallm.get_input_embeddings().weight
    trained = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weight[[ids.start, ids.end]], trained[[ids.start, ids.end]])
    assert not torch.equal(weight[ids.thought], trained[ids.thought])
    torch.testing.assert_close(weight[ids.thought], trained[: ids.thought].mean(dim=0))


def test_icot_resets_the_optimizer_at_each_removal_and_resumes_inside_an_epoch(
    run_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    icot = ["method=icot", "icot_tokens_per_epoch=2", "icot_start_epoch=1", "max_latent_stage=0", "num_epochs=2"]
    made = []
    new = Trainer._new_optimizer
    monkeypatch.setattr(Trainer, "_new_optimizer", lambda self: made.append(self.state.global_step) or new(self))
    run.main.__wrapped__([*run_arguments, *icot])
    assert made == [0, 9]  # 6 steps an epoch: the first token goes in the middle of the second epoch
    whole = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl", "step")
    assert [row["stage"] for row in whole] == [0] * 9 + [1] * 3

    step = Trainer._optimizer_step

    def stop_at_nine(self: Trainer, batches: Any) -> Any:
        loss, _ = step(self, batches)
        return loss, self.state.global_step == 9  # between two stages

    monkeypatch.setattr(Trainer, "_optimizer_step", stop_at_nine)
    run.main.__wrapped__([*run_arguments, *icot, "name=stopped"])
    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    run.main.__wrapped__([*run_arguments, *icot, "name=stopped"])
    resumed = read_rows(tmp_path / "checkpoints" / "stopped" / "metrics.jsonl", "step")
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]


@pytest.mark.parametrize("dataset", ["gsm", "prontoqa", "prosqa", "prosqa_quick"])
@pytest.mark.parametrize("method", METHODS)
def test_every_data_set_has_a_configuration_of_every_method(dataset: str, method: str) -> None:
    config = load_config(RunConfig, [str(ROOT / "args" / f"{dataset}_{method}.yaml")])
    reference = load_config(RunConfig, [str(ROOT / "args" / f"{dataset}_coconut.yaml")])
    assert config.method == method
    own = ("lr", "weight_decay") if method.startswith("codi") else ()  # published with its own
    for key in {"train_path", "val_path", "model_id", "lr", "weight_decay", "batch_size_training", "max_new_tokens"} - {*own}:
        assert getattr(config, key) == getattr(reference, key), key
    if method in ("pause", "no_curriculum", "pause_as_thought", "no_thoughts", "codi", "codi_simcot", "simcot"):
        for key in ("c_thought", "max_latent_stage", "pad_latent_to_max"):
            if (dataset, method, key) == ("gsm", "simcot", "max_latent_stage"):
                continue  # published with five stages
            assert getattr(config, key) == getattr(reference, key), key


# --- a method from outside, with several sequences and a loss of parts ---


@pytest.fixture
def distilled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import distillation

    monkeypatch.setitem(
        METHODS, "distilled", replace(METHODS["coconut"], loss=distillation.distillation, sequences=distillation.teacher)
    )
    return ["method=distilled", "num_epochs=3", "c_thought=2", "lr=1e-4", "gradient_accumulation_steps=2"]


def test_named_parts_reach_metrics_and_the_table_and_add_up(
    run_arguments: list[str], tmp_path: Path, distilled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start(run_arguments, *distilled)
    rows = read_rows(tmp_path / "checkpoints" / "run" / "metrics.jsonl")
    for row in rows:
        parts = [row[f"loss_{name}"] for name in ("student", "teacher", "distillation")]
        assert sum(parts) == pytest.approx(row["loss" if row["kind"] == "step" else "train_loss"], rel=1e-5)
        assert min(parts) > 0
    table = epoch_table([row for row in rows if row["kind"] == "epoch"])
    capsys.readouterr()
    show(table)  # off a terminal, which would have a width of its own
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert f"{[row for row in rows if row['kind'] == 'epoch'][-1]['val_loss']:.4f}" in shown
    assert [column.header for column in table.columns][3:8] == [
        "train loss",
        "loss student",
        "loss teacher",
        "loss distillation",
        "val loss",
    ]


def test_the_loss_of_several_sequences_is_that_of_one_process(
    run_arguments: list[str], tmp_path: Path, distilled: list[str]
) -> None:
    start(run_arguments, *distilled, "name=one", "batch_size_training=4", "pad_latent_to_max=false")
    variants = {"fsdp": ["parallel=fsdp"], "step": ["parallel=fsdp", "fsdp_gather=step"]}  # DDP: test_distillation.py
    for name, settings in variants.items():
        more = [*distilled, f"name={name}", "batch_size_training=2", "pad_latent_to_max=false", *settings]
        result = launch(2, run_arguments, *more, script=ROOT / "tests" / "distillation.py")
        assert result.returncode == 0, result.stderr
    one, *others = (read_rows(tmp_path / "checkpoints" / name / "metrics.jsonl", "step") for name in ("one", *variants))
    for rows in others:
        for row, expected in zip(rows, one, strict=True):
            for key in ("loss", "loss_student", "loss_teacher", "loss_distillation"):
                assert row[key] == pytest.approx(expected[key], abs=2e-5), key


def test_a_loss_of_parts_resumes_inside_an_epoch(
    run_arguments: list[str], tmp_path: Path, distilled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(run_arguments, *distilled)
    step = Trainer._optimizer_step

    def stop_at_four(self: Trainer, batches: Any) -> Any:
        losses, _ = step(self, batches)
        return losses, self.state.global_step == 4

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", stop_at_four)
        start(run_arguments, *distilled, "name=stopped")
    start(run_arguments, *distilled, "name=stopped")
    assert differences(tmp_path / "checkpoints" / "run", tmp_path / "checkpoints" / "stopped") == []


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("coconut", ["epochs_per_stage=2", "num_epochs=8"], [0, 0, 0, 0, 0, 0, 0, 0.5]),  # stages 0, 1, 2, 3
        ("coconut", ["epochs_per_stage=2", "num_epochs=3"], [0, 0, 0]),  # ends as stage 1 begins
        ("cot", ["num_epochs=4"], [0, 0.25, 0.5, 0.75]),
        ("no_curriculum", ["num_epochs=2"], [0, 0.5]),
    ],
)
def test_how_much_of_the_last_stage_is_done(method: str, settings: list[str], expected: list[float]) -> None:
    config = configuration(method, *settings)
    done = [last_stage_share(config.curriculum, epoch, config.num_epochs) for epoch in range(config.num_epochs)]
    assert done == expected
