"""From gradients to the update: `on_gradients`, and clipping against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import quiet, targets

import nnx_fit as nf
from nnx_fit.errors import ConfigurationError

GRADIENT = np.array([3.0, -4.0])  # of norm 5


class Slope(nf.FitModule):
    """A linear loss: its gradient is known and stays the same."""

    def __init__(self):
        self.a, self.b = nnx.Param(jnp.zeros(())), nnx.Param(jnp.zeros(()))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def training_step(self, batch):
        return GRADIENT[0] * self.a[...] + GRADIENT[1] * self.b[...] + 0 * batch["target"].mean()

    def configure_optimizers(self):
        return optax.sgd(1.0)

    @property
    def moved(self):
        return -np.array([self.a[...], self.b[...]])


def trained(module=None, steps=1, **options):
    module = module or Slope()
    history = quiet(max_steps=steps, log_every_n_steps=1, **options).fit(module, targets(*[0.0] * 4))
    return module, history


@pytest.mark.parametrize(
    ("limit", "algorithm", "expected"),
    [
        (None, "norm", GRADIENT),
        (0, "norm", GRADIENT),
        (10.0, "norm", GRADIENT),
        (1.0, "norm", GRADIENT / 5),
        (2, "norm", GRADIENT * 2 / 5),
        (3.5, "value", [3.0, -3.5]),
        (1.0, "value", [1.0, -1.0]),
    ],
)
def test_gradients_are_clipped_by_norm_or_by_value(limit, algorithm, expected):
    module, _ = trained(gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    np.testing.assert_allclose(module.moved, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"gradient_clip_val": -1.0}, "gradient_clip_val"),
        ({"gradient_clip_val": "1"}, "gradient_clip_val"),
        ({"gradient_clip_val": True}, "gradient_clip_val"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val"),
        ({"gradient_clip_algorithm": "l2"}, "gradient_clip_algorithm"),
    ],
)
def test_clipping_that_makes_no_sense_is_refused(arguments, name):
    with pytest.raises(ConfigurationError, match=name):
        quiet(**arguments)


def test_on_gradients_comes_before_clipping_and_logs_and_writes():
    class Doubles(Slope):
        def on_gradients(self, grads):
            self.log("norm", jnp.sqrt(sum(g**2 for g in jax.tree.leaves(grads))))
            self.log("step", self.global_step)
            self.calls[...] += 1
            return jax.tree.map(lambda g: 2 * g, grads)

    module, history = trained(Doubles(), steps=3, gradient_clip_val=1.0)
    np.testing.assert_allclose(module.moved, 3 * GRADIENT / 5, rtol=1e-6)
    assert history["norm"] == [(1, 5.0), (2, 5.0), (3, 5.0)]
    assert history["step"] == [(1, 0.0), (2, 1.0), (3, 2.0)]
    assert int(module.calls[...]) == 3


def test_on_gradients_sees_the_mean_of_a_window_once():
    class Notes(Slope):
        def training_step(self, batch):
            return batch["target"].mean() * self.a[...]

        def on_gradients(self, grads):
            self.calls[...] += 1
            self.log("a", grads["a"])
            return grads

    module = Notes()
    history = quiet(max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=1).fit(module, targets(1, 3, 5))
    assert history["a"] == [(1, 2.0), (2, 5.0)] and int(module.calls[...]) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda grads: None, r"on_gradients returned nothing.*return grads"),
        (lambda grads: jax.tree.leaves(grads), r"another structure"),
        (lambda grads: jax.tree.map(lambda g: g[None], grads), r"shape of the gradient.*'a'"),
    ],
)
def test_gradients_that_are_none_are_one_clear_error(wrong, message):
    module = type("Wrong", (Slope,), {"on_gradients": lambda self, grads: wrong(grads)})()
    with pytest.raises(ConfigurationError, match=f"(?s)Wrong.{message}|{message}"):
        trained(module)
    np.testing.assert_array_equal(module.moved, [0, 0])


def test_a_name_logged_in_both_hooks_is_an_error():
    class Twice(Slope):
        def training_step(self, batch):
            self.log("same", 1.0)
            return super().training_step(batch)

        def on_gradients(self, grads):
            self.log("same", 2.0)
            return grads

    with pytest.raises(ConfigurationError, match=r"'same'.*training_step and in on_gradients"):
        trained(Twice())


def test_a_step_that_adds_a_variable_in_on_gradients_is_an_error():
    class Adds(Slope):
        def on_gradients(self, grads):
            self.extra = nnx.Variable(jnp.zeros(()))
            return grads

    with pytest.raises(nf.StateError, match=r"(?s)on_gradients.*added extra"):
        trained(Adds())


def test_a_name_logged_by_the_step_and_by_a_callback_is_an_error():
    class Logs(Slope):
        def training_step(self, batch):
            self.log("lr", 1.0)
            return super().training_step(batch)

        def configure_optimizers(self):
            return nf.OptimizerSpec(optax.sgd, schedule=0.1)

    with pytest.raises(ConfigurationError, match=r"'lr' is logged by the step and by a callback"):
        trained(Logs(), callbacks=nf.LearningRateMonitor())
