"""What counts as right, and that the validation loss is that of the stage, however the questions are batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from config import RunConfig
from dataset import get_question_latent_dataset
from evaluation import Asking, Evaluator, clean_answer, interval, written_answer
from systems.models import build_model, latent_ids, load_tokenizer
from systems.tokens import get_dataset
from thoughts import thought_health
from utils import load_config


def evaluator(run_arguments: list[str], *more: str) -> tuple[Evaluator, Any]:
    """An evaluator on seven questions, and the same random model each time."""
    config = load_config(RunConfig, [*run_arguments, *more])
    tokenizer = load_tokenizer(config.model_id)
    ids = latent_ids(tokenizer, config.method)
    torch.manual_seed(0)
    model = build_model(config, tokenizer, ids).eval()
    dataset = get_dataset(config.val_path, tokenizer)
    return Evaluator(config.part(Asking), config.curriculum, dataset, tokenizer, ids, torch.device("cpu")), model


@pytest.mark.parametrize(
    ("output", "correct", "wrote_steps"),
    [
        ("### {gold}", True, False),
        ("Tom is a lempus.\n### {gold}", True, True),
        ("{gold}\n### Sally is a zumpus.", False, True),  # it stands in the text, but is not the answer
        ("### Sally is a zumpus. {gold}", False, False),
        ("### {gold} {gold}", False, False),
        ("{gold}", False, True),  # no answer is marked
    ],
)
def test_only_the_answer_itself_is_judged(run_arguments: list[str], output: str, correct: bool, wrote_steps: bool) -> None:
    judge, _ = evaluator(run_arguments)
    gold = judge.dataset[0]["answer"]
    tokens = judge.tokenizer(output.format(gold=gold), add_special_tokens=False)["input_ids"]
    found = judge._judge(0, tokens, stage=0)
    assert (found.correct, found.wrote_steps, found.gold) == (correct, wrote_steps, gold)
    assert found.new_tokens == len(tokens)


def test_commas_in_numbers_do_not_count() -> None:
    assert written_answer("1 # 2\n### 1,234 ") == clean_answer(" 1,234") == "1234"


def test_right_steps_are_all_that_the_stage_still_writes(run_arguments: list[str]) -> None:
    judge, _ = evaluator(run_arguments)
    record = judge.dataset[2]  # three steps
    for stage, written in [(0, record["steps"]), (1, record["steps"][1:]), (2, record["steps"][2:])]:
        for steps, right in [(written, True), (written[:-1], False), ([*written, written[0]], False)]:
            text = "\n".join([*steps, "### " + record["answer"]])
            tokens = judge.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert judge._judge(2, tokens, stage).cot_match is right, (stage, steps)


@pytest.mark.parametrize(
    ("plainly", "mixed"),
    [
        ([], ["uniform_prob=1"]),
        ([], ["earlier_stage_prob=1"]),
        (["method=icot", "icot_smoothing=null"], ["method=icot", "icot_smoothing=0.1", "icot_start_epoch=0"]),
    ],
)
def test_the_validation_loss_is_that_of_the_stage(run_arguments: list[str], plainly: list[str], mixed: list[str]) -> None:
    """Training mixes stages; validation does not, so that its loss is comparable from run to run."""
    plain, model = evaluator(run_arguments, *plainly)
    mixing, _ = evaluator(run_arguments, *mixed)
    with torch.no_grad():
        losses = [plain._loss(model, stage)[0] for stage in (0, 1, 2)]
        assert [mixing._loss(model, stage)[0] for stage in (0, 1, 2)] == losses
    assert len(set(losses)) == 3


def test_the_validation_loss_is_a_mean_over_tokens(run_arguments: list[str]) -> None:
    """Batches have different numbers of labelled tokens; the mean of their means would be another number."""
    losses = []
    for size in (1, 2, 7):
        each, model = evaluator(run_arguments, f"batch_size_eval={size}")
        with torch.no_grad():
            losses.append(each._loss(model, 1)[0])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_batches_by_positions_give_the_same_answers_and_never_take_more(
    run_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = evaluator(run_arguments, "max_new_tokens=4")
    room = 120
    by_positions, _ = evaluator(run_arguments, "max_new_tokens=4", f"tokens_per_batch={room}")
    seen = []
    generate = Evaluator._generate

    def watched(self: Evaluator, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        seen.append(tuple(batch["input_ids"].shape))
        return generate(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_generate", watched)
        found = by_positions.evaluate(model, 1)
    wanted = plain.evaluate(model, 1)
    assert [one.output for one in found.predictions] == [one.output for one in wanted.predictions]
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert sum(rows for rows, _ in seen) == len(found.predictions)
    assert all(rows * (columns + 4) <= room for rows, columns in seen)
    assert len(seen) < len(found.predictions)


def test_the_health_is_that_of_the_thoughts_of_the_questions(run_arguments: list[str]) -> None:
    """The same from one question at a time, with the thoughts that `think` gives; none where nothing is latent."""
    judge, model = evaluator(run_arguments, "batch_size_eval=3")
    own = []
    for record in get_question_latent_dataset(
        1, judge.dataset, judge.curriculum, judge.ids.start, judge.ids.thought, judge.ids.end
    ):
        ids = torch.tensor(record["input_ids"])[None]
        ids[ids == judge.ids.thought] = judge.ids.latent
        embeds, latent = model.think(ids).inputs_embeds[0].detach(), ids[0] == judge.ids.latent
        own.append(embeds[latent] / embeds[~latent].norm(dim=-1).mean())
    found = judge.evaluate(model, 1).health
    assert found["thought_norm"] == pytest.approx(torch.cat(own).norm(dim=-1).mean().item(), rel=0.2)
    assert found["question_cosine"] == pytest.approx(thought_health(own)["question_cosine"], rel=1e-4)
    assert judge.evaluate(model, 0).health == {}


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (1, 7), (7, 7), (964, 1000), (1, 1)])
def test_the_interval_is_wilsons(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    assert interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert all(interval(0, n)[0] == 0 and interval(n, n)[1] == 1 for n in range(1, 100))
