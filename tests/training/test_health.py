"""Verdicts over made-up losses."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_atum.config.schema import HealthConfig
from megatron_atum.training.engine import StepResult
from megatron_atum.training.health import Health, Verdict


def result(grad_norm: float = 1.0, **losses: float) -> StepResult:
    sources = {f"loss/{name}": loss for name, loss in losses.items()}
    overall = {"loss": sum(losses.values()), "z_loss": 1.0}
    return StepResult({**overall, **sources}, grad_norm, 1e-3, 0, 1, 1, {}, {})


def health(**changes: Any) -> Health:
    return Health(HealthConfig(spike_window=8, **changes))


def calm(judge: Health, steps: int = 8) -> None:
    """Losses of 2 with a little noise."""
    for step in range(steps):
        verdict = judge.judge(step + 1, result(a=2.0 + 0.02 * (step % 3 - 1), b=3.0))
        assert verdict == Verdict(applies=True)


@pytest.mark.parametrize(
    "bad",
    [
        result(grad_norm=math.nan, a=2.0),
        result(grad_norm=math.inf, a=2.0),
        result(a=math.nan),
        StepResult({"loss": 2.0, "z_loss": math.inf}, 1.0, 1e-3, 0, 1, 1, {}, {}),
    ],
)
def test_what_is_not_finite_is_not_applied(bad: StepResult) -> None:
    judge = health(max_bad_steps=2)
    assert judge.judge(1, bad) == Verdict(applies=False, finite=False)
    assert judge.judge(2, result(a=2.0)).applies
    assert not judge.judge(3, bad).stop, "counts in a row"
    assert "2 steps in a row were not applied" in judge.judge(4, bad).stop
    assert judge.bad_steps == 3


def test_a_spike_is_told_by_its_source() -> None:
    judge = health(spike="log")
    calm(judge)
    verdict = judge.judge(9, result(a=2.0, b=4.0))
    assert verdict.applies
    (spike,) = verdict.spikes
    assert (spike.source, spike.median) == ("b", 3.0)
    assert spike.z == pytest.approx((4.0 - 3.0) / (0.01 * 3.0)), "losses without any spread: 1 % of the median counts"


def test_the_spread_is_robust() -> None:
    """z = (x - median) / (1.4826 x median absolute deviation)."""
    judge = health(spike_threshold=5.0)
    for step, loss in enumerate([1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4]):
        assert not judge.judge(step + 1, result(a=loss)).spikes
    assert not judge.judge(9, result(a=1.7 + 4.9 * 1.4826 * 0.4)).spikes
    judge = health(spike_threshold=5.0)
    for step, loss in enumerate([1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4]):
        judge.judge(step + 1, result(a=loss))
    (spike,) = judge.judge(9, result(a=1.7 + 5.1 * 1.4826 * 0.4)).spikes
    assert spike.z == pytest.approx(5.1)


def test_low_losses_and_few_losses_are_no_spikes() -> None:
    judge = health()
    assert not judge.judge(1, result(a=2.0)).spikes
    assert not judge.judge(2, result(a=200.0)).spikes, "half a window is needed"
    judge = health()
    calm(judge)
    assert not judge.judge(9, result(a=0.1, b=0.1)).spikes


def test_with_log_a_new_level_becomes_normal() -> None:
    judge = health(spike="log")
    calm(judge)
    spiked = [bool(judge.judge(9 + step, result(a=5.0, b=3.0)).spikes) for step in range(8)]
    assert spiked[0] and not spiked[-1]


def test_skip_data_keeps_spikes_away_from_weights_and_from_the_window() -> None:
    judge = health(spike="skip_data", max_bad_steps=20)
    calm(judge)
    for step in range(10):
        verdict = judge.judge(9 + step, result(a=5.0, b=3.0))
        assert not verdict.applies and verdict.finite and verdict.spikes
    assert judge.bad_steps == 10
    assert judge.judge(30, result(a=2.0, b=3.0)).applies


def test_rollback_waits_for_several_in_a_row_and_names_the_first() -> None:
    judge = health(spike="rollback", spike_steps=3)
    calm(judge)
    assert judge.judge(9, result(a=5.0, b=3.0)).applies
    assert judge.judge(10, result(a=2.0, b=3.0)).applies
    verdicts = [judge.judge(step, result(a=5.0, b=3.0)) for step in (11, 12, 13)]
    assert [verdict.back_before for verdict in verdicts] == [None, None, 11]
    assert [verdict.applies for verdict in verdicts] == [True, True, False]


def test_a_bad_step_among_spikes_does_not_hide_the_first_of_them() -> None:
    judge = health(spike="rollback", spike_steps=3)
    calm(judge)
    spiked = result(a=5.0, b=3.0)
    assert judge.judge(9, spiked).applies
    assert not judge.judge(10, result(a=math.nan, b=3.0)).finite
    assert judge.judge(11, spiked).applies
    assert judge.judge(12, spiked).back_before == 9


def test_a_rollback_that_cannot_be_counts_as_a_bad_step() -> None:
    judge = health(spike="rollback", spike_steps=1, max_bad_steps=2)
    calm(judge)
    stops = []
    for step in (9, 10):
        verdict = judge.judge(step, result(a=5.0, b=3.0))
        assert verdict.back_before == 9
        verdict = judge.cannot_roll_back(verdict)
        assert not verdict.applies and verdict.back_before is None
        stops.append(verdict.stop)
    assert stops[0] == "" and "2 steps in a row were not applied" in stops[1]
    judge.stopped()
    assert judge.bad_in_a_row == 0


@pytest.mark.parametrize("policy", ["log", "skip_data", "rollback"])
def test_state_survives_json_to_the_last_bit(policy: str) -> None:
    one = health(spike=policy, max_bad_steps=20)
    calm(one)
    one.judge(9, result(a=5.0, b=3.0))
    other = health(spike=policy, max_bad_steps=20)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(10, 16):
        following = result(a=2.0 + 0.4 * (step % 3), b=3.0)
        assert one.judge(step, following) == other.judge(step, following)
    assert one.state_dict() == other.state_dict()


def test_an_empty_state_is_that_of_a_new_run() -> None:
    judge = health()
    calm(judge)
    judge.load_state_dict({})
    assert judge.state_dict() == health().state_dict()
