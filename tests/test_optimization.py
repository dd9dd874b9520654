"""The optimizer's learning rate over a training."""

from __future__ import annotations

import pytest

from systems.optimization import Optimization, learning_rate


def rates(schedule: str, warmup_steps: int, shares: list[float], warmup_share: float = 0.0) -> list[float]:
    config = Optimization(0.5, schedule, warmup_steps, warmup_share, adam_beta2=0.999, weight_decay=0.0)
    return [learning_rate(config, step, len(shares), share) for step, share in enumerate(shares)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 0.5, 0.5]), ("linear", [0.5, 0.375, 0.25]), ("cosine", [0.5, 0.4267766952966369, 0.25])],
)
def test_what_is_left_in_the_last_stage(schedule: str, expected: list[float]) -> None:
    assert rates(schedule, 0, [0.0, 0.25, 0.5]) == pytest.approx(expected)


def test_warm_up_grows_to_the_full_rate_at_its_last_step() -> None:
    assert rates("constant", 4, [0.0] * 5) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates("linear", 4, [0.0, 0.0, 0.5]) == pytest.approx([0.125, 0.25, 0.1875])


def test_warm_up_as_a_share_of_all_steps() -> None:
    assert rates("constant", 0, [0.0] * 8, warmup_share=0.25) == pytest.approx([0.25] + [0.5] * 7)
    assert rates("constant", 0, [0.0] * 3, warmup_share=0.01) == pytest.approx([0.5] * 3)  # less than a step
