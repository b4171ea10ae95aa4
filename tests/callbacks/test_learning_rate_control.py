"""Whose learning rate a search controls, and how a run gets the rate that was found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx_fit as nf
from nnx_fit.callbacks.learning_rate_control import (
    SearchSchedule,
    only_one,
    searched,
    with_peak,
    with_resting_plateaus,
)
from nnx_fit.callbacks.named_number import NamedNumber

RATES = np.array([0.5, 0.25, 0.125])


class Owner:
    def __init__(self, rate: float = 0.1):
        self.rate = rate


def updates(configured, steps: int = 4) -> list[float]:
    """The updates of a parameter whose gradient is 1."""
    spec = configured if isinstance(configured, nf.OptimizerSpec) else nf.OptimizerSpec(configured)
    tx = spec.transformation()
    state, made = tx.init(jnp.zeros(())), []
    for _ in range(steps):
        update, state = jax.jit(tx.update)(jnp.ones(()), state)
        made.append(float(update))
    return made


def test_a_schedule_goes_through_its_rates_and_keeps_the_last():
    schedule = SearchSchedule(RATES)
    assert not schedule.used
    assert [float(jax.jit(schedule)(count)) for count in range(5)] == [0.5, 0.25, 0.125, 0.125, 0.125]
    assert schedule.used


@pytest.mark.parametrize(
    "configure",
    [
        lambda owner: optax.sgd(owner.rate),
        lambda owner: [optax.sgd(owner.rate)],
        lambda owner: {"all": nf.OptimizerSpec(optax.sgd(owner.rate))},
        lambda owner: nf.OptimizerSpec(optax.sgd, schedule=owner.rate),
        lambda owner: nf.OptimizerSpec(optax.sgd, schedule=optax.linear_schedule(0.0, owner.rate * 3, 10)),
        lambda owner: optax.inject_hyperparams(optax.sgd)(learning_rate=owner.rate),
        lambda owner: optax.chain(optax.clip(2.0), optax.sgd(owner.rate)),
    ],
)
def test_the_optimizer_of_a_search_takes_its_rates_and_the_number_stays(configure):
    owner = Owner()
    number = NamedNumber("module.rate", owner, "rate")
    found = searched(lambda: configure(owner), "configure_optimizers", number, SearchSchedule(RATES))
    assert updates(found) == [-0.5, -0.25, -0.125, -0.125]
    assert owner.rate == 0.1


def test_of_several_optimizers_there_is_no_one_rate():
    spec = nf.OptimizerSpec(optax.sgd, schedule=0.1)
    with pytest.raises(nf.ConfigurationError, match="gives 2 optimizers"):
        only_one([spec, spec], "configure_optimizers")
    with pytest.raises(nf.ConfigurationError, match="gives 2 optimizers"):
        only_one({"a": spec, "b": spec}, "configure_optimizers")


@pytest.mark.parametrize("tx", [optax.sgd(0.1), nf.OptimizerSpec(optax.sgd(0.1), schedule=0.1)])
def test_a_ready_optimizer_without_a_number_cannot_be_searched(tx):
    with pytest.raises(nf.ConfigurationError, match="learning rate of there cannot be changed"):
        searched(lambda: tx, "there", None, SearchSchedule(RATES))


@pytest.mark.parametrize("rests", [True, False])
def test_a_plateau_that_rests_reduces_nothing(rests):
    tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1))
    tx = with_resting_plateaus(tx) if rests else tx
    state, update = tx.init(jnp.zeros(())), None
    for _ in range(8):  # the value stays; every other update or so is one too many without an improvement
        update, state = tx.update(jnp.ones(()), state, value=jnp.float32(1.0))
    assert float(-update) == 1.0 if rests else 0 < float(-update) < 0.1


def test_a_constant_rate_becomes_the_one_that_was_found_exactly():
    changed = with_peak(nf.OptimizerSpec(optax.sgd, schedule=0.1, name="main"), 0.3)(100)
    assert (changed.schedule, changed.name) == (0.3, "main")


def test_a_schedule_keeps_its_shape_and_peaks_at_the_rate():
    def shape(steps, peak):
        return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)

    changed = with_peak(lambda steps: {"all": nf.OptimizerSpec(optax.sgd, schedule=shape(steps, 0.1))}, 0.3)(200)
    counts = np.arange(200)
    np.testing.assert_allclose(
        [changed["all"].schedule(count) for count in counts], [shape(200, 0.3)(count) for count in counts], atol=1e-7
    )


@pytest.mark.parametrize("steps", [1, 10**12, float("inf")])
def test_a_peak_is_found_in_runs_of_any_length(steps):
    changed = with_peak(nf.OptimizerSpec(optax.sgd, schedule=optax.constant_schedule(0.1)), 0.3)(steps)
    assert float(changed.schedule(0)) == pytest.approx(0.3)


def test_a_schedule_that_is_zero_all_along_has_no_peak():
    setting = with_peak(nf.OptimizerSpec(optax.sgd, schedule=optax.constant_schedule(0.0)), 0.3)
    with pytest.raises(nf.ConfigurationError, match="no peak above 0 within 50 steps"):
        setting(50)


def test_a_rate_that_was_found_before_is_replaced_by_the_next():
    twice = with_peak(with_peak(nf.OptimizerSpec(optax.sgd, schedule=0.1), 0.3), 0.5)
    assert twice(10).schedule == 0.5
