"""Manual optimization keeps the rules of the Trainer's own updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nets import Scalar, loader, quiet, targets

import nnx_fit as nf


class Normed(nf.FitModule):
    """A layer that overwrites its kernel in every call."""

    def __init__(self, manual: bool, *, rngs: nnx.Rngs):
        self.layer = nnx.SpectralNorm(nnx.Linear(8, 1, rngs=rngs), rngs=rngs)
        self.automatic_optimization = not manual

    def training_step(self, batch):
        def loss_of():
            return ((self.layer(batch["x"], update_stats=True) - batch["y"]) ** 2).mean()

        if self.automatic_optimization:
            return loss_of()
        _, grads = self.value_and_grad(loss_of)
        self.optimizers().update(grads)

    def configure_optimizers(self):
        return optax.sgd(0.1)


def test_layers_that_write_by_design_train_as_the_trainer_trains_them():
    found = []
    for manual in (False, True):
        module = Normed(manual, rngs=nnx.Rngs(0))
        quiet(max_steps=5).fit(module, loader())
        found.append(jax.tree.leaves(nnx.state(module, nnx.Not(nnx.RngState))))
    for automatic, by_hand in zip(*found, strict=True):
        np.testing.assert_allclose(automatic, by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_target_that_the_function_moves_is_as_fine_as_its_own_dtype(precision):
    class Target(nf.FitModule):
        automatic_optimization = False

        def __init__(self):
            self.w = nnx.Param(jnp.float32(1.0))
            self.target = nnx.Param(jnp.float32(1.0))
            self.freeze("target")

        def training_step(self, batch):
            def loss_of():
                self.target[...] = self.target[...] * 0.999
                return (self.w[...] ** 2).mean()

            self.optimizers().update(self.value_and_grad(loss_of)[1])

        def configure_optimizers(self):
            return optax.sgd(0.1)

    module = Target()
    quiet(max_steps=20, precision=precision).fit(module, targets(*range(20)))
    np.testing.assert_allclose(module.target[...], 0.999**20, rtol=1e-5)


def test_an_array_given_as_a_hyperparameter_stays_the_givers():
    class Setting(Scalar):
        def configure_optimizers(self):
            return optax.inject_hyperparams(optax.sgd)(0.1)

        def on_train_batch_start(self, batch, batch_idx):
            self.optimizers().hyperparams["learning_rate"] = rate

    rate = jnp.float32(0.5)
    module = Setting(1.0)
    quiet(max_steps=3).fit(module, targets(0, 0, 0))
    np.testing.assert_allclose(module.w[...], 0.125)
    assert float(rate) == 0.5


def test_outputs_that_are_no_dict_are_named():
    class Pair(Scalar):
        automatic_optimization = False

        def training_step(self, batch):
            loss, grads = self.value_and_grad(lambda: (self.w[...] ** 2).sum())
            self.optimizers().update(grads)
            return loss, batch

    with pytest.raises(nf.ConfigurationError, match=r"returned a tuple(.|\n)*Fix: return a dict"):
        quiet(max_steps=1).fit(Pair(1.0), targets(0))
