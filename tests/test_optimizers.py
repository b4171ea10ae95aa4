"""Optimizers: every accepted form means the same training, and the learning rate can be read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Scalar, quiet, targets

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError
from nnx_fit.optimizers import bind, is_transformation, resolve


class Bare(Scalar):
    """`Scalar` without an optimizer of its own."""

    configure_optimizers = nf.FitModule.configure_optimizers


class Rates(nf.Callback):
    """Logs the learning rate as the step sees it."""

    def step_metrics(self, view):
        return {f"lr{'-' if name else ''}{name}": rate for name, rate in view.learning_rates.items()}


def trained(optimizer: Any, steps: int = 3) -> tuple[float, Any]:
    module = Bare()
    history = quiet(max_steps=steps, optimizer=optimizer, log_every_n_steps=1, callbacks=Rates()).fit(
        module, targets(*[0.0] * steps)
    )
    return float(module.w[...]), history


def decayed(*rates: float) -> float:
    return float(np.prod([1 - rate for rate in rates]))


FORMS = {
    "a transformation": lambda: optax.sgd(0.1),
    "a chain": lambda: optax.chain(optax.clip(100.0), optax.sgd(0.1)),
    "a spec": lambda: nf.OptimizerSpec(optax.sgd(0.1)),
    "a spec of a callable": lambda: nf.OptimizerSpec(optax.sgd, schedule=0.1),
    "a spec of a lambda": lambda: nf.OptimizerSpec(lambda rate: optax.sgd(rate), schedule=0.1),
    "a dict of one": lambda: {"main": optax.sgd(0.1)},
    "a list of one": lambda: [nf.OptimizerSpec(optax.sgd(0.1))],
    "a tuple of one": lambda: (optax.sgd(0.1),),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_alike(form):
    np.testing.assert_allclose(trained(FORMS[form]())[0], 0.9**3, rtol=1e-6)

    class Own(Scalar):
        def configure_optimizers(self):
            return FORMS[form]()

    module = Own()
    quiet(max_steps=3).fit(module, targets(0.0, 0.0, 0.0))
    np.testing.assert_allclose(module.w[...], 0.9**3, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_trainer_takes_a_callable_of_the_number_of_steps(form):
    given: list[Any] = []

    def make(steps):
        given.append(steps)
        return FORMS[form]()

    np.testing.assert_allclose(trained(make, steps=5)[0], 0.9**5, rtol=1e-6)
    assert given == [5]


def test_a_schedule_is_what_a_callable_gets_and_what_is_logged():
    schedule = optax.linear_schedule(0.1, 0.5, 4)
    weight, history = trained(nf.OptimizerSpec(optax.sgd, schedule=schedule))
    np.testing.assert_allclose(weight, decayed(0.1, 0.2, 0.3), rtol=1e-6)
    np.testing.assert_allclose([rate for _, rate in history["lr"]], [0.1, 0.2, 0.3], rtol=1e-6)


def test_a_schedule_beside_a_ready_transformation_is_only_read():
    schedule = optax.linear_schedule(0.1, 0.5, 4)
    weight, history = trained(nf.OptimizerSpec(optax.sgd(0.2), schedule=schedule))
    np.testing.assert_allclose(weight, decayed(0.2, 0.2, 0.2), rtol=1e-6)
    np.testing.assert_allclose([rate for _, rate in history["lr"]], [0.1, 0.2, 0.3], rtol=1e-6)


def test_a_float_is_a_constant_schedule():
    _, history = trained(nf.OptimizerSpec(optax.sgd, schedule=0.25))
    assert [rate for _, rate in history["lr"]] == [0.25] * 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip(100.0), tx),
        lambda tx: optax.chain(optax.clip(100.0), optax.chain(tx)),
        lambda tx: optax.masked(tx, True),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1),
    ],
)
def test_injected_hyperparameters_are_the_rate_of_the_very_step(wrap):
    schedule = optax.linear_schedule(0.1, 0.5, 4)
    weight, history = trained(wrap(optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)))
    np.testing.assert_allclose(weight, decayed(0.1, 0.2, 0.3), rtol=1e-6)
    np.testing.assert_allclose([rate for _, rate in history["lr"]], [0.1, 0.2, 0.3], rtol=1e-6)


def test_an_injected_constant_is_readable():
    _, history = trained(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    np.testing.assert_allclose([rate for _, rate in history["lr"]], [0.1] * 3, rtol=1e-6)


def test_a_rate_that_cannot_be_read_is_absent():
    assert "lr" not in trained(optax.sgd(0.1))[1]
    assert "lr" not in trained(optax.inject_hyperparams(optax.scale)(step_size=-0.1))[1]


@pytest.mark.parametrize(
    "optimizer",
    [
        nf.OptimizerSpec(optax.sgd, schedule=0.1, name="main"),
        {"main": nf.OptimizerSpec(optax.sgd, schedule=0.1)},
        {"other": nf.OptimizerSpec(optax.sgd, schedule=0.1, name="main")},
    ],
)
def test_a_name_goes_with_the_rate(optimizer):
    assert [step for step, _ in trained(optimizer)[1]["lr-main"]] == [1, 2, 3]


class Two(Bare):
    def __init__(self):
        super().__init__()
        self.v = nnx.Param(jnp.ones(()))

    def training_step(self, batch):
        return 0.5 * (self.w[...] ** 2 + self.v[...] ** 2) + 0 * batch["target"].mean()


def test_a_specs_own_filter_decides_what_trains():
    module = Two()
    trainer = quiet(max_steps=1, optimizer=nf.OptimizerSpec(optax.adam(0.1), trainable=nnx.PathContains("v")))
    trainer.fit(module, targets(0.0))
    assert float(module.w[...]) == 1.0
    np.testing.assert_allclose(module.v[...], 0.9, rtol=1e-5)
    assert {row.path: row.role for row in trainer.partition.rows} == {"v": "params", "w": "frozen"}


def test_what_was_frozen_stays_so_whatever_filter_a_spec_has():
    class Pair(Bare):
        def __init__(self):
            super().__init__()
            self.other = nnx.Param(jnp.ones(()))

        def training_step(self, batch):
            return (self.w[...] - 2) ** 2 + (self.other[...] - 2) ** 2

    class Unfreezes(nf.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.unfreeze("other")
            seen.append([row.path for row in trainer.partition.rows if row.role == "params"])

    seen: list[list[str]] = []
    module = Pair()
    module.freeze("other")
    spec = nf.OptimizerSpec(optax.sgd(0.1), trainable=nnx.Param)
    quiet(max_epochs=2, optimizer=spec, callbacks=Unfreezes()).fit(module, targets(0.0))
    assert seen == [["w"], ["other", "w"]]
    np.testing.assert_allclose([module.w[...], module.other[...]], [2 - 0.8**2, 1.2], rtol=1e-6)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        (None, "origin returned None.*"),
        (0.1, "origin gave a float"),
        ("adam", "origin gave a str"),
        ([], "origin gave no optimizer"),
        ([optax.sgd(0.1), 0.1], r"origin\[1\] gave a float"),
        ([nf.OptimizerSpec(optax.sgd(0.1), name="a")] * 2, "origin gave two optimizers of the name 'a'"),
        ({"a": None}, r"origin\['a'\] gave a NoneType"),
        (nf.OptimizerSpec(0.1), r"OptimizerSpec\(tx=0\.1\)"),
        (nf.OptimizerSpec(optax.sgd), "needs schedule="),
        (nf.OptimizerSpec(lambda rate: rate, schedule=0.1), "returned a float"),
    ],
)
def test_what_is_no_optimizer_is_one_clear_error(configured, message):
    with pytest.raises(ConfigurationError, match=message):
        bind(configured, origin="origin")


def test_an_optimizer_in_two_places_is_an_error():
    with pytest.raises(ConfigurationError, match=r"Scalar\.configure_optimizers and Trainer\(optimizer=\.\.\.\) both"):
        quiet(max_steps=1, optimizer=optax.sgd(0.1)).fit(Scalar(), targets(0.0))


def test_no_optimizer_anywhere_is_an_error():
    with pytest.raises(ConfigurationError, match="There is no optimizer: Bare"):
        quiet(max_steps=1).fit(Bare(), targets(0.0))


def test_a_wrong_optimizer_setting_is_refused_by_the_constructor():
    with pytest.raises(ConfigurationError, match=r"Trainer\(optimizer=\.\.\.\) gave a str"):
        quiet(optimizer="adam")


def test_transformations_are_recognized_and_only_callables_of_steps_are_called():
    tx = optax.sgd(0.1)
    assert is_transformation(tx)
    assert is_transformation(optax.MultiSteps(tx, 2))
    assert not is_transformation(optax.sgd)
    spec = nf.OptimizerSpec(optax.sgd, schedule=0.1)
    assert resolve(tx, 10) is tx
    assert resolve(spec, 10) is spec
    assert resolve(lambda steps: (steps, spec), 10) == (10, spec)


def test_a_spec_takes_settings_by_keyword_alone():
    with pytest.raises(TypeError):
        nf.OptimizerSpec(optax.sgd, 0.1)  # type: ignore[misc]


def test_a_cosine_schedule_of_the_runs_length_ends_at_zero():
    def make(steps):
        return nf.OptimizerSpec(optax.sgd, schedule=optax.cosine_decay_schedule(0.1, int(steps)))

    _, history = trained(make, steps=4)
    expected = [float(optax.cosine_decay_schedule(0.1, 4)(step)) for step in range(4)]
    np.testing.assert_allclose([rate for _, rate in history["lr"]], expected, rtol=1e-5)
    assert jax.tree.leaves(expected)
